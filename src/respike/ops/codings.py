"""Codings: spike counts as trains of spikes over time steps, and back, without loss.

Letters: T time steps; any shape of counts.
Source: SpikingBrain's Int2Spike (arXiv:2509.05276, section 3), without its faults: decoding needs
the train and nothing else, zero points are numbers that the caller states, and every integer in
range is exact, -2^n and all zeros included::

    coding           a count x becomes                            steps          weight of step t
    binary           1 in the first x steps; x >= 0               x              1
    ternary          its sign in the first |x| steps              |x|            1
    bitwise          its bits, highest first; x >= 0              bits of x      2^(T-1-t)
    signed-bitwise   the bits of |x|, each with its sign          bits of |x|    2^(T-1-t)
    twos-complement  its T bits; the first weighs -2^(T-1)        bits + 1       2^(T-1-t)

A zero point shifts counts before they are encoded: codings without a sign take what is negative
that way.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

Coding = Literal["binary", "ternary", "bitwise", "signed-bitwise", "twos-complement"]

CODINGS: tuple[Coding, ...] = get_args(Coding)

UNSIGNED = ("binary", "bitwise")
"""Codings that need a zero point for negative counts."""

COUNTING = ("binary", "ternary")
"""Codings in which every spike weighs the same."""


def code_range(coding: Coding, steps: int) -> tuple[int, int]:
    """Smallest and largest count that ``steps`` time steps can carry."""
    if coding == "twos-complement":
        return -(1 << steps - 1), (1 << steps - 1) - 1
    largest = steps if coding in COUNTING else (1 << steps) - 1
    return (0 if coding in UNSIGNED else -largest), largest


def code_steps(low: int, high: int, coding: Coding) -> int:
    """Fewest time steps, at least one, that carry every count from ``low`` to ``high``.

    Raises:
        ValueError: ``low`` is negative and the coding has no sign.
    """
    if coding in UNSIGNED and low < 0:
        raise ValueError(f"{coding} spikes have no sign, got {low}: state a zero point")
    if coding in COUNTING:
        return max(1, high, -low)
    if coding == "twos-complement":
        return 1 + max(max(high, 0).bit_length(), max(-low - 1, 0).bit_length())
    return max(1, high.bit_length(), low.bit_length())


def encode(
    counts: Int[Tensor, "*n"], coding: Coding, steps: int, zero_point: int = 0
) -> Int[Tensor, "T ..."]:
    """Spikes -1, 0 or 1 of each time step, int8.

    Args:
        counts: Integers.
        coding: How.
        steps: T, at most 62 for the codings by bits.
        zero_point: Taken off every count first.

    Raises:
        ValueError: A count less the zero point is not in `code_range`.
    """
    values = counts.long() - zero_point
    low, high = code_range(coding, steps)
    if values.numel() and not (int(values.min()) >= low and int(values.max()) <= high):
        raise ValueError(
            f"{coding} spikes in {steps} steps carry {low} to {high}, "
            f"got {int(values.min())} to {int(values.max())} beyond the zero point {zero_point}"
        )
    time = torch.arange(steps, device=counts.device).view(-1, *[1] * counts.dim())
    if coding in COUNTING:
        return ((time < values.abs()) * values.sign()).to(torch.int8)
    if coding == "twos-complement":
        return ((values >> (steps - 1 - time)) & 1).to(torch.int8)
    return (((values.abs() >> (steps - 1 - time)) & 1) * values.sign()).to(torch.int8)


def decode(spikes: Int[Tensor, "T ..."], coding: Coding, zero_point: int = 0) -> Int[Tensor, "*n"]:
    """The counts that `encode` was given, int64."""
    steps = len(spikes)
    weights = torch.ones(steps, dtype=torch.int64, device=spikes.device)
    if coding not in COUNTING:
        weights = weights << torch.arange(steps - 1, -1, -1, device=spikes.device)
    if coding == "twos-complement":
        weights[0] = -weights[0]
    return (spikes.long() * weights.view(-1, *[1] * (spikes.dim() - 1))).sum(0) + zero_point


def num_events(
    counts: Int[Tensor, "*n"], coding: Coding, steps: int, zero_point: int = 0
) -> Int[Tensor, "*n"]:
    """Spikes, of either sign, that `encode` makes of each count, int64, without making them."""
    values = counts.long() - zero_point
    if coding in COUNTING:
        return values.abs()
    bits = values & ((1 << steps) - 1) if coding == "twos-complement" else values.abs()
    return sum(((bits >> t) & 1 for t in range(steps)), torch.zeros_like(bits))


def window_spikes(
    counts: Int[Tensor, "*n"], windows: int = 3, window_steps: int = 3
) -> Int[Tensor, "w ..."]:
    """Spikes in each window of ``window_steps`` signed-bitwise steps, lowest bits first, int64.

    SpikingBrain-1.0's "sparsity" of 69.15 % agrees with the share of empty windows when each count
    is written in 3 windows of 3 steps. High windows are nearly always empty, so that share is a
    property of the number format more than of the model. Bits beyond the windows are left out.
    """
    bits = counts.long().abs()
    spikes = torch.stack([(bits >> t) & 1 for t in range(windows * window_steps)])
    return spikes.view(windows, window_steps, *counts.shape).sum(1)
