"""From a decoder that can be trained to one that runs fast: packed weights and the engine."""

import torch
from torch import Tensor, nn

from respike.errors import BackendError, UnsupportedError
from respike.layers.linear import PackedLinear, gather_packed
from respike.models.decoder import Decoder
from respike.models.engine import Engine, engine_obstacle
from respike.ops.packed import pack

WEIGHTS = ("stored", "int8", "int4")
"""What linear layers may be rounded to: nothing, or integers."""

GROUP_SIZES = {"int8": 32, "int4": 32}
"""Inputs that share a scale."""

_FLOAT_KIND = {torch.float32: "f32", torch.bfloat16: "bf16"}


def pack_decoder(decoder: Decoder, weights: str = "stored") -> Decoder:
    """Pack every linear layer, in place, and give the decoder its engine.

    Embeddings keep their dtype. Where weights are rounded, so are the inputs of their layers, to
    int8 with a scale for each row and group: products are of integers then. With int4 the head is
    int8: it decides between tokens directly, and int4 there costs half as much again.

    Args:
        decoder: On a processor, in float32 or bfloat16. It cannot be trained afterwards.
        weights: One of `WEIGHTS`.

    Raises:
        BackendError: The engine cannot run it here.
        UnsupportedError: Unknown ``weights``, weights that cannot be rounded so, or a decoder
            that is packed already.
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
    for layer in decoder.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, _packed(linear.weight, linear.bias, kind))
    head = like if decoder.lm_head is None else decoder.lm_head.weight
    assert isinstance(head, torch.Tensor)
    decoder.lm_head = _packed(head, None, "int8" if kind == "int4" else kind)
    gather_packed(decoder)
    decoder.engine = Engine(decoder.layers, decoder.frequencies)
    return decoder


def _packed(weight: Tensor, bias: Tensor | None, kind: str) -> PackedLinear:
    group_size = GROUP_SIZES.get(kind, 32)
    packed = pack(weight.detach(), kind, group_size)
    return PackedLinear(packed, bias, "int8" if kind in GROUP_SIZES else "exact")
