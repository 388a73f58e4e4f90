"""Tensors in a file that ``torch.save`` wrote: looked at before it is opened, then mapped.

Only for families whose makers publish nothing else: such a file is a pickle in a zip archive.
Nothing in it runs. Its pickle may name what a state dict is made of and nothing more, which is
checked without unpickling; torch then unpickles with its own list of what is allowed.
"""

import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from respike.device import dtype_name
from respike.errors import CheckpointError

MAX_PICKLE_BYTES = 64 << 20
"""Names and shapes of a shard take kilobytes."""

ALLOWED = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch [A-Za-z0-9]+Storage"
)
"""What the pickle of a state dict names, module and name."""

NAMING = frozenset({"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})
"""Opcodes other than GLOBAL that name something; ``torch.save`` uses none of them."""


def torch_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type (as safetensors names it) of every tensor in a file; maps it, reads no data.

    Raises:
        CheckpointError: Not a file of tensors by name, or one that names anything else.
    """
    stored_bytes = _look(file)
    found, storages = {}, set()
    for name, value in _mapped(file, "not readable as tensors").items():
        if not isinstance(name, str):
            raise CheckpointError(f"{file}: {str(name)[:60]!r} is no tensor name")
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise CheckpointError(f"{file}: {name[:100]!r} is a {kind}, expected a tensor")
        found[name] = tuple(value.shape), dtype_name(value.dtype).upper()
        storage = value.untyped_storage()
        storages.add((storage.data_ptr(), storage.nbytes()))
    used_bytes = sum(size for _, size in storages)
    if used_bytes != stored_bytes:
        raise CheckpointError(
            f"{file}: its tensors take {used_bytes} bytes, it holds {stored_bytes}"
        )
    return found


def read_torch_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file, in its stored dtype; the file is mapped only during the call.

    Raises:
        CheckpointError: The file is not what it was when `torch_header` looked.
    """
    failed = f"tensor {name!r} cannot be read"
    value = _mapped(file, failed).get(name)
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{file}: {failed}: not there")
    return value.detach().clone(memory_format=torch.contiguous_format)


def _mapped(file: Path, failed: str) -> dict[object, object]:
    """What the file holds by name; ``failed`` begins the message if it cannot be had."""
    try:
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{file}: {failed}: {_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a {type(value).__name__}, expected tensors by name")
    return value


def _look(file: Path) -> int:
    """Bytes of data in a file; refuses a pickle that names anything but tensors, unrun."""
    try:
        pickled, stored_bytes = _contents(file)
        foreign = next(_foreign_names(pickled), None)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: named by the index, but not there") from None
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{file}: cut short, or not a file that torch.save of version 1.6 or later wrote"
        ) from None
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise CheckpointError(f"{file}: not readable as tensors: {_line(error)}") from None
    if foreign is not None:
        raise CheckpointError(
            f"{file}: its pickle names {foreign[:100]!r}, which is no part of a tensor; not opened"
        )
    return stored_bytes


def _contents(file: Path) -> tuple[bytes, int]:
    """The one pickle in an archive, and how many bytes of data are beside it."""
    with zipfile.ZipFile(file) as archive:
        parts = [p for p in archive.infolist() if p.filename.lower().endswith(".pkl")]
        if len(parts) != 1:
            raise ValueError(f"holds {len(parts)} pickles, expected one")
        if parts[0].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its pickle is larger than {MAX_PICKLE_BYTES >> 20} MiB")
        data = sum(p.file_size for p in archive.infolist() if "/data/" in p.filename)
        return archive.read(parts[0]), data


def _foreign_names(pickled: bytes) -> Iterator[str]:
    """What a pickle names beyond `ALLOWED`."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL" and not ALLOWED.fullmatch(str(argument)):
            yield str(argument)
        if opcode.name in NAMING:
            yield opcode.name


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
