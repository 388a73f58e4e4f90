"""How far a faster form may be from its definition: one table, the same everywhere, CI included."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Both figures are relative to what was expected, so they do not depend on its scale."""

    rms: float
    """RMS of the difference over RMS of the expected values."""
    max: float
    """Largest difference over the largest expected magnitude."""


TOLERANCES = {
    torch.float32: Tolerance(rms=1e-5, max=5e-5),
    torch.bfloat16: Tolerance(rms=5e-3, max=2e-2),
}


def differences(actual: Tensor, expected: Tensor) -> Tolerance:
    """How far apart two tensors are, in the units of the table; NaN where either has one."""
    a, e = actual.detach().double(), expected.detach().double()
    gap = (a - e).abs()
    if gap.numel() == 0 or gap.max() == 0:
        return Tolerance(0.0, 0.0)
    rms = gap.square().mean().sqrt() / e.square().mean().sqrt()
    return Tolerance(rms.item(), (gap.max() / e.abs().max()).item())
