"""Which implementation runs each op here, and why the others do not.

Every op has a ``torch`` form. Some have a ``native`` one too: a C++ kernel in ``respike._native``,
compiled at install, with a variant per instruction set (its level). Two environment variables,
read once, choose between them::

    RESPIKE_BACKEND=auto|torch|native                auto: native where it can; native: or an error
    RESPIKE_CPU=portable|avx2|avx512|avx512bf16|amx  highest level to use; default: the highest

`respike doctor` prints `table`.
"""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from respike.errors import BackendError, did_you_mean

MODULE = "respike._native"
BACKENDS = ("auto", "torch", "native")
LEVELS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
"""Instruction sets of the native kernels, ascending; a level's index is its number in C++."""

_AMX = ("amx-tile", "amx-bf16", "amx-int8")

_FLOATS = (torch.float32, torch.bfloat16)

NATIVE_OPS: dict[str, tuple[torch.dtype, ...]] = {
    "rms_norm": _FLOATS,
    "add_rms_norm": _FLOATS,
    "swiglu": _FLOATS,
    "rotate": _FLOATS,
    "packed_linear": _FLOATS,
    "search_int4": (torch.float32,),
    "softmax": _FLOATS,
    "softmax_gradient": _FLOATS,
    "gla": _FLOATS,
    "delta": _FLOATS,
    "recurrent_gradient": (torch.float32,),
    "far": _FLOATS,
    "far_gradient": _FLOATS,
    "keep": (torch.float32,),
    "attend_kept": _FLOATS,
    "attend_kept_gradient": _FLOATS,
    "blocks": _FLOATS,
    "blocks_gradient": _FLOATS,
    "fire": _FLOATS,
    "spike_linear": (torch.int32,),
}
"""Ops that have a native kernel, and the dtypes it takes."""


@dataclass(frozen=True)
class Backend:
    """One backend on this machine."""

    name: str
    available: bool
    reason: str
    """Why it can or cannot run, in words."""


@dataclass(frozen=True)
class Kernels:
    """The native kernels, ready to call: ``module.<op>_<dtype>(level, ...)``."""

    module: ModuleType
    level: int
    required: bool
    """RESPIKE_BACKEND=native: an op that cannot use them raises."""


@dataclass(frozen=True)
class Choice:
    """What runs one op, and why the other backends do not."""

    op: str
    backend: str
    level: str | None
    """Instruction set of the native kernel; None for torch."""
    others: dict[str, str]
    """Backend name to the reason it does not run, or not always."""


@cache
def _load_native() -> tuple[ModuleType | None, str]:
    """The extension, or None; and why."""
    if importlib.util.find_spec(MODULE) is None:
        return None, "not built: respike was installed with RESPIKE_NATIVE=0"
    try:
        module = importlib.import_module(MODULE)
    except ImportError as error:
        return None, f"built, but it does not import: {error}"
    return module, f"this processor can run {module.cpu_level()}"


def _from_environment(variable: str, known: tuple[str, ...], default: str) -> str:
    value = os.environ.get(variable) or default
    if value not in known:
        raise BackendError(
            f"{variable}={value!r} is not one of {', '.join(known)}",
            hint=did_you_mean(value, known),
        )
    return value


def native_status() -> Backend:
    """Whether the native kernels can run here, whatever was asked for."""
    module, reason = _load_native()
    return Backend("native", module is not None, reason)


def cpu_features() -> dict[str, bool]:
    """Instruction sets of this processor that kernels care about; empty without the extension."""
    module, _ = _load_native()
    return dict(module.cpu_features()) if module else {}


def amx_status() -> str:
    """Whether the AMX kernels run here; their authors had no processor to run them on.

    Raises:
        BackendError: The environment asks for what cannot run here.
    """
    never = "its authors could run it on a model only"
    features, ready = cpu_features(), kernels()
    if not features:
        return "not compiled"
    if ready is not None and LEVELS[ready.level] == "amx":
        return f"runs products of many rows; {never}, so compare RESPIKE_CPU=avx512bf16"
    missing = [name for name in _AMX if not features[name]]
    if missing:
        return f"compiled, not run on this processor (no {', '.join(missing)}); {never}"
    return f"compiled, not run: switched off, or refused by the system; {never}"


def _level(module: ModuleType) -> int:
    """Number of the level to use: the processor's highest, or the lower one asked for."""
    highest = LEVELS.index(module.cpu_level())
    level = LEVELS.index(_from_environment("RESPIKE_CPU", LEVELS, LEVELS[highest]))
    if level > highest:
        raise BackendError(
            f"RESPIKE_CPU={LEVELS[level]!r} is more than this processor can run",
            hint=f"its highest level is {LEVELS[highest]}; unset RESPIKE_CPU to use that",
        )
    return level


@cache
def kernels() -> Kernels | None:
    """The native kernels, or None when the torch forms are to be used everywhere.

    Raises:
        BackendError: The environment asks for what cannot run here.
    """
    backend = _from_environment("RESPIKE_BACKEND", BACKENDS, "auto")
    if backend == "torch":
        return None
    module, reason = _load_native()
    if module is not None:
        return Kernels(module, _level(module), required=backend == "native")
    if backend == "native":
        raise BackendError(
            f"RESPIKE_BACKEND=native, but the native kernels are {reason}",
            hint="install respike again with a C++17 compiler at hand, or unset RESPIKE_BACKEND",
        )
    return None


def choose(op: str, *tensors: Tensor, float32: Sequence[Tensor] = ()) -> Kernels | None:
    """The native kernels if they can run ``op`` on these tensors, else None: use the torch form.

    Args:
        op: One of `NATIVE_OPS`.
        tensors: Must share a dtype the kernel takes.
        float32: Others, which are float32 whatever that dtype is.

    Raises:
        BackendError: RESPIKE_BACKEND=native and they cannot.
    """
    ready = kernels()
    if ready is None:
        return None
    obstacle = _obstacle(op, tensors, float32)
    if obstacle is None:
        return ready
    if ready.required:
        raise BackendError(
            f"RESPIKE_BACKEND=native, but {op} cannot run natively: {obstacle}",
            hint="unset RESPIKE_BACKEND to let the torch form run where native cannot",
        )
    return None


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _obstacle(op: str, tensors: Sequence[Tensor], float32: Sequence[Tensor]) -> str | None:
    """Why the native kernel of ``op`` cannot take these tensors, or None when it can."""
    dtype = tensors[0].dtype
    if dtype not in NATIVE_OPS[op]:
        return f"no kernel for {dtype}"
    for tensor in tensors:
        if tensor.dtype != dtype:
            return f"its tensors mix {dtype} and {tensor.dtype}"
    for tensor in (*tensors, *float32):
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
        if needs_gradient(tensor):
            return "a gradient is needed, and kernels have none"
    return None


def table() -> list[Choice]:
    """For every op with a native kernel: what runs it here, and why the others do not.

    Raises:
        BackendError: The environment asks for what cannot run here.
    """
    ready = kernels()
    if ready is None:
        status = native_status()
        why = "RESPIKE_BACKEND=torch" if status.available else status.reason
        return [Choice(op, "torch", None, {"native": why}) for op in NATIVE_OPS]
    rows = []
    for op, dtypes in NATIVE_OPS.items():
        taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        why = f"runs only what native cannot: gradients, dtypes other than {taken}, other devices"
        if ready.required:
            why = "RESPIKE_BACKEND=native"
        rows.append(Choice(op, "native", LEVELS[ready.level], {"torch": why}))
    return rows
