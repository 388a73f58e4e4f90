"""RMSNorm over the last dimension.

Letters: D model width (or head dim); any leading dimensions.
Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467. Rounding order
as in Hugging Face's LlamaRMSNorm.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from respike.ops import backends

_KERNEL = {torch.float32: "rms_norm_f32", torch.bfloat16: "rms_norm_bf16"}


def rms_norm_definition(
    x: Float[Tensor, "*rows D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "*rows D"]:
    """Each row divided by its root mean square, then scaled: the definition.

    In float32, and rounded to the dtype of ``x`` before the weight is applied::

        y = weight * round(x / sqrt(mean(x^2) + eps))

    Args:
        x: Rows to normalise.
        weight: One factor per column.
        eps: Added to the mean square, so that a row of zeros stays zero.

    Returns:
        The scaled rows, in the dtype that ``weight`` and ``x`` promote to.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rms_norm(
    x: Float[Tensor, "*rows D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "*rows D"]:
    """RMSNorm by the fastest implementation that can run here.

    Same arguments and results as `rms_norm_definition`.

    Raises:
        ValueError: ``weight`` does not have one factor per column.
    """
    cols = x.shape[-1]
    if weight.shape != (cols,):  # a kernel would read past the end
        raise ValueError(f"weight has shape {tuple(weight.shape)}, x has {cols} columns")
    kernels = backends.choose("rms_norm", x, weight)
    if kernels is None:
        return rms_norm_definition(x, weight, eps)
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // cols if cols else 0
    kernel = getattr(kernels.module, _KERNEL[x.dtype])
    kernel(kernels.level, x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, cols, eps)
    return out
