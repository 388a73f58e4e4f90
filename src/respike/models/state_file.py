"""State files as files: safetensors, written piece by piece, with a checksum of everything in it.

The checksum stands in the metadata as ``sha256`` and is taken over the whole file with zeros in its
place. It finds what was altered by accident or by hand; it is no signature.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from respike.errors import DataError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
}
DIGEST = "sha256"
_ZEROS = "0" * 64
BLOCK_BYTES = 1 << 22


def write_file(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write atomically, readable by its owner only; equal contents give equal bytes.

    Needs memory for a copy of the largest tensor, if that is not in one piece.

    Args:
        path: The file; an existing one is replaced.
        tensors: By name, of the dtypes in `DTYPES`.
        notes: Metadata; ``sha256`` is added.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    head = _header(names, tensors, dict(notes) | {DIGEST: _ZEROS})
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    digest = hashlib.sha256(head)
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(head)
            for name in names:
                for block in _blocks(tensors[name]):
                    digest.update(block)
                    file.write(block)
            file.seek(head.rindex(_ZEROS.encode()))
            file.write(digest.hexdigest().encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _header(names: list[str], tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {}
    begin = 0
    for name in names:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    # The metadata goes last, so that the last run of zeros is the checksum's place.
    last = {key: notes[key] for key in (*sorted(set(notes) - {DIGEST}), DIGEST)}
    text = json.dumps(entries | {"__metadata__": last}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    if not tensor.numel():
        return
    data: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    for begin in range(0, len(data), BLOCK_BYTES):
        yield data[begin : begin + BLOCK_BYTES]


def read_notes(path: Path) -> dict[str, str]:
    """The metadata alone.

    Raises:
        DataError: Not a readable safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a readable state file: {error}") from error


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; the checksum is not looked at, see `check_digest`.

    Raises:
        DataError: Not a readable safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a readable state file: {error}") from error


def check_digest(path: Path, notes: Mapping[str, str]) -> None:
    """Read the file once more and compare it with its checksum.

    Raises:
        DataError: It was altered.
    """
    written = notes.get(DIGEST, "")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.read(8)
        head = file.read(struct.unpack("<Q", size)[0])
        place = head.rfind(written.encode()) if len(written) == len(_ZEROS) else -1
        digest.update(size)
        digest.update(head[:place] + _ZEROS.encode() + head[place + len(_ZEROS) :])
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    if place < 0 or digest.hexdigest() != written:
        raise DataError(
            f"{path}: its contents do not match its checksum; it was altered or damaged",
            hint="read the documents again with `respike read`",
        )
