"""Read one GGUF file: its metadata, its tensors as float32, and the `ModelConfig` they describe.

The header is walked here and not by `gguf.GGUFReader`, which is slow and believes every count it
reads. Nothing is allocated before the bytes that back it are known to be in the file, and nothing
but the tensor asked for is read from the data section.

Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from respike.checkpoint.gguf_config import gguf_config, gguf_tensor_map, unpermute
from respike.config import ModelConfig
from respike.errors import CheckpointError, UnsupportedError, did_you_mean

__all__ = ["GgufFile", "GgufTensor", "gguf_config", "gguf_tensor_map", "read_as"]

VERSIONS = (2, 3)
MAX_TENSORS = 1 << 18
MAX_KEYS = 1 << 16
MAX_DIMS = 4
MAX_NAME_BYTES = 1 << 12
MAX_TEXT_BYTES = 1 << 24
MAX_ARRAY_ITEMS = 1 << 24
MAX_ALIGNMENT = 1 << 20

SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
"""Struct code of each scalar value type; numpy reads the same codes."""

CASTS = {
    GGMLQuantizationType.I8: "<i1",
    GGMLQuantizationType.I16: "<i2",
    GGMLQuantizationType.I32: "<i4",
    GGMLQuantizationType.I64: "<i8",
    GGMLQuantizationType.F64: "<f8",
    GGMLQuantizationType.F32: "<f4",
    GGMLQuantizationType.F16: "<f2",
}
"""Tensor types that are plain numbers; the rest goes through `gguf.quants`."""


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies: ``shape`` in torch order, ``offset`` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int


class _Cursor:
    """Walks the header; every step is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def take(self, num_bytes: int, what: str) -> int:
        """Step over ``num_bytes`` and return where they start."""
        start = self.at
        if num_bytes > len(self.data) - start:
            raise self.fail(
                f"{what} needs {num_bytes} bytes at byte {start}, "
                f"but the file ends at byte {len(self.data)}; it is truncated or corrupt"
            )
        self.at = start + num_bytes
        return start

    def number(self, code: str, what: str) -> Any:
        start = self.take(struct.calcsize(f"<{code}"), what)
        if code == "?" and self.data[start] > 1:
            raise self.fail(f"{what} is a bool of value {self.data[start]}, expected 0 or 1")
        return struct.unpack_from(f"<{code}", self.data, start)[0]

    def count(self, code: str, what: str, most: int) -> int:
        value = int(self.number(code, what))
        if value > most:
            raise self.fail(f"{what} is {value}, expected at most {most}")
        return value

    def text(self, what: str, most: int) -> str:
        size = self.count("Q", f"the length of {what}", most)
        start = self.take(size, what)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8 (at byte {start})") from None

    def texts(self, count: int, what: str) -> list[str]:
        """``count`` strings: the one loop whose speed is felt (300,000 turns for Qwen)."""
        data, end, at = self.data, len(self.data), self.at
        length = struct.Struct("<Q").unpack_from
        out = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length(data, at)[0]
                if at > end:
                    raise self.fail(f"{what} runs past the end of the file; it is truncated")
                out.append(data[start:at].decode())
        except struct.error:
            raise self.fail(f"{what} runs past the end of the file; it is truncated") from None
        except UnicodeDecodeError:
            raise self.fail(f"item {len(out)} of {what} is not UTF-8") from None
        self.at = at
        return out

    def value_type(self, what: str) -> GGUFValueType:
        value = self.number("I", f"the type of {what}")
        try:
            return GGUFValueType(value)
        except ValueError:
            raise self.fail(f"{what} has value type {value}, expected 0 to 12") from None

    def value(self, what: str) -> Any:
        kind = self.value_type(what)
        if kind is GGUFValueType.STRING:
            return self.text(what, MAX_TEXT_BYTES)
        if kind is not GGUFValueType.ARRAY:
            return self.number(SCALARS[kind], what)
        item = self.value_type(f"the items of {what}")
        if item is GGUFValueType.ARRAY:
            raise self.fail(f"{what} is an array of arrays, which no model needs")
        count = self.count("Q", f"the length of {what}", MAX_ARRAY_ITEMS)
        if item is GGUFValueType.STRING:
            if count * 8 > len(self.data) - self.at:
                raise self.fail(f"{what} claims {count} strings, more than the file can hold")
            return self.texts(count, what)
        return self.array(SCALARS[item], count, what)

    def array(self, code: str, count: int, what: str) -> NDArray[Any]:
        start = self.take(count * struct.calcsize(f"<{code}"), what)
        values: NDArray[Any] = np.frombuffer(self.data, f"<{code}", count, start).copy()
        return values


