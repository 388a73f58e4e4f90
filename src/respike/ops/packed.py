"""Packed weights: how a linear layer's matrix lies in memory, and what that costs in accuracy.

Letters: O outputs, I inputs, P tiles of 64 outputs (the last padded with zeros), S scale groups.

The layout, for a weight (O, I)::

    data    (P, I, 64)  tile p, input i, column c: the weight from input i to output 64 p + c
            (P, I, 32)  int4: two's complement, column c in the low and c + 32 in the high half
    scales  (P, S, 64)  int kinds only, float16: group s holds inputs [s G, (s + 1) G)

It is input-major: all that an input feeds in a tile lies together, 256, 128, 64 or 32 bytes, whole
or half cache lines. So a matrix-vector product reads memory in order and needs no sums across
lanes, and an input that is zero can skip its row in every tile.

Matrices behind spiking neurons lie otherwise in memory, though the tensors have the same shapes
(`respike.ops.placing.Room`): the rows of one input in all tiles of all matrices that it feeds are
neighbours, (I, P, 64). To skip a cache line here and there saves next to nothing, since processors
fetch the lines around it anyway; a row of some hundred bytes or more is worth it.

Integers are symmetric, so an input of zero adds nothing. Scales are float16 for the bytes (int4
with groups of 32: 4.5 bits a weight, against 5 with float32), and because it is what GGUF's Q8_0
and Q4_0 store, whose blocks fit in unchanged. The integers are chosen for the scale as it is
stored, so its rounding costs next to nothing. int4 scales are searched: the one of least squared
error among the `INT4_STEPS`, of either sign, because the range is -8..7.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from respike.errors import UnsupportedError
from respike.ops import backends

TILE = 64
"""Outputs in a tile."""

KINDS = ("f32", "bf16", "int8", "int4")
"""Kinds of packed weights; a kind's index is its number in C++."""

GROUP_SIZES = (32, 64, 128)
"""How many inputs may share a scale."""

INT4_STEPS = tuple(6.5 + 0.25 * i for i in range(13))
"""The largest magnitude of a group is this many steps, for each candidate scale of int4."""

_INT4_CANDIDATES = (-8.0, *(sign * steps for steps in INT4_STEPS for sign in (-1, 1)))

ROUNDED_AT_ONCE = 1 << 22
"""Weights that are rounded at once: on the way each takes some 20 bytes."""

_FLOAT = {"f32": torch.float32, "bf16": torch.bfloat16}
_STORED = _FLOAT | {"int8": torch.int8, "int4": torch.uint8}


