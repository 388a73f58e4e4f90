"""Which passages an answer leaned on: the attention of what keeps everything that was read.

Retrieval groups (and layers of full or block-sparse softmax) keep every token. While an answer is
made, what their heads give to each token of the documents is added up. That is where the model
looked, which is evidence and no proof; windows and memories look elsewhere and point nowhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from respike.documents.reading import Reading
from respike.documents.sources import POINT_TOKENS
from respike.layers.blocks import BlockSoftmax
from respike.layers.softmax import FullSoftmax
from respike.models.decoder import Decoder
from respike.tokenizer import Tokenizer

OBSERVED_STEPS = 32
"""Steps of an answer that are looked at."""


@dataclass(frozen=True)
class Passage:
    """A stretch of a source.

    Attributes:
        source: Its name.
        unit: What ``place`` counts: line, page, row or record.
        place: The first.
        byte: Where it begins, in UTF-8 bytes of the source's text.
        share: Of the attention that went to the documents, 0 to 1.
        text: What stands there.
    """

    source: str
    unit: str
    place: int
    byte: int
    share: float
    text: str


class Attention:
    """What was given to each token of the documents, summed over heads and steps.

    Args:
        begin: First token of the documents.
        end: One after the last.
    """

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.mass = torch.zeros(end - begin)
        self.layers: dict[int, tuple[int, float]] = {}
        """Of each layer: steps, and the sum over them of its heads' mean share to documents."""

    @property
    def wanted(self) -> bool:
        """Whether there is anything to look at."""
        return True

    def add(self, weights: Tensor, layer: int) -> None:
        """Weights (1, H, S) of one step in one mixer of a layer."""
        inside = weights[0, :, self.begin : self.end].cpu()
        self.mass += inside.sum(0)
        steps, given = self.layers.get(layer, (0, 0.0))
        self.layers[layer] = steps + 1, given + float(inside.sum(1).mean())

    def layer_shares(self) -> dict[int, float]:
        """Mean share of each layer's attention that went to the documents, 0 to 1."""
        layers = sorted(list(self.layers.items()))  # others may be adding
        return {layer: given / steps for layer, (steps, given) in layers}

    @property
    def document_share(self) -> float:
        """The mean over layers."""
        shares = self.layer_shares().values()
        return sum(shares) / len(shares) if shares else 0.0

    def peaks(self, count: int) -> list[tuple[int, int, float]]:
        """The steps of `POINT_TOKENS` with most attention: (first token, end, share of all)."""
        total = float(self.mass.sum())
        if not total:
            return []
        rest = -len(self.mass) % POINT_TOKENS
        steps = torch.nn.functional.pad(self.mass, (0, rest)).view(-1, POINT_TOKENS).sum(1)
        found = []
        for step in steps.topk(min(count, len(steps))).indices.tolist():
            begin = self.begin + step * POINT_TOKENS
            end = min(begin + POINT_TOKENS, self.end)
            found.append((begin, end, float(steps[step]) / total))
        return found


@contextmanager
def observing(decoder: Decoder, attention: Attention) -> Iterator[None]:
    """Let ``attention`` add up what the decoder's mixers give, while the block runs."""
    mixers = [
        (index, mixer)
        for index, layer in enumerate(decoder.layers)
        for _, mixer in layer.self_attn.arrangement()
        if attention.wanted and isinstance(mixer, FullSoftmax | BlockSoftmax)
    ]
    try:
        for index, mixer in mixers:
            mixer.observer = partial(attention.add, layer=index)
        yield
    finally:
        for _, mixer in mixers:
            mixer.observer = None


def passages(
    reading: Reading, attention: Attention, tokenizer: Tokenizer, count: int
) -> list[Passage]:
    """The ``count`` most looked-at passages, most first."""
    found = []
    for begin, end, share in attention.peaks(count):
        source, byte, place = reading.place(begin)
        if source is None:
            continue
        text = ""
        if reading.tokens is not None:
            ids = reading.tokens[begin:end]
            text = " ".join(tokenizer.decode(ids).split())
        found.append(Passage(source.name, source.unit, place, byte, share, text))
    return found
