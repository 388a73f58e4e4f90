"""What was not measured, from what was: least squares in relative error, never a negative part.

The time to a first token is ``a + b n + c n^2`` in the length n (c is there for softmax alone),
that of a decoding step ``a + b n``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

LEAST_POINTS = 3
"""Fewer say nothing about a shape."""

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Fit:
    """A polynomial in the length.

    Attributes:
        coefficients: Of 1, n, n^2 ...
        points: How many it was fitted to.
        largest_error_frac: Largest relative error at one of them.
    """

    coefficients: tuple[float, ...]
    points: int
    largest_error_frac: float

    def at(self, length: int) -> float:
        """Its value."""
        return math.fsum(c * float(length) ** i for i, c in enumerate(self.coefficients))


def fit(points: Points, power: int) -> Fit | None:
    """The polynomial of degree ``power`` with no negative coefficient that errs least.

    Args:
        points: (length, value) pairs, values above 0.
        power: 1 or 2.

    Returns:
        The fit, or None if there are fewer than three points.
    """
    if len(points) < LEAST_POINTS:
        return None
    x = torch.tensor([float(n) for n, _ in points], dtype=torch.float64)
    y = torch.tensor([value for _, value in points], dtype=torch.float64)
    largest = x.max()
    columns = torch.stack([(x / largest) ** i for i in range(power + 1)], 1) / y[:, None]
    best: tuple[float, torch.Tensor] | None = None
    # There are at most seven sets of terms, so try them all: least squares without a sign.
    for count in range(1, power + 2):
        for kept in combinations(range(power + 1), count):
            part = columns[:, list(kept)]
            found = torch.linalg.lstsq(part, torch.ones_like(y), driver="gelsd").solution
            if (found < 0).any():
                continue
            error = float((part @ found - 1).square().sum())
            if best is None or error < best[0] * (1 - 1e-9):
                whole = torch.zeros(power + 1, dtype=torch.float64)
                whole[list(kept)] = found
                best = error, whole
    assert best is not None  # a single term of positive values is never negative
    scaled = best[1] / largest ** torch.arange(power + 1)
    errors = (columns @ best[1] - 1).abs()
    return Fit(tuple(scaled.tolist()), len(points), float(errors.max()))


def predicted_seconds(known: Points, length: int, *, grows: bool = True) -> float:
    """Seconds at ``length`` by the power law through the last two (length, seconds); 0 if unknown.

    The power is held between 1 and 2: prefill is linear at best and quadratic at worst. With one
    point it is the worst, or the best where no cache ``grows``.
    """
    if not known:
        return 0.0
    power, (tokens, seconds) = 2.0 if grows else 1.0, known[-1]
    if len(known) > 1:
        before, took = known[-2]
        found = math.log(seconds / took) / math.log(tokens / before)
        power = min(2.0, max(1.0, found))
    return seconds * math.pow(length / tokens, power)
