"""Intervals: every figure that comes from a sample is printed with one."""

import math

import torch
from torch import Tensor

Z95 = 1.959964


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927); sound for few trials and for 0 or all."""
    if trials == 0:
        return 0.0, 1.0
    p, z2 = successes / trials, Z95**2 / trials
    centre = (p + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Tensor, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of independent units.

    Args:
        values: One value a unit (a context, a trial), not a token: tokens of one context are not
            independent.
        resamples: Bootstrap samples.
        seed: Of the resampling.
    """
    if len(values) < 2:
        return float(values.mean()), float(values.mean())
    draw = torch.Generator().manual_seed(seed)
    index = torch.randint(len(values), (resamples, len(values)), generator=draw)
    means = values.double()[index].mean(1).sort().values
    return float(means[int(0.025 * resamples)]), float(means[int(0.975 * resamples) - 1])
