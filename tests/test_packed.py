import pytest
import torch
from torch import Tensor

from kernels import at_level, each_level
from respike.errors import UnsupportedError
from respike.ops.packed import (
    GROUP_SIZES,
    KINDS,
    PackedWeight,
    pack,
    packed_columns,
    quantise,
    quantise_definition,
    unpack,
)
from respike.ops.packed import _to_tiles as to_tiles
from respike.ops.placing import Room, form_of, place_side_by_side, place_together
from tolerance import differences

INT_KINDS = ("int8", "int4")
LIMITS = {"int8": (-127, 127), "int4": (-8, 7)}


def element(packed: PackedWeight, output: int, i: int) -> float:
    """The weight from input i to an output, read as the layout is written down."""
    tile, column = divmod(output, 64)
    if packed.kind == "int4":
        byte = int(packed.data[tile, i, column % 32])
        nibble = byte % 16 if column < 32 else byte // 16
        value = float(nibble if nibble < 8 else nibble - 16)
    else:
        value = float(packed.data[tile, i, column])
    if packed.scales is not None:
        value *= float(packed.scales[tile, i // packed.group_size, column])
    return value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (64, 32), (70, 33), (129, 130)], ids=str)
def test_unpacking_reads_the_layout(kind: str, outputs: int, inputs: int) -> None:
    packed = pack(torch.randn(outputs, inputs), kind)
    got = unpack(packed)
    assert got.shape == (outputs, inputs)
    for o in {0, outputs // 3, outputs // 2, outputs - 1}:
        assert got[o].tolist() == [element(packed, o, i) for i in range(inputs)]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_zero_and_buffers_have_the_shapes_of_the_layout(kind: str) -> None:
    packed = pack(torch.randn(70, 33) + 1, kind, group_size=32)
    assert packed.data.shape == (2, 33, 32 if kind == "int4" else 64)
    columns = list(range(6, 32)) if kind == "int4" else list(range(6, 64))
    assert (packed.data[1, :, columns] == 0).all()
    if packed.scales is not None:
        assert packed.scales.shape == (2, 2, 64)
        assert packed.scales.dtype == torch.float16
    row = {"f32": 256, "bf16": 128, "int8": 64, "int4": 32}[kind]
    assert packed.nbytes == 2 * 33 * row + (2 * 2 * 128 if kind in INT_KINDS else 0)


@pytest.mark.parametrize(("kind", "dtype"), [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_float_kinds_round_trip_bit_by_bit(kind: str, dtype: torch.dtype) -> None:
    weight = torch.randn(67, 35).to(dtype)
    assert torch.equal(unpack(pack(weight, kind)), weight.float())


@pytest.mark.parametrize("kind", INT_KINDS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_weights_on_the_grid_round_trip_bit_by_bit(kind: str, group_size: int) -> None:
    low, high = LIMITS[kind]
    inputs = group_size + 13
    integers = torch.randint(low, high + 1, (66, inputs))
    integers[:, [0, group_size]] = high if kind == "int8" else low  # every group uses its range
    scales = torch.rand(66, 2).half() + 0.5
    weight = integers * scales.float().repeat_interleave(group_size, 1)[:, :inputs]
    assert torch.equal(unpack(pack(weight, kind, group_size)), weight)


@pytest.mark.parametrize("kind", INT_KINDS)
@pytest.mark.parametrize("search", [True, False])
def test_no_weight_is_further_from_its_grid_than_it_must_be(kind: str, search: bool) -> None:
    weight = torch.randn(65, 100)
    integers, scales = quantise(weight, kind, 32, search=search)
    steps = scales.float().repeat_interleave(32, 1)[:, :100]
    low, high = LIMITS[kind]
    assert integers.min() >= low
    assert integers.max() <= high
    inside = (integers > low) & (integers < high)
    off = (integers * steps - weight).abs() / steps.abs()
    assert off[inside].max() <= 0.5001
    assert inside.float().mean() > 0.8


def test_the_search_finds_smaller_errors_than_the_largest_magnitude_gives() -> None:
    weight = torch.randn(64, 256)
    plain, searched = (
        differences(unpack(pack(weight, "int4", search=search)), weight).rms
        for search in (False, True)
    )
    assert searched < 0.9 * plain
    assert differences(unpack(pack(weight, "int8")), weight).rms < 0.1 * searched


@pytest.mark.parametrize("kind", INT_KINDS)
def test_groups_of_zeros_stay_zero_beside_others(kind: str) -> None:
    weight = torch.randn(3, 96)
    weight[1, 32:64] = 0.0
    got = unpack(pack(weight, kind))
    assert (got[1, 32:64] == 0).all()
    assert got.isfinite().all()
    assert (got[1, :32] != 0).any()


@pytest.mark.parametrize("kind", INT_KINDS)
def test_scales_from_tiny_to_huge(kind: str) -> None:
    weight = torch.randn(64, 64)
    reference = differences(unpack(pack(weight, kind)), weight).rms
    for factor in (2.0**-9, 2.0**10):  # within float16's normal range for the scales
        scaled = differences(unpack(pack(weight * factor, kind)), weight * factor).rms
        assert scaled == pytest.approx(reference, rel=0.2)
    nothing = unpack(pack(weight * 1e-12, kind))  # below all float16: an absolute error of 1e-11
    assert (nothing - weight * 1e-12).abs().max() < 1e-11


def each_bad_call() -> list[object]:
    good = torch.randn(3, 32)
    return [
        pytest.param(good, "int5", 32, "kind 'int5'", id="kind"),
        pytest.param(good, "int8", 48, "groups of 48", id="group"),
        pytest.param(good[:0], "int8", 32, "empty", id="empty"),
        pytest.param(good * 1e9, "int8", 32, "beyond float16", id="huge"),
        pytest.param(good * torch.nan, "int4", 32, "not a number", id="nan"),
    ]


@pytest.mark.parametrize(("weight", "kind", "group_size", "message"), each_bad_call())
def test_what_cannot_be_packed_is_refused(
    weight: Tensor, kind: str, group_size: int, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        pack(weight, kind, group_size)


@pytest.mark.parametrize("kind", KINDS)
def test_single_rows_of_the_weight_can_be_looked_up(kind: str) -> None:
    packed = pack(torch.randn(150, 40), kind)
    index = torch.tensor([[0, 31, 32], [63, 64, 149]])
    assert torch.equal(packed_columns(packed, index), unpack(packed)[index])


@pytest.mark.parametrize("count", [0, 1, 5])
def test_weights_placed_together_are_the_same_and_aligned(count: int) -> None:
    packed = [pack(torch.randn(65 + i, 33), KINDS[i % 4]) for i in range(count)]
    placed = place_together(packed)
    assert len(placed) == count
    for before, after in zip(packed, placed, strict=True):
        assert torch.equal(unpack(after), unpack(before))
        assert after.data.data_ptr() % 64 == 0
        assert after.data.data_ptr() != before.data.data_ptr()
    starts = [p.data.data_ptr() for p in placed]
    assert starts == sorted(starts)
    if count:
        assert starts[-1] - starts[0] < sum(p.nbytes + 2 * 63 for p in placed)
        assert len({p.data.untyped_storage().data_ptr() for p in placed}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_too_large_to_be_rounded_at_once_is_rounded_in_parts(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    weight = torch.randn(330, 75)
    whole, calls = pack(weight, kind, 64), []
    monkeypatch.setattr("respike.ops.packed.ROUNDED_AT_ONCE", 2 * 64 * 75 + 1)
    monkeypatch.setattr(
        "respike.ops.packed._to_tiles", lambda m: (calls.append(len(m)), to_tiles(m))[1]
    )
    parts = pack(weight, kind, 64)
    assert calls[:: 1 if parts.scales is None else 2] == [128, 128, 74]
    assert torch.equal(parts.data, whole.data)
    if whole.scales is not None:
        assert parts.scales is not None
        assert torch.equal(parts.scales, whole.scales)
    monkeypatch.setattr("respike.ops.packed.ROUNDED_AT_ONCE", 1)
    assert torch.equal(pack(weight, kind, 64).data, whole.data)


def test_room_is_for_what_was_announced() -> None:
    first, second = pack(torch.randn(70, 33), "int8"), pack(torch.randn(70, 33), "bf16")
    room = Room([[form_of(first)]], torch.device("cpu"))
    with pytest.raises(ValueError, match="8448 bytes of a weight come where 4224 were announced"):
        room.place(second)
    room = Room([[form_of(first)]], torch.device("cpu"))
    room.place(first)
    with pytest.raises(ValueError, match="where 0 were announced"):
        room.place(first)


@each_level
@pytest.mark.parametrize("shape", [(17, 96, 32), (5, 100, 64), (33, 130, 128), (1, 1, 32)], ids=str)
def test_the_native_search_is_the_definitions(level: int, shape: tuple[int, int, int]) -> None:
    """Small, zero, huge and subnormal-scaled rows too."""
    out_features, in_features, group = shape
    weight = torch.randn(out_features, in_features)
    for row, size in enumerate([1e-6, 0.0, 3e4, 1e-9]):
        weight[row : row + 1] *= size
    with at_level(level):
        integers, scales = quantise(weight, "int4", group)
    expected, expected_scales = quantise_definition(weight, "int4", group)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(integers, expected)


@pytest.mark.parametrize("kind", INT_KINDS)
def test_what_an_input_feeds_can_lie_side_by_side(kind: str) -> None:
    units = [
        [pack(torch.randn(o, i), kind, 64) for o in outs] for i, outs in ((33, (70, 3)), (9, (5,)))
    ]
    expected = [[unpack(w) for w in unit] for unit in units]
    placed = place_side_by_side(units)
    for unit, weights in zip(placed, expected, strict=True):
        for packed, weight in zip(unit, weights, strict=True):
            assert torch.equal(unpack(packed), weight)
    row = 64 if kind == "int8" else 32
    first, second = placed[0]
    assert first.strides == second.strides == (row, 3 * row, 64, 3 * 64)
    assert second.data.data_ptr() - first.data.data_ptr() == 2 * row
    with pytest.raises(ValueError, match="in one piece"):
        _ = first.for_kernels
    assert place_side_by_side([]) == []
