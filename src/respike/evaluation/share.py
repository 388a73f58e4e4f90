"""How much of attention goes to far memories. T tokens, H query heads."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from respike.layers.far import FarSoftmax
from respike.models.decoder import Decoder


@dataclass(frozen=True)
class MemoryShare:
    """What one mixer's heads give to its memory, tokens it keeps as they are left out.

    Attributes:
        layer: Its layer.
        groups: The KV groups it serves.
        head_fracs: Mean share of each of its query heads, in the order of the groups.
    """

    layer: int
    groups: tuple[int, ...]
    head_fracs: tuple[float, ...]


def memory_shares(
    decoder: Decoder, tokens: Int[Tensor, "B T"], from_tokens: int
) -> list[MemoryShare]:
    """Every far memory's share of its queries' attention, 0 for a head that is shut.

    Args:
        decoder: The model.
        tokens: What it reads, in one piece.
        from_tokens: The first query that counts.
    """
    watched = [
        (index, groups, mixer)
        for index, layer in enumerate(decoder.layers)
        for groups, mixer in layer.self_attn.arrangement()
        if isinstance(mixer, FarSoftmax)
    ]
    for _, _, mixer in watched:
        mixer.watch, mixer.share = True, None
    found = []
    try:
        with torch.inference_mode():
            decoder(
                tokens.to(decoder.embedding.device), chunk_tokens=tokens.shape[1], logits="none"
            )
        for index, groups, mixer in watched:
            # A mixer whose heads are all shut, and that keeps nothing, does not even look.
            fracs = torch.zeros(len(mixer.beta))
            if mixer.share is not None:
                fracs = mixer.share[:, from_tokens:].mean((0, 1))
            found.append(MemoryShare(index, tuple(groups), tuple(fracs.tolist())))
    finally:
        for _, _, mixer in watched:
            mixer.watch, mixer.share = False, None
    return found
