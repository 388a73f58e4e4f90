"""Where a course of healing stands, on disk: small, atomic, and enough to go on bit for bit.

A folder ``step-N`` holds ``state.safetensors`` (masters, moments, the average, the best weights)
and ``state.json`` (stage, step, loader, ledger, scores). A folder is renamed into place when it is
whole; the one before is removed after that.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from respike.errors import DataError

FORMAT = 1


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], facts: Any) -> None:
    """Write a checkpoint below ``folder``; the older ones go when it is safe."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    staging = folder / f".{target.name}.partial"
    for left in folder.glob(".step-*.partial"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    try:
        staging.mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, staging / "state.safetensors")
        text = json.dumps({"format": FORMAT, "facts": facts})
        (staging / "state.json").write_text(text + "\n", encoding="utf-8")
        for name in ("state.safetensors", "state.json"):
            with (staging / name).open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{target}: cannot be written: {reason}") from error
    for old in sorted(folder.glob("step-*")):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], Any] | None:
    """The newest checkpoint below ``folder``, or None.

    Raises:
        DataError: It is damaged, or of another version.
    """
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    if not found:
        return None
    newest = found[-1]
    try:
        stored = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise DataError(f"{newest}: format {stored['format']}, expected {FORMAT}")
        with safe_open(newest / "state.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(
            f"{newest}: not a checkpoint of a healing: {error}",
            hint=f"remove {folder} to begin again",
        ) from None
    return tensors, stored["facts"]
