"""Rotary position embedding, with angles in float64.

At position 4e6 neighbouring float32 numbers are half a radian apart, so angles are formed in
float64 and only their cosine and sine are rounded. Pairs are (i, i + K/2): the "half rotation"
layout of Hugging Face checkpoints.

Letters: B batch, T tokens, H heads, K head dim, R = K / 2 frequencies.
Source: Su et al., arXiv:2104.09864; "llama3" scaling as in Llama 3.1's released configuration.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from respike.ops import backends

_KERNEL = {torch.float32: "rotate_f32", torch.bfloat16: "rotate_bf16"}


def rotary_frequencies(head_dim: int, theta: float) -> Float[Tensor, " R"]:
    """Unscaled angular frequencies ``theta ** (-2 i / head_dim)``, radians per token, float64."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return theta**-exponent


def llama3_frequencies(
    frequencies: Float[Tensor, " R"],
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_tokens: int,
) -> Float[Tensor, " R"]:
    """Llama 3.1's scaling: long wavelengths are stretched, short ones kept, the middle blended.

    Args:
        frequencies: Unscaled, radians per token.
        factor: How much longer the context becomes.
        low_freq_factor: Wavelengths above ``original_tokens / low_freq_factor`` are stretched.
        high_freq_factor: Wavelengths below ``original_tokens / high_freq_factor`` are kept.
        original_tokens: Context length before scaling.
    """
    turns = original_tokens * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def rotary_tables(
    positions: Int[Tensor, "B T"], frequencies: Float[Tensor, " R"]
) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T R"]]:
    """Cosine and sine of every angle, float32."""
    angles = positions.to(torch.float64)[..., None] * frequencies.to(torch.float64)
    return angles.cos().float(), angles.sin().float()


def rotate_definition(
    x: Float[Tensor, "B T H K"], cos: Float[Tensor, "B T R"], sin: Float[Tensor, "B T R"]
) -> Float[Tensor, "B T H K"]:
    """Turn each pair of channels by its angle: the definition.

    Computed in float32, returned in the dtype of ``x``.

    Args:
        x: Queries or keys.
        cos: Of every angle, float32.
        sin: Of every angle, float32.
    """
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rotate(
    x: Float[Tensor, "B T H K"], cos: Float[Tensor, "B T R"], sin: Float[Tensor, "B T R"]
) -> Float[Tensor, "B T H K"]:
    """Turn each pair of channels by its angle, by the fastest implementation that can run here.

    Same arguments and results as `rotate_definition`; the gradient of ``x`` is turned back.

    Raises:
        ValueError: The tables do not fit ``x``, or a gradient of the tables is needed.
    """
    if backends.needs_gradient(cos, sin):
        raise ValueError("rotary tables have no gradient: angles follow from positions")
    if backends.needs_gradient(x):
        return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]
    return _turn(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """The op with its gradient: rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(d_out, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The op without gradients of its own."""
    kernels = backends.choose("rotate", x)
    if kernels is None:
        return rotate_definition(x, cos, sin)
    out = x.new_empty(x.shape)
    _rotate(kernels, _token_rows(x), cos, sin, out)
    return out


def rotate_(
    x: Float[Tensor, "B T H K"], cos: Float[Tensor, "B T R"], sin: Float[Tensor, "B T R"]
) -> None:
    """`rotate` in place: for queries and keys that nobody needs unrotated.

    Raises:
        ValueError: The tables do not fit ``x``.
    """
    kernels, rows = backends.choose("rotate", x), _token_rows(x)
    if kernels is None or rows is not x:
        x.copy_(rotate_definition(x, cos, sin))
    else:
        _rotate(kernels, x, cos, sin, x)


def _token_rows(x: Tensor) -> Tensor:
    """(B, T, H, K) if each token's heads lie together and tokens evenly apart; else a copy."""
    if x.is_contiguous():
        return x
    B, T, H, K = x.shape
    together = (x.stride(3) == 1 or K == 1) and (x.stride(2) == K or H == 1)
    even = B == 1 or T == 1 or x.stride(0) == T * x.stride(1)
    return x if together and even else x.contiguous()


def _rotate(kernels: backends.Kernels, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """The kernel, on tensors that `_token_rows` let pass."""
    B, T, H, K = x.shape
    tables = cos.contiguous(), sin.contiguous()
    for table in tables:
        fits = table.shape == (B, T, K // 2) and table.dtype == torch.float32
        if not fits or table.device != x.device:
            raise ValueError(f"a table is {table.dtype} {tuple(table.shape)}, x {tuple(x.shape)}")
    stride, out_stride = (t.stride(0) if T == 1 else t.stride(1) for t in (x, out))
    getattr(kernels.module, _KERNEL[x.dtype])(
        kernels.level,
        torch.get_num_threads(),
        x.data_ptr(),
        stride,
        *(t.data_ptr() for t in tables),
        out.data_ptr(),
        out_stride,
        B * T,
        H,
        K // 2,
    )
