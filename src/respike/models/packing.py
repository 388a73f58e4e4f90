"""From a decoder that can be trained to one that runs fast: packed weights and the engine."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from respike.errors import BackendError, UnsupportedError
from respike.layers.linear import PackedLinear, gather_behind_neurons, gather_packed
from respike.layers.spikes import SpikeLinear
from respike.models.decoder import Decoder
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
    sites = list(spike_sites(decoder))
    spiking = sites[0].neuron is not None
    if spiking and not isinstance(sites[0].linears[0], SpikeLinear):
        raise UnsupportedError("packing float weights behind neurons", hint="they are emulated")
    layers = [] if spiking else list(_pack_layers(decoder, kind))
    head = like if decoder.lm_head is None else decoder.lm_head.weight
    assert isinstance(head, torch.Tensor)
    decoder.lm_head = _packed(head, None, "int8" if kind == "int4" else kind)
    if spiking:
        units = [[m for m in site.linears if isinstance(m, SpikeLinear)] for site in sites]
        gather_behind_neurons(units)
    gather_packed([*layers, decoder.lm_head])
    decoder.engine = Engine(decoder.layers, decoder.frequencies)
    return decoder


def _pack_layers(decoder: Decoder, kind: str) -> Iterator[PackedLinear]:
    """Exchange the linear layers for packed ones, in the order they are read."""
    for layer in decoder.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    groups = INT8_GROUPS.get(name, 32) if kind == "int8" else 32
                    packed = _packed(linear.weight, linear.bias, kind, groups)
                    setattr(parent, name, packed)
                    yield packed


def _packed(weight: Tensor, bias: Tensor | None, kind: str, group_size: int = 32) -> PackedLinear:
    rounded = kind in ("int8", "int4")
    packed = pack(weight.detach(), kind, group_size)
    return PackedLinear(packed, bias, "int8" if rounded else "exact")
