"""RMSNorm over the last dimension, alone and after the addition that comes before it.

Letters: D model width (or head dim); any leading dimensions.
Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467. Rounding order
as in Hugging Face's LlamaRMSNorm.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from respike.ops import backends

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


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

    Same arguments and results as `rms_norm_definition`; gradients are written out, once.

    Raises:
        ValueError: ``weight`` does not have one factor per column.
    """
    cols = x.shape[-1]
    if weight.shape != (cols,):  # a kernel would read past the end
        raise ValueError(f"weight has shape {tuple(weight.shape)}, x has {cols} columns")
    if backends.needs_gradient(x, weight):
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]
    return _rms_norm(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """The op with its gradients; keeps only its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_out, x32 = d_out.float(), x.float()
        inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + ctx.eps)
        normed = x32 * inverse
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_normed = d_out * weight.float()
            along = (d_normed * normed).mean(-1, keepdim=True)
            d_x = d_normed.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows = tuple(range(x.dim() - 1))
            d_weight = (d_out * normed).sum(rows) if rows else d_out * normed
            d_weight = d_weight.to(weight.dtype)
        return d_x, d_weight, None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The op without gradients of its own."""
    kernels = backends.choose("rms_norm", x, weight)
    if kernels is None:
        return rms_norm_definition(x, weight, eps)
    cols = x.shape[-1]
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // cols if cols else 0
    kernel = getattr(kernels.module, f"rms_norm_{_SUFFIX[x.dtype]}")
    pointers = [t.data_ptr() for t in (x, weight, out)]
    kernel(kernels.level, torch.get_num_threads(), *pointers, rows, cols, eps)
    return out


def add_rms_norm_definition(
    x: Float[Tensor, "*rows D"],
    residual: Float[Tensor, "*rows D"],
    weight: Float[Tensor, " D"],
    eps: float,
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows D"]]:
    """The residual stream after a layer's output ``x``, normalised for the next: the definition.

    Args:
        x: What a layer adds.
        residual: The stream before it.
        weight: As for `rms_norm_definition`.
        eps: As for `rms_norm_definition`.

    Returns:
        The norm of the sum, and the sum.
    """
    total = x + residual
    return rms_norm_definition(total, weight, eps), total


def add_rms_norm(
    x: Float[Tensor, "*rows D"],
    residual: Float[Tensor, "*rows D"],
    weight: Float[Tensor, " D"],
    eps: float,
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows D"]]:
    """Addition and RMSNorm in one pass, by the fastest implementation that can run here.

    Same arguments and results as `add_rms_norm_definition`.

    Raises:
        ValueError: Shapes differ.
    """
    cols = x.shape[-1]
    if weight.shape != (cols,) or residual.shape != x.shape:
        shapes = f"{tuple(x.shape)}, {tuple(residual.shape)}, {tuple(weight.shape)}"
        raise ValueError(f"x, residual and weight do not fit together: {shapes}")
    kernels = backends.choose("add_rms_norm", x, residual, weight)
    if kernels is None:
        return add_rms_norm_definition(x, residual, weight, eps)
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    pointers = [t.data_ptr() for t in (x, residual, weight, total, out)]
    rows = x.numel() // cols if cols else 0
    kernel = getattr(kernels.module, f"add_rms_norm_{_SUFFIX[x.dtype]}")
    kernel(kernels.level, torch.get_num_threads(), *pointers, rows, cols, eps)
    return out, total