@dataclass(frozen=True)
class PackedWeight:
    """The weight (O, I) of a linear layer, packed as this module's text says."""

    kind: str
    data: Tensor
    scales: Tensor | None
    """None for the float kinds."""
    in_features: int
    out_features: int
    group_size: int

    @property
    def nbytes(self) -> int:
        """Bytes read for one product: integers, scales and padding."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.data.nbytes + scales

    @cached_property
    def for_kernels(self) -> tuple[int, int, int]:
        """Number of the kind, address of the data, address of the scales (0: none).

        Raises:
            ValueError: The buffers are not as the layout says.
        """
        for buffer, dtype in ((self.data, _STORED[self.kind]), (self.scales, torch.float16)):
            if buffer is not None and (buffer.dtype != dtype or not buffer.is_contiguous()):
                raise ValueError(f"a buffer is {buffer.dtype}, not {dtype} in one piece")
        scales = 0 if self.scales is None else self.scales.data_ptr()
        return KINDS.index(self.kind), self.data.data_ptr(), scales

    @cached_property
    def strides(self) -> tuple[int, int, int, int]:
        """From one tile and one row to the next: of the data in bytes, of the scales in elements.

        Raises:
            ValueError: The weights of a row, or the scales, do not lie together; or there are none.
        """
        if self.scales is None:
            raise ValueError(f"a weight of kind {self.kind} takes no spike counts")
        found: list[int] = []
        for buffer, dtype in ((self.data, _STORED[self.kind]), (self.scales, torch.float16)):
            tile, row, one = buffer.stride()
            if buffer.dtype != dtype or one != 1:
                raise ValueError(f"a buffer is {buffer.dtype} with rows in pieces, not {dtype}")
            found += [tile, row]  # integers take a byte each, or half of one, in tensors of bytes
        tile, row, scales_tile, scales_row = found
        return tile, row, scales_tile, scales_row


def pack(
    weight: Float[Tensor, "O I"], kind: str, group_size: int = 32, *, search: bool = True
) -> PackedWeight:
    """Round a weight to ``kind`` and lay it out in tiles.

    Args:
        weight: As `torch.nn.Linear` has it.
        kind: One of `KINDS`.
        group_size: Inputs that share a scale, one of `GROUP_SIZES`; the last group may be short.
        search: int4 only: look for better scales than the largest magnitude gives.

    Raises:
        UnsupportedError: Unknown kind or group size, or weights that float16 scales cannot hold.
    """
    if kind not in KINDS:
        raise UnsupportedError(
            f"packed weights of kind {kind!r}", hint=f"one of {', '.join(KINDS)}"
        )
    if group_size not in GROUP_SIZES:
        raise UnsupportedError(
            f"scale groups of {group_size} inputs",
            hint=f"one of {', '.join(map(str, GROUP_SIZES))}",
        )
    out_features, in_features = weight.shape
    if not weight.numel():
        raise UnsupportedError(f"packing an empty weight of shape {tuple(weight.shape)}")
    (data_shape, data_dtype), *rest = packed_parts(out_features, in_features, kind, group_size)
    data = weight.new_empty(data_shape, dtype=data_dtype)
    scales = weight.new_empty(rest[0][0], dtype=rest[0][1]) if rest else None
    rows = max(1, ROUNDED_AT_ONCE // (TILE * in_features)) * TILE
    for begin in range(0, out_features, rows):
        some, tiles = weight[begin : begin + rows], slice(begin // TILE, (begin + rows) // TILE)
        if scales is None:
            data[tiles] = _to_tiles(some.to(_FLOAT[kind]))
            continue
        integers, steps = quantise(some, kind, group_size, search=search)
        found = _to_tiles(integers)
        data[tiles] = _join_halves(found) if kind == "int4" else found
        scales[tiles] = _to_tiles(steps)
    return PackedWeight(kind, data, scales, in_features, out_features, group_size)


def packed_parts(
    out_features: int, in_features: int, kind: str, group_size: int
) -> list[tuple[tuple[int, int, int], torch.dtype]]:
    """Shape and dtype of the data, and of the scales if ``kind`` has any, of a weight (O, I)."""
    tiles = -(-out_features // TILE)
    columns = TILE // 2 if kind == "int4" else TILE
    data = (tiles, in_features, columns), _STORED[kind]
    if kind in _FLOAT:
        return [data]
    return [data, ((tiles, -(-in_features // group_size), TILE), torch.float16)]


def unpack(packed: PackedWeight) -> Float[Tensor, "O I"]:
    """The weight that the packed form stands for, float32."""
    values = from_tiles(_split_halves(packed.data) if packed.kind == "int4" else packed.data)
    weight = values[: packed.out_features].float()
    if packed.scales is None:
        return weight
    scales = from_tiles(packed.scales)[: packed.out_features].float()
    return weight * scales.repeat_interleave(packed.group_size, 1)[:, : packed.in_features]


def unpack_integers(packed: PackedWeight) -> Int[Tensor, "P I c"]:
    """The integers of an int8 or int4 weight in tiles of 64 outputs, int8, padding included."""
    return _split_halves(packed.data) if packed.kind == "int4" else packed.data


def packed_columns(packed: PackedWeight, index: Int[Tensor, "*n"]) -> Float[Tensor, "*n I"]:
    """Rows ``index`` of the weight (O, I), float32: embeddings that share a packed head."""
    tile, column = index // TILE, index % TILE
    if packed.kind == "int4":
        byte = packed.data[tile, :, column % (TILE // 2)]
        high = (column >= TILE // 2)[..., None]
        nibble = torch.where(high, byte >> 4, byte & 15).view(torch.int8)
        values = (nibble - 2 * (nibble & 8)).float()
    else:
        values = packed.data[tile, :, column].float()
    if packed.scales is None:
        return values
    scales = packed.scales[tile, :, column].float()
    return values * scales.repeat_interleave(packed.group_size, -1)[..., : packed.in_features]


def quantise_definition(
    weight: Float[Tensor, "O I"], kind: str, group_size: int, *, search: bool = True
) -> tuple[Tensor, Tensor]:
    """Integers (O, I), int8 in memory, and their float16 scales (O, S): the definition.

    See `pack` for arguments and errors.
    """
    out_features, in_features = weight.shape
    groups = -(-in_features // group_size)
    grouped = pad(weight.float(), (0, groups * group_size - in_features))
    grouped = grouped.view(out_features, groups, group_size)
    if kind == "int8":
        integers, scales = _round(grouped, grouped.abs().amax(-1) / 127, -127, 127)
    elif search:
        integers, scales = _search_int4(grouped)
    else:
        integers, scales = _round(grouped, grouped.abs().amax(-1) / 7, -7, 7)
    return integers.view(out_features, -1)[:, :in_features].to(torch.int8), scales


def quantise(
    weight: Float[Tensor, "O I"], kind: str, group_size: int, *, search: bool = True
) -> tuple[Tensor, Tensor]:
    """`quantise_definition` by the fastest implementation that can run here.

    The search for int4 compares sums of squares, so where two candidates are as good as each other
    it may choose the other one.
    """
    if not bool(weight.isfinite().all()):
        raise UnsupportedError("packing weights that are infinite or not a number")
    weight = weight.float().contiguous()
    kernels = backends.choose("search_int4", weight) if kind == "int4" and search else None
    if kernels is None:
        integers, scales = quantise_definition(weight, kind, group_size, search=search)
    else:
        integers, scales = _search_int4_natively(kernels, weight, group_size)
    if not bool(scales.isfinite().all()):
        raise UnsupportedError("packing weights whose scales are beyond float16")
    return integers, scales


def _search_int4_natively(
    kernels: backends.Kernels, weight: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    out_features, in_features = weight.shape
    steps = torch.tensor(_INT4_CANDIDATES, dtype=torch.float32)
    integers = torch.empty(out_features, in_features, dtype=torch.int8)
    scales = torch.empty(out_features, -(-in_features // group_size), dtype=torch.float16)
    kernels.module.search_int4_f32(
        kernels.level,
        torch.get_num_threads(),
        weight.data_ptr(),
        out_features,
        in_features,
        group_size,
        steps.data_ptr(),
        len(steps),
        integers.data_ptr(),
        scales.data_ptr(),
    )
    return integers, scales


def _round(grouped: Tensor, scales: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Integers for groups (O, S, G) under the scales as float16 keeps them; and those scales."""
    stored = scales.half()
    step = stored.float()[..., None]
    inverse = torch.where(step == 0, torch.zeros_like(step), 1 / step)
    return (grouped * inverse).round().clamp(low, high), stored


