"""The gate of the MLP, ``silu(gate) * up``, in one pass over memory.

Letters: F width of the MLP; any leading dimensions.
Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from respike.ops import backends

_KERNEL = {torch.float32: "swiglu_f32", torch.bfloat16: "swiglu_bf16"}


def swiglu_definition(
    gate: Float[Tensor, "*rows F"], up: Float[Tensor, "*rows F"]
) -> Float[Tensor, "*rows F"]:
    """``silu(gate) * up``, where ``silu(g) = g / (1 + exp(-g))``: the definition.

    silu is computed in float32 and rounded to the dtype of ``gate`` before the product.
    """
    return silu(gate) * up


def swiglu(
    gate: Float[Tensor, "*rows F"], up: Float[Tensor, "*rows F"]
) -> Float[Tensor, "*rows F"]:
    """SwiGLU by the fastest implementation that can run here.

    Same arguments and results as `swiglu_definition`. Halves of one tensor are read where they
    are. Gradients are written out, once; only ``gate`` and ``up`` are kept for them.

    Raises:
        ValueError: Shapes differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)}, up {tuple(up.shape)}")
    if backends.needs_gradient(gate, up):
        return _SwiGLU.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]
    return _swiglu(gate, up)


class _SwiGLU(torch.autograd.Function):
    """The op with its gradients."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate = d_up = None
        if ctx.needs_input_grad[0]:
            d_gate = torch.ops.aten.silu_backward((d_out * up).to(gate.dtype), gate)
        if ctx.needs_input_grad[1]:
            d_up = _swiglu(gate, d_out).to(up.dtype)
        return d_gate, d_up


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The op without gradients of its own."""
    kernels = backends.choose("swiglu", gate, up)
    if kernels is None:
        return swiglu_definition(gate, up)
    out = gate.new_empty(gate.shape)
    if out.numel() == 0:
        return out
    cols = gate.shape[-1]
    (gate, gate_stride), (up, up_stride) = _rows(gate, cols), _rows(up, cols)
    getattr(kernels.module, _KERNEL[gate.dtype])(
        kernels.level,
        torch.get_num_threads(),
        gate.data_ptr(),
        gate_stride,
        up.data_ptr(),
        up_stride,
        out.data_ptr(),
        out.numel() // cols,
        cols,
    )
    return out


def _rows(x: Tensor, cols: int) -> tuple[Tensor, int]:
    """Each row of x contiguous, copied only if it must be; and how far apart they are."""
    if x.is_contiguous():
        return x, cols
    rows = x.reshape(-1, cols)
    return (rows, rows.stride(0)) if rows.stride(1) == 1 else (rows.contiguous(), cols)
