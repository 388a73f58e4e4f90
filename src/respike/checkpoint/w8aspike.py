"""SpikingBrain-7B-W8ASpike as released: what its tensors mean, which differ from the plain release.

Every linear layer but the head has scales for 128 inputs of an output: the weight that runs is
``round(W / scale) * scale``, integers beyond 127 included. Before each stand neurons of threshold
mean|x| / 3. ``down_proj`` is released with scales too, but the released code goes past both its
neurons and its scales, and so do we. The gate of the linear layers is one matrix instead of two of
low rank; here it is two of full rank, of which the second is the identity.

Not done, although the released code emulates it: spikes before the gate, spiking queries and int8
keys and values inside the softmax layers.

Source: Pan et al., arXiv:2509.05276, section 3, and the released ``hf_7B_model/W8ASpike``.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from respike.config import GlaMemory, LayerConfig, LinearMixer, ModelConfig, SpikeBands, SpikeConfig
from respike.errors import CheckpointError

SCALES = ".weight_quantizer.scales"
GATE = ".attn.gk_proj.weight"
GROUP_SIZE: Literal[128] = 128
K = 3.0
"""Thresholds in a mean magnitude."""
_IDENTITY = ".memory.gate_up.weight"

Shape = tuple[int, ...]


def is_w8aspike(names: Iterable[str]) -> bool:
    """Whether a folder with tensors of these names is this release."""
    return any(name.endswith((SCALES, GATE)) for name in names)


def spiking_config(config: ModelConfig) -> ModelConfig:
    """The config of the release, from that of a plain one of the same shape."""
    rank = config.num_key_value_heads * config.head_dim
    layers = []
    for layer in config.layers:
        (part,) = layer.mixers
        if isinstance(part, LinearMixer) and isinstance(part.memory, GlaMemory):
            memory = part.memory.model_copy(update={"gate_rank": rank})
            part = part.model_copy(update={"memory": memory})
        layers.append(LayerConfig(mixers=(part,)))
    half = 1 / (2 * K)
    bands = SpikeBands(qkv=half, o=half, mlp=half, down=None)
    spikes = SpikeConfig(
        neuron="adaptive", weights="float", group_size=GROUP_SIZE, layers=(bands,) * len(layers)
    )
    return config.model_copy(update={"layers": tuple(layers), "spikes": spikes})


def their_names(names: Mapping[str, str]) -> dict[str, str]:
    """Our name of a tensor to theirs, from that of a plain release."""
    gates = {".attn.gk_proj.0.weight": GATE, ".attn.gk_proj.1.bias": ".attn.gk_proj.bias"}
    found = {}
    for ours, theirs in names.items():
        for plain, one in gates.items():
            if theirs.endswith(plain):
                theirs = theirs.removesuffix(plain) + one
        found[ours] = ours if ours.endswith(_IDENTITY) else theirs
    return found


def without_scales(
    shapes: Mapping[str, Shape], names: Mapping[str, str], where: str
) -> dict[str, Shape]:
    """What is to be accounted for as in a plain release: its tensors, and those we make up.

    Args:
        shapes: Of every tensor in the folder.
        names: From `their_names`.
        where: The folder, for messages.

    Raises:
        CheckpointError: Scales do not fit their weight.
    """
    kept = {name: shape for name, shape in shapes.items() if not name.endswith(SCALES)}
    for name in shapes.keys() - kept.keys():
        weight = kept.get(name.removesuffix(SCALES) + ".weight")
        wanted = weight and (weight[0], -(-weight[-1] // GROUP_SIZE), 1)
        if shapes[name] != wanted:
            raise CheckpointError(
                f"{where}: tensor {name[:100]!r} has shape {shapes[name]}, its weight asks for "
                f"{wanted if weight else 'none: there is no such weight'}"
            )
    for ours in names:
        if ours.endswith(_IDENTITY):
            rank = kept.get(names[ours.replace(_IDENTITY, ".memory.gate_down.weight")], (0,))[0]
            kept[ours] = (rank, rank)
    return kept


def read(name: str, names: Mapping[str, str], stored: Callable[[str], Tensor | None]) -> Tensor:
    """A tensor as it runs.

    Args:
        name: Ours.
        names: From `their_names`.
        stored: The tensor of a name of theirs; None if there is none.

    Raises:
        CheckpointError: A weight cannot be rounded by its scales.
    """
    if name.endswith(_IDENTITY):
        gate = stored(names[name.replace(_IDENTITY, ".memory.gate_down.weight")])
        assert gate is not None
        return torch.eye(len(gate), dtype=gate.dtype)
    theirs = names[name]
    tensor = stored(theirs)
    assert tensor is not None
    scales = stored(theirs.removesuffix(".weight") + SCALES)
    if scales is None or theirs.endswith(".mlp.down_proj.weight"):
        return tensor
    if not bool((scales > 0).all() & scales.isfinite().all()):
        raise CheckpointError(f"the scales of {theirs!r} are not all above 0 and finite")
    return rounded(tensor, scales[..., 0])


def rounded(weight: Tensor, scales: Tensor) -> Tensor:
    """``round(W / scale) * scale`` of a weight (O, I) with scales (O, I / 128), not limited."""
    each = scales.float().repeat_interleave(GROUP_SIZE, 1)[:, : weight.shape[1]]
    return ((weight.float() / each).round() * each).to(weight.dtype)