def _search_int4(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """For each group the candidate scale with the least squared error, the first of equals."""
    at = grouped.abs().argmax(-1, keepdim=True)
    largest = grouped.gather(-1, at)[..., 0]
    integers, scales = torch.zeros_like(grouped), torch.zeros_like(largest).half()
    least = torch.full_like(largest, torch.inf)
    for steps in _INT4_CANDIDATES:
        candidate, stored = _round(grouped, largest / steps, -8, 7)
        error = (candidate * stored.float()[..., None] - grouped).square().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        integers = torch.where(better[..., None], candidate, integers)
        scales = torch.where(better, stored, scales)
    return integers, scales


def _to_tiles(matrix: Tensor) -> Tensor:
    """(O, I) -> (P, I, 64)."""
    padded = pad(matrix, (0, 0, 0, -len(matrix) % TILE))
    return padded.view(-1, TILE, matrix.shape[1]).transpose(1, 2).contiguous()


def from_tiles(tiles: Tensor) -> Tensor:
    """(P, I, 64) -> (64 P, I): the inverse, padding included."""
    return tiles.transpose(1, 2).flatten(0, 1)


def _join_halves(integers: Tensor) -> Tensor:
    """Integers -8..7 (P, I, 64), int8 -> (P, I, 32), uint8."""
    low, high = (integers & 15).view(torch.uint8).chunk(2, -1)
    return low | (high << 4)


def _split_halves(data: Tensor) -> Tensor:
    """The inverse of `_join_halves`."""
    nibbles = torch.cat((data & 15, data >> 4), -1).view(torch.int8)
    return nibbles - 2 * (nibbles & 8)
