"""Linear layers with packed weights, for few rows (decoding) and many (prefill).

Letters: O outputs, I inputs; any leading dimensions. The layout is that of `respike.ops.packed`.
Only weights are rounded; activations never are.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from respike.ops import backends
from respike.ops.packed import PackedWeight, unpack

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
    in_features, out_features = packed.in_features, packed.out_features
    shape = x.shape
    if shape[-1] != in_features:
        raise ValueError(f"x has {shape[-1]} columns, the weight {in_features} inputs")
    if packed.data.device != x.device:
        raise ValueError(f"x is on {x.device}, the packed weight on {packed.data.device}")
    kernels = backends.choose("packed_linear", x)
    if kernels is None:
        return packed_linear_definition(x, packed, bias)
    bias_address = 0 if bias is None else _bias_address(bias, x, out_features)
    x = x.contiguous()
    out = x.new_empty(*shape[:-1], out_features)
    getattr(kernels.module, _KERNEL[x.dtype])(
        kernels.level,
        torch.get_num_threads(),
        *packed.for_kernels,
        x.data_ptr(),
        bias_address,
        out.data_ptr(),
        x.numel() // in_features,
        in_features,
        out_features,
        packed.group_size,
    )
    return out


def _bias_address(bias: Tensor, x: Tensor, out_features: int) -> int:
    fits = bias.shape == (out_features,) and bias.dtype == torch.float32
    if not fits or not bias.is_contiguous() or bias.device != x.device:
        raise ValueError(f"bias is not {out_features} float32 numbers on {x.device}")
    return bias.data_ptr()
