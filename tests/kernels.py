"""What tests of native kernels share: the extension, the levels to run, a way to choose one."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from respike.ops import backends

native = pytest.mark.skipif(
    not backends.native_status().available, reason=backends.native_status().reason
)


def extension() -> ModuleType:
    return importlib.import_module(backends.MODULE)


def levels() -> list[int]:
    """Numbers of the levels this processor can run, whatever RESPIKE_CPU says."""
    if not backends.native_status().available:
        return []
    return list(range(backends.LEVELS.index(extension().cpu_level()) + 1))


each_level = pytest.mark.parametrize("level", levels(), ids=lambda i: backends.LEVELS[i])


@contextmanager
def at_level(level: int) -> Iterator[None]:
    """Ops must run natively, at ``level``, until the end of the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESPIKE_BACKEND", "native")
        patch.setenv("RESPIKE_CPU", backends.LEVELS[level])
        backends.kernels.cache_clear()
        try:
            yield
        finally:
            backends.kernels.cache_clear()
