"""Linear layers with packed weights, for few rows (decoding) and many (prefill).

Letters: O outputs, I inputs; any leading dimensions. The layout is that of `respike.ops.packed`.
Only weights are rounded; activations never are.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from respike.ops import backends
from respike.ops.packed import KINDS, PackedWeight, unpack

_KERNEL = {torch.float32: "packed_linear_f32", torch.bfloat16: "packed_linear_bf16"}


def packed_linear_definition(
    x: Float[Tensor, "*rows I"], packed: PackedWeight, bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*rows O"]:
    """``x @ weight.T + bias``, in float32 and rounded once to the dtype of ``x``: the definition.

    Args:
        x: Rows.
        packed: The weight (O, I).
        bias: Float32; None has none.
    """
    return linear(x.float(), unpack(packed), bias).to(x.dtype)


def packed_linear(
    x: Float[Tensor, "*rows I"], packed: PackedWeight, bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*rows O"]:
    """A packed linear layer by the fastest implementation that can run here.

    Same arguments and results as `packed_linear_definition`. The bits do not depend on the number
    of threads.

    Raises:
        ValueError: ``x``, ``packed`` and ``bias`` do not fit together.
    """
    rows, out_features = x.shape[:-1], packed.out_features
    if x.shape[-1] != packed.in_features:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {packed.in_features} inputs")
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != torch.float32):
        raise ValueError(f"bias is not {out_features} float32 numbers")
    if packed.scales is not None and packed.scales.dtype != torch.float16:
        raise ValueError(f"scales are {packed.scales.dtype}, not float16")
    buffers = [t for t in (packed.data, packed.scales, bias) if t is not None]
    if any(t.device != x.device for t in buffers):
        raise ValueError(f"x is on {x.device}, the packed weight on {packed.data.device}")
    kernels = backends.choose("packed_linear", x)
    if kernels is None:
        return packed_linear_definition(x, packed, bias)
    assert all(t.is_contiguous() for t in buffers)
    x = x.contiguous()
    out = x.new_empty(*rows, out_features)
    getattr(kernels.module, _KERNEL[x.dtype])(
        kernels.level,
        torch.get_num_threads(),
        KINDS.index(packed.kind),
        x.data_ptr(),
        packed.data.data_ptr(),
        0 if packed.scales is None else packed.scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows.numel(),
        packed.in_features,
        out_features,
        packed.group_size,
    )
    return out
