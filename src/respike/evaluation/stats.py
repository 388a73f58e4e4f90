"""Intervals: every figure that comes from a sample is printed with one."""

import math
from statistics import NormalDist

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
    # The ends are 0 and 1 there, but for rounding.
    return centre - half if successes else 0.0, centre + half if successes < trials else 1.0


def student_t95(freedom: int) -> float:
    """97.5 % point of Student's t, from 3 degrees on within 1 % (Abramowitz & Stegun 26.7.5)."""
    z = Z95
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / float(freedom) ** power for power, term in enumerate(terms))


def mean_interval(values: Tensor, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of independent units, percentiles widened for few.

    Plain percentiles of eight units hold the mean 88 times in 100. These are further out: as far as
    Student's t is beyond the normal, and by what a sample's own spread is too small (Hesterberg,
    "What Teachers Should Know about the Bootstrap", 2015, section 5.3).

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
    wider = math.sqrt(len(values) / (len(values) - 1)) * student_t95(len(values) - 1)
    cut = int(NormalDist().cdf(-wider) * resamples)
    return float(means[cut]), float(means[-1 - cut])


def paired_interval(differences: Tensor) -> tuple[float, float]:
    """95 % interval of the mean difference of scores in 0..1 that belong together.

    Where no pair differs from another a bootstrap sees no spread: then as many may differ, by 1, as
    `wilson` allows of none among so many.
    """
    first = float(differences[0])
    if (differences != first).any():
        return mean_interval(differences)
    some = wilson(0, len(differences))[1]
    return max(-1.0, first - some), min(1.0, first + some)