class GgufFile:
    """An open GGUF file: ``metadata`` and ``tensors`` at once, tensor data when `read`.

    Args:
        path: The file. It must not change while this object lives: its pages are mapped.

    Raises:
        CheckpointError: The file is missing, truncated, corrupt or hostile.
        UnsupportedError: A GGUF version or tensor type this version does not know.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as stream:
                self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise CheckpointError(f"{self.path}: the file is empty, expected a GGUF file") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from None
        cursor = _Cursor(self.path, self._data)
        num_tensors, num_keys = _counts(cursor)
        self.metadata: dict[str, Any] = _metadata(cursor, num_keys)
        self.tensors: dict[str, GgufTensor] = _tensors(
            cursor, num_tensors, _alignment(cursor, self.metadata)
        )

    def read(self, name: str) -> Tensor:
        """The tensor called ``name`` in the file, float32, in memory of its own.

        Raises:
            CheckpointError: There is no such tensor.
            UnsupportedError: `gguf` cannot dequantise its type.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{self.path}: no tensor `{name}`", hint=did_you_mean(name, self.tensors)
            )
        raw = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.offset)
        if tensor.type in CASTS:
            values = raw.view(CASTS[tensor.type]).astype(np.float32)
        else:
            values = self._dequantize(raw, tensor)
        return torch.from_numpy(np.ascontiguousarray(values).reshape(tensor.shape))

    def _dequantize(self, raw: NDArray[np.uint8], tensor: GgufTensor) -> NDArray[np.float32]:
        num_rows = math.prod(tensor.shape[:-1])
        try:
            with np.errstate(all="ignore"):  # a corrupt scale may be inf or nan
                return dequantize(raw.reshape(num_rows, -1), tensor.type)
        except NotImplementedError:
            raise UnsupportedError(
                f"{self.path}: tensor `{tensor.name}` has type {tensor.type.name}, "
                "which cannot be dequantised",
                hint="use a Q4_K_M, Q8_0, F16 or BF16 file of the same model",
            ) from None


def read_as(file: GgufFile, config: ModelConfig, name: str) -> Tensor:
    """The tensor that Hugging Face calls ``name``, as Hugging Face stores it, in float32.

    llama.cpp interleaves the rows of q and k of ``llama`` files; this puts them back.

    Args:
        file: Where to read.
        config: What `gguf_config` says of the file.
        name: For instance ``model.layers.0.self_attn.q_proj.weight``.

    Raises:
        CheckpointError: ``config`` has no such tensor, or the file has not.
    """
    names = gguf_tensor_map(config)
    if name not in names:
        raise CheckpointError(
            f"{file.path}: a {config.family} model of this shape has no tensor `{name}`",
            hint=did_you_mean(name, names),
        )
    return unpermute(file.read(names[name]), names[name], config, file.path)


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Tensors and keys the header announces, after magic and version."""
    magic = cursor.data[: min(4, len(cursor.data))]
    if magic != b"GGUF":
        raise cursor.fail(f"not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
    cursor.take(4, "the magic")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        seen = f"{swapped}, big endian" if swapped in VERSIONS else str(version)
        raise UnsupportedError(
            f"{cursor.path}: GGUF version {seen}; versions 2 and 3, little endian, are read",
            hint="convert the model again with a current llama.cpp",
        )
    num_tensors = cursor.count("Q", "the number of tensors", MAX_TENSORS)
    return num_tensors, cursor.count("Q", "the number of keys", MAX_KEYS)


def _metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(num_keys):
        key = cursor.text(f"the name of key {index}", MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.fail(f"key {key!r} appears twice")
        metadata[key] = cursor.value(f"key {key!r}")
    return metadata


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise cursor.fail(
            f"general.alignment is {str(value)[:40]}, expected a power of two up to {MAX_ALIGNMENT}"
        )
    return value


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    """Every tensor's place, checked: inside the file, aligned, and none over another."""
    found: dict[str, GgufTensor] = {}
    for index in range(count):
        tensor = _tensor_info(cursor, index)
        if tensor.name in found:
            raise cursor.fail(f"tensor {tensor.name!r} appears twice")
        found[tensor.name] = tensor
    base = -(-cursor.at // alignment) * alignment
    placed, end, before = {}, base, "the header"
    for tensor in sorted(found.values(), key=lambda t: t.offset):
        start = base + tensor.offset
        if tensor.offset % alignment:
            raise cursor.fail(
                f"tensor {tensor.name!r} has offset {tensor.offset}, not a multiple of {alignment}"
            )
        if start < end:
            raise cursor.fail(f"tensor {tensor.name!r} overlaps {before}")
        end, before = start + tensor.num_bytes, f"tensor {tensor.name!r}"
        if end > len(cursor.data):
            raise cursor.fail(
                f"tensor {tensor.name!r} ends at byte {end}, but the file ends at byte "
                f"{len(cursor.data)}; it is truncated, download it again"
            )
        placed[tensor.name] = GgufTensor(
            tensor.name, tensor.shape, tensor.type, start, tensor.num_bytes
        )
    return {name: placed[name] for name in found}


def _tensor_info(cursor: _Cursor, index: int) -> GgufTensor:
    """One entry of the tensor table; its offset still counts from the data section."""
    name = cursor.text(f"the name of tensor {index}", MAX_NAME_BYTES)
    what = f"tensor {name!r}"
    num_dims = cursor.count("I", f"the number of dimensions of {what}", MAX_DIMS)
    dims = [int(cursor.number("Q", f"dimension {i} of {what}")) for i in range(num_dims)]
    if not dims or 0 in dims or math.prod(dims) > 1 << 62:
        raise cursor.fail(f"{what} has dimensions {dims}, expected 1 to 4, none 0, product < 2^62")
    value = cursor.number("I", f"the type of {what}")
    try:
        kind = GGMLQuantizationType(value)
    except ValueError:
        raise UnsupportedError(
            f"{cursor.path}: {what} has type {value}, which this version does not know",
            hint="use a Q4_K_M, Q8_0, F16 or BF16 file of the same model",
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if dims[0] % block:
        raise cursor.fail(
            f"{what} has rows of {dims[0]}, not a multiple of the {kind.name} block of {block}"
        )
    offset = cursor.number("Q", f"the offset of {what}")
    size = math.prod(dims) // block * block_bytes
    return GgufTensor(name, tuple(reversed(dims)), kind, offset, size)
