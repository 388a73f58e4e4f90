"""Writing weights shard by shard: one shard in memory, whatever the model's size."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from respike.checkpoint.folder import INDEX
from respike.errors import UnsupportedError

SHARD_BYTES = 2 << 30
"""Largest weight file: bounds the memory a conversion needs."""


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Stream tensors into files of at most ``shard_bytes`` (a larger tensor has one to itself).

    Args:
        folder: Where to write.
        shapes: Name and shape of every tensor, in order.
        read: Gives one by its name; called once for each.
        dtype: To store.
        shard_bytes: See above.
        progress: Called with (tensors done, tensors).

    Returns:
        The files.
    """
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, shape in shapes.items():
        tensor_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + tensor_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor_bytes
        total += tensor_bytes
    files, home, done = [], {}, 0
    for number, names in enumerate(shards, start=1):
        stem = "model" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}"
        file = folder / f"{stem}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            # A copy: rows of a larger tensor would keep all of it in memory.
            tensors[name] = _narrowed(name, read(name), dtype).contiguous()
            home[name] = file.name
            done += 1
            if progress:
                progress(done, len(shapes))
        save_file(tensors, file, metadata={"format": "pt"})
        tensors.clear()
        file.chmod(0o666 & ~_umask())
        files.append(file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": home})
    return files


def _narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, which must be able to hold it."""
    found = tensor.to(dtype)
    if dtype == torch.float16 and bool((found.isinf() & tensor.isfinite()).any()):
        raise UnsupportedError(
            f"tensor `{name}` holds {float(tensor.abs().max()):.3g}, more than f16 can",
            hint="store it as bf16: --weights bf16",
        )
    return found


def _umask() -> int:
    """The process's umask, which safetensors does not follow."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, with a newline at its end."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
