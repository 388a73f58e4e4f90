"""The one place that knows devices by name: where tensors live, which dtypes, how many threads.

Nothing else in the package may mention a device or a vendor (``scripts/check_devices.py`` enforces
it). Devices come from PyTorch's vendor-neutral accelerator interface, so a chip with a PyTorch
backend needs no change here.
"""

import os
from importlib.metadata import distributions

import torch

from respike.errors import BackendError, did_you_mean

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
"""Names used in recipes and on the command line."""


def available_devices() -> list[str]:
    """Device names that can run here; the processor is always first."""
    devices = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        devices += [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]
    return devices


def get_device(name: str = "cpu") -> torch.device:
    """The torch device called ``name``; ``auto`` takes an accelerator if there is one.

    Raises:
        BackendError: It does not exist on this machine.
    """
    devices = available_devices()
    if name == "auto":
        return torch.device(devices[-1 if len(devices) == 1 else 1])
    if name not in devices and f"{name}:0" not in devices:
        raise BackendError(
            f"device {name!r} is not on this machine, which has {', '.join(devices)}",
            hint="run `respike doctor` to see what can run here",
        )
    return torch.device(name)


def get_dtype(name: str) -> torch.dtype:
    """The torch dtype called ``name`` (f32, bf16, f16).

    Raises:
        BackendError: Unknown name.
    """
    if name not in DTYPES:
        raise BackendError(
            f"dtype {name!r} is not one of {', '.join(DTYPES)}", hint=did_you_mean(name, DTYPES)
        )
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Our short name of a torch dtype, or torch's own for one we do not compute in."""
    names = {value: name for name, value in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def compute_dtype() -> str:
    """The short name of the dtype that this machine trains in fastest: bf16 or f32.

    A processor that does not multiply bf16 emulates it: four times slower than f32 (docs/log.md).
    """
    if torch.accelerator.is_available():
        return "bf16"
    able = torch.cpu.get_capabilities()
    return "bf16" if any(map(able.get, ("avx512_bf16", "amx_bf16", "bf16"))) else "f32"


def set_threads(num_threads: int | None) -> int:
    """Use ``num_threads`` threads (None: all cores this process may run on); returns the number."""
    if num_threads is None:
        num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        num_threads = num_threads or os.cpu_count() or 1
    torch.set_num_threads(num_threads)
    return num_threads


def vendor_packages() -> list[str]:
    """Installed packages that hold an accelerator's libraries; none belongs to a CPU build."""
    names = {d.name for d in distributions()}
    return sorted(n for n in names if n.startswith(("nvidia-", "triton")))


def build_of_torch() -> str:
    """Which build of torch is installed: for the processor alone, or for an accelerator."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    if getattr(torch.version, "hip", None):
        return f"ROCm {torch.version.hip}"
    return "processor only"
