"""Where a figure comes from: command, commit, date, machine, versions."""

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from respike.ops import backends


def processor() -> str:
    """Its name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """To stand at the top of every result file."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit or "unknown",
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
