"""Asserting that a faster form is close enough to its definition; the table is the library's."""

import torch
from torch import Tensor

from respike.ops.tolerance import TOLERANCES, Tolerance, differences

__all__ = ["TOLERANCES", "Tolerance", "assert_close", "differences"]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Fails unless both are equal within the table's row for ``dtype`` (None: that of expected)."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    dtype = dtype or expected.dtype
    allowed, got = TOLERANCES[dtype], differences(actual, expected)
    text = (
        f"relative RMS {got.rms:.3g} (allowed {allowed.rms:.3g}), "
        f"relative max {got.max:.3g} (allowed {allowed.max:.3g}), {dtype}"
    )
    print(text)  # noqa: T201 - shown by pytest when the test fails
    assert got.rms <= allowed.rms and got.max <= allowed.max, text  # noqa: PT018 - one message
