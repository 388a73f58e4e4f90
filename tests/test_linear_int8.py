"""Packed linear layers with activations rounded to int8: the rounding, and every level."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from kernels import at_level, each_product_level, native
from respike.layers.linear import PackedLinear
from respike.ops.linear import packed_linear, packed_linear_definition, round_activations
from respike.ops.packed import PackedWeight, pack, unpack
from tolerance import assert_close

KINDS = ("int8", "int4")
DTYPES = (torch.float32, torch.bfloat16)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 13, 65)
SHAPES = ((1, 1), (64, 64), (70, 33), (200, 577), (65, 302), (3, 128))
"""(O, I): one tile and several, whole and not; groups, quads and panels, whole and not."""


def rounded(values: list[float], group_size: int = 32) -> tuple[list[float], list[float]]:
    integers, scales = round_activations(torch.tensor([values]), group_size)
    return integers[0].tolist(), scales[0].tolist()


def test_the_rounding_is_to_nearest_with_ties_to_even() -> None:
    integers, scales = rounded([127.0, 0.5, 1.5, 2.5, -0.5, -2.5, 2.51, -126.6])
    assert integers == [127, 0, 2, 2, 0, -2, 3, -127]
    assert scales == [1.0]


def test_each_group_has_the_scale_of_its_largest_value_and_the_last_may_be_short() -> None:
    values = [0.0] * 32 + [-3.0] + [0.25] * 31 + [1.0, 8.0]
    integers, scales = rounded(values)
    assert scales == pytest.approx([0.0, 3 / 127, 8 / 127], rel=1e-7)
    assert integers == [0] * 32 + [-127] + [11] * 31 + [16, 127]


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_no_value_moves_by_more_than_half_a_step(group_size: int) -> None:
    x = torch.randn(5, 300, dtype=torch.float64).float() * torch.logspace(-30, 30, 300)
    integers, scales = round_activations(x, group_size)
    assert scales.shape == (5, -(-300 // group_size))
    assert integers.abs().max() == 127
    step = scales.double().repeat_interleave(group_size, -1)[:, :300]
    gap = (integers.double() * step - x.double()).abs()
    assert (gap <= step * (0.5 + 1e-4)).all()


def test_scales_at_the_ends_of_float32() -> None:
    tiny = torch.finfo(torch.float32).tiny
    assert rounded([127 * tiny, tiny]) == ([127, 1], [tiny])
    assert rounded([126 * tiny, tiny]) == ([0, 0], [0])
    largest = torch.finfo(torch.float32).max
    integers, (scale,) = rounded([largest, -largest / 4])
    assert integers == [127, -32]
    assert Fraction(scale) * 127 == pytest.approx(Fraction(largest), rel=1e-6)
    for bad in (torch.inf, -torch.inf, torch.nan):
        integers, (scale,) = rounded([1.0, bad])
        assert integers == [0, 0]
        assert scale != scale


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_multiplies_integers(kind: str) -> None:
    packed = pack(torch.randn(70, 100), kind)
    x, bias = torch.randn(2, 3, 100), torch.randn(70)
    expected = bias.double().expand(2, 3, 70).clone()
    for start in range(0, 100, 32):
        part = slice(start, min(start + 32, 100))
        scale = x[..., part].abs().amax(-1, keepdim=True).double() / 127
        integers = (x[..., part].double() / scale).round()
        expected += (integers * scale) @ unpack(packed).double()[:, part].T
    assert_close(packed_linear_definition(x, packed, bias, "int8"), expected.float())


@native
@each_product_level
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_every_level_matches_the_definition(level: int, kind: str, dtype: torch.dtype) -> None:
    with at_level(level):
        for number, (outputs, inputs) in enumerate(SHAPES):
            packed = pack(torch.randn(outputs, inputs), kind, (32, 64, 128)[number % 3])
            bias = torch.randn(outputs)
            for rows in ROWS:
                x = torch.randn(rows, inputs).to(dtype)
                got = packed_linear(x, packed, bias, "int8")
                assert_close(got, packed_linear_definition(x, packed, bias, "int8"))


@native
@each_product_level
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("poison")
def test_rows_beyond_a_block(level: int, kind: str) -> None:
    packed = pack(torch.randn(70, 45), kind)
    for rows in (239, 241, 485):
        x = torch.randn(rows, 45)
        with at_level(level):
            got = packed_linear(x, packed, None, "int8")
        assert_close(got, packed_linear_definition(x, packed, None, "int8"))


def extreme(kind: str, inputs: int, group_size: int) -> PackedWeight:
    """Weights of the largest integers, of either sign, and scales of one."""
    low = -128 if kind == "int8" else -8
    packed = pack(torch.ones(64, inputs), kind, group_size)
    integers = torch.where(torch.rand(1, inputs, 64) < 0.5, low, -low - 1)
    integers[..., 0], integers[..., 1] = low, -low - 1
    if kind == "int8":
        packed.data.copy_(integers)
    else:
        packed.data.copy_((integers[..., :32] & 15) | ((integers[..., 32:] & 15) << 4))
    assert packed.scales is not None
    packed.scales.fill_(1)
    return packed


def integer_product(x: Tensor, packed: PackedWeight) -> Tensor:
    """One group: the sum of integer products, times the scale of x."""
    integers, scales = round_activations(x, packed.group_size)
    assert scales.shape[-1] == 1
    return (integers.double() @ unpack(packed).double().T).float() * scales


@native
@each_product_level
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 6, 20])
def test_sums_of_integers_are_exact_up_to_the_largest(level: int, kind: str, rows: int) -> None:
    packed = extreme(kind, 128, 128)
    x = torch.where(torch.rand(rows, 128) < 0.5, -127.0, 127.0)
    x[0] = 127.0
    with at_level(level):
        got = packed_linear(x, packed, None, "int8")
    assert torch.equal(got, integer_product(x, packed))
    assert got[0, 0] == 127 * 128 * (-128 if kind == "int8" else -8)


@native
@each_product_level
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_group_gives_the_same_bits_at_every_level(
    level: int, kind: str, dtype: torch.dtype
) -> None:
    for inputs, group_size in ((32, 32), (61, 64), (127, 128), (3, 32)):
        packed = pack(torch.ones(70, inputs), kind, group_size)
        packed.data.copy_(torch.randint(0, 256, packed.data.shape).to(packed.data.dtype))
        assert packed.scales is not None
        packed.scales.fill_(0.5)
        for rows in (2, 17):
            x = torch.randn(rows, inputs).to(dtype) * torch.logspace(-4, 4, rows)[:, None].to(dtype)
            with at_level(level):
                got = packed_linear(x, packed, None, "int8")
            assert torch.equal(got, integer_product(x, packed).to(dtype))


@native
@each_product_level
@pytest.mark.parametrize("kind", KINDS)
def test_an_outlier_spoils_its_own_row_and_group_only(level: int, kind: str) -> None:
    packed = pack(torch.randn(70, 96), kind)
    x = torch.randn(9, 96)
    with at_level(level):
        before = packed_linear(x, packed, None, "int8")
        x[4, 40] = 1e6
        after = packed_linear(x, packed, None, "int8")
    others = [i for i in range(9) if i != 4]
    assert torch.equal(before[others], after[others])
    # The 31 neighbours round to zero; the other two groups are as they were.
    integers, scales = round_activations(x[4:5], 32)
    assert integers[0, 32:64].count_nonzero() == 1
    expected = (integers * scales.repeat_interleave(32, -1)) @ unpack(packed).T
    assert_close(after[4:5], expected)


@native
@each_product_level
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [3, 12])
def test_zeros_stay_zero_and_what_is_not_finite_stays_in_its_row(
    level: int, kind: str, rows: int
) -> None:
    packed = pack(torch.randn(70, 77), kind)
    for dtype in DTYPES:
        for bad in (torch.nan, -torch.inf):
            x = torch.randn(rows, 77).to(dtype)
            x[1], x[2, 76] = 0.0, bad
            with at_level(level):
                got = packed_linear(x, packed, None, "int8")
            assert torch.equal(got[1], torch.zeros_like(got[1]))
            assert got[2].isnan().all()
            assert not got[[i for i in range(rows) if i != 2]].isnan().any()


@native
@each_product_level
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_company(level: int, kind: str) -> None:
    packed = pack(torch.randn(70, 100), kind)
    x = torch.randn(40, 100)
    with at_level(level):
        together = packed_linear(x, packed, None, "int8")
        for count in (1, 3, 5, 6, 9):
            assert torch.equal(packed_linear(x[:count], packed, None, "int8"), together[:count])


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_weights_without_scales_are_refused(kind: str) -> None:
    packed, x = pack(torch.randn(6, 4), kind), torch.randn(2, 4)
    for op in (packed_linear, packed_linear_definition):
        with pytest.raises(ValueError, match=f"kind int8 or int4, not {kind}"):
            op(x, packed, None, "int8")
    with pytest.raises(ValueError, match="'int7' are not one of exact, int8"):
        packed_linear(x, packed, None, "int7")


def test_the_layer_rounds_when_told_to() -> None:
    linear, x = nn.Linear(96, 70), torch.randn(2, 5, 96)
    exact, by_int8 = (
        PackedLinear.from_linear(linear, "int8", 64, how) for how in ("exact", "int8")
    )
    assert by_int8.packed.group_size == 64
    assert torch.equal(by_int8(x), packed_linear(x, by_int8.packed, linear.bias, "int8"))
    gap = (by_int8(x) - exact(x)).norm() / exact(x).norm()
    assert 1e-3 < gap < 1e-2
