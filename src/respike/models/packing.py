"""From a decoder that can be trained to one that runs fast: packed weights and the engine."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from respike.errors import BackendError, UnsupportedError
from respike.layers.linear import PackedLinear, gather_behind_neurons, gather_packed
from respike.layers.moe import ExpertMLP
from respike.layers.spikes import SpikedLinear, SpikeLinear
from respike.models.decoder import Decoder, DecoderLayer
from respike.models.engine import Engine, engine_obstacle
from respike.models.spiking import spike_sites
from respike.ops.packed import pack

WEIGHTS = ("stored", "int8", "int4")
"""What linear layers may be rounded to: nothing, or integers."""

INT8_GROUPS = {"o_proj": 64, "gate_proj": 64, "up_proj": 64}
"""Weights and inputs that share a scale, where not 32: longer groups are faster. These cost the
least (SmolLM2: KL 0.0064 with 32 everywhere, 0.0070 with these, 0.0098 with 64 everywhere)."""

_FLOAT_KIND = {torch.float32: "f32", torch.bfloat16: "bf16"}


def pack_decoder(decoder: Decoder, weights: str = "stored") -> Decoder:
    """Pack every linear layer, in place, and give the decoder its engine.

    Layers behind neurons are packed already, and are only laid out for events. Embeddings keep
    their dtype. Where weights are rounded, so are the inputs of their layers, to int8 with a scale
    for each row and group: products are of integers then. With int4 the head is
    int8: it decides between tokens directly, and int4 there costs half as much again.

    Args:
        decoder: On a processor, in float32 or bfloat16. It cannot be trained afterwards.
        weights: One of `WEIGHTS`.

    Raises:
        BackendError: The engine cannot run it here.
        UnsupportedError: Unknown ``weights``, weights that cannot be rounded so, or a decoder
            that is packed already or whose spikes are emulated with float weights.
    """
    if weights not in WEIGHTS:
        raise UnsupportedError(f"weights {weights!r}", hint=f"one of {', '.join(WEIGHTS)}")
    if decoder.engine is not None:
        raise UnsupportedError("packing a decoder that is packed already")
    like = decoder.embedding
    obstacle = engine_obstacle(like.dtype, like.device)
    if obstacle is not None:
        raise BackendError(f"weights cannot be packed: {obstacle}")
    kind = _FLOAT_KIND[like.dtype] if weights == "stored" else weights
    behind_neurons = _behind_neurons(decoder)
    layers = [] if behind_neurons else list(_pack_layers(decoder, kind))
    head = like if decoder.lm_head is None else decoder.lm_head.weight
    assert isinstance(head, torch.Tensor)
    decoder.lm_head = _packed(head, None, "int8" if kind == "int4" else kind)
    gather_behind_neurons(behind_neurons)
    gather_packed([*layers, decoder.lm_head])
    decoder.engine = Engine(decoder.layers, decoder.frequencies)
    return decoder


def _behind_neurons(decoder: Decoder) -> list[list[SpikeLinear]]:
    """Of a decoder that spikes, the linear layers of each site; [] of any other.

    Raises:
        UnsupportedError: Some weights behind neurons are floats, or some sites have no neurons.
    """
    if not any(isinstance(m, SpikedLinear | SpikeLinear) for m in decoder.modules()):
        return []
    units = []
    for site in spike_sites(decoder):
        behind = [m for m in site.linears if isinstance(m, SpikeLinear)]
        if len(behind) < len(site.linears):
            raise UnsupportedError(
                f"packing layer {site.layer}, {site.name}: not integers behind neurons",
                hint="float weights are emulated",
            )
        units.append(behind)
    return units


def _pack_layers(decoder: Decoder, kind: str) -> Iterator[PackedLinear]:
    """Exchange the linear layers for packed ones, in the order they are read."""
    for layer in decoder.layers:
        for parent in _parents(layer):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    groups = INT8_GROUPS.get(name, 32) if kind == "int8" else 32
                    packed = _packed(linear.weight, linear.bias, kind, groups)
                    setattr(parent, name, packed)
                    yield packed


def _parents(layer: DecoderLayer) -> list[nn.Module]:
    """The modules whose linear layers are packed; routers and what is inside mixers are not."""
    parents: list[nn.Module] = [layer.self_attn]
    if layer.beside is not None:
        parents.append(layer.beside)
    if isinstance(layer.mlp, ExpertMLP):
        return [*parents, *layer.mlp.experts, *layer.mlp.shared_experts]
    return [*parents, layer.mlp]


def _packed(weight: Tensor, bias: Tensor | None, kind: str, group_size: int = 32) -> PackedLinear:
    rounded = kind in ("int8", "int4")
    packed = pack(weight.detach(), kind, group_size)
    return PackedLinear(packed, bias, "int8" if rounded else "exact")
