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


def _product_levels() -> list[object]:
    """`levels`; amx, skipped where there is none; and amx on a model of its tiles."""
    found: list[object] = list(levels())
    amx = backends.LEVELS.index("amx")
    if found and amx not in found:
        found.append(pytest.param(amx, marks=pytest.mark.skip(reason="no AMX here")))
    if backends.LEVELS.index("avx512bf16") in found:
        found.append(extension().amx_model)
    return found


def level_name(level: int) -> str:
    return backends.LEVELS[level] if level < len(backends.LEVELS) else "amx-model"


each_level = pytest.mark.parametrize("level", levels(), ids=level_name)
each_product_level = pytest.mark.parametrize("level", _product_levels(), ids=level_name)
"""Of products of many rows, which have a kernel for AMX."""


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


@contextmanager
def at_level(level: int) -> Iterator[None]:
    """Ops must run natively, at ``level``, until the end of the block."""
    with _environment(RESPIKE_BACKEND="native"), pytest.MonkeyPatch.context() as patch:
        if level < len(backends.LEVELS):
            patch.setenv("RESPIKE_CPU", backends.LEVELS[level])
        else:  # the model of amx, which nobody can ask for
            patch.setattr(backends, "_level", lambda _: level)
        yield


def at_torch() -> AbstractContextManager[None]:
    """Ops run in torch until the end of the block."""
    return _environment(RESPIKE_BACKEND="torch")
