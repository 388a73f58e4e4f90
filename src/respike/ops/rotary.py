"""Rotary position embedding, with angles in float64.

At position 4e6 neighbouring float32 numbers are half a radian apart, so angles are formed in
float64 and only their cosine and sine are rounded. Pairs are (i, i + K/2): the "half rotation"
layout of Hugging Face checkpoints.

Letters: B batch, T tokens, H heads, K head dim, R = K / 2 frequencies.
Source: Su et al., arXiv:2104.09864; "llama3" scaling as in Llama 3.1's released configuration.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


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


def rotate(
    x: Float[Tensor, "B T H K"], cos: Float[Tensor, "B T R"], sin: Float[Tensor, "B T R"]
) -> Float[Tensor, "B T H K"]:
    """Turn each pair of channels by its angle; computed in float32, returned in the dtype of x."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
