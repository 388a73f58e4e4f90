"""What tests of native kernels share: the extension, the levels to run, a way to choose one."""

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
def _environment(**variables: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        backends.kernels.cache_clear()
        try:
            yield
        finally:
            backends.kernels.cache_clear()


def at_level(level: int) -> AbstractContextManager[None]:
    """Ops must run natively, at ``level``, until the end of the block."""
    return _environment(RESPIKE_BACKEND="native", RESPIKE_CPU=backends.LEVELS[level])


def at_torch() -> AbstractContextManager[None]:
    """Ops run in torch until the end of the block."""
    return _environment(RESPIKE_BACKEND="torch")
