"""Where a figure comes from: command, commit, date, machine, versions; and how fast memory is."""

import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from respike.ops import backends

ROOT = Path(__file__).resolve().parents[3]
"""Of the repository, if this is one."""
READ_BYTES = 256 << 20
"""Far more than any cache, but not too much for a small machine."""
READ_ROUNDS = 5


def processor() -> str:
    """Its name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def l3_bytes() -> int | None:
    """Size of the last cache before memory, where the system tells."""
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = file.read_text(encoding="ascii").strip() if file.exists() else ""
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
    digits = text.rstrip("KM")
    return int(digits) * unit if digits.isdigit() else None


def commit() -> str:
    """Of the repository this runs from, or "unknown" of an installed package."""
    if not (ROOT / ".git").exists():
        return "unknown"
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return "unknown"
    return found or "unknown"


def provenance() -> dict[str, Any]:
    """To stand at the top of every result file."""
    program, *words = sys.argv
    called = ["respike"] if Path(program).stem in ("respike", "__main__") else ["python", program]
    return {
        "command": shlex.join([*called, *words]),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {
            "processor": processor(),
            "system": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "cpu_features": sorted(k for k, v in backends.cpu_features().items() if v),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "respike": version("respike"),
        },
    }


def kernel_names() -> dict[str, str]:
    """Op -> what runs it here; every op not named is torch."""
    return {c.op: f"{c.backend} {c.level or ''}".strip() for c in backends.table()}


def read_bytes_per_second(threads: int) -> float:
    """How fast this machine can read memory that is in no cache: the best of a few rounds.

    The best, as it is a bound that all else only lowers. By the native kernel where it is built,
    else by torch's sum, which may be slower.
    """
    words = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    ready = backends.kernels()
    if ready is None:
        times = [_seconds(words.sum) for _ in range(READ_ROUNDS)]
        return words.nbytes / min(times)
    module, parts = ready.module, words.chunk(threads)

    def read(part: torch.Tensor) -> None:
        module.read_all(part.data_ptr(), part.numel())

    with ThreadPoolExecutor(threads) as pool:
        times = [_seconds(lambda: list(pool.map(read, parts))) for _ in range(READ_ROUNDS)]
    return words.nbytes / min(times)


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
