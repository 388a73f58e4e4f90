import pytest
import torch

from kernels import at_level, each_level, native
from respike.ops.gated import swiglu, swiglu_definition
from tolerance import assert_close

DTYPES = (torch.float32, torch.bfloat16)


def inputs(rows: int, cols: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    both = 4.0 * torch.randn(2, rows, cols)
    return both[0].to(dtype), both[1].to(dtype)


def test_the_definition_is_the_formula() -> None:
    gate, up = inputs(3, 7, torch.float32)
    g, u = gate.double(), up.double()
    assert_close(swiglu_definition(gate, up), (g / (1 + torch.exp(-g)) * u).float())


@native
@each_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (2, 7), (1, 16), (3, 33), (65, 576), (0, 4)], ids=str
)
@pytest.mark.usefixtures("poison")
def test_every_level_matches_the_definition(
    level: int, dtype: torch.dtype, rows: int, cols: int
) -> None:
    gate, up = inputs(rows, cols, dtype)
    with at_level(level):
        got = swiglu(gate, up)
    assert_close(got, swiglu_definition(gate, up))


@native
@each_level
def test_silu_is_right_over_its_whole_range(level: int) -> None:
    gate = torch.cat((torch.linspace(-87, 87, 4001), torch.linspace(-1e-3, 1e-3, 99)))
    with at_level(level):
        got = swiglu(gate, torch.ones_like(gate))
    g = gate.double()
    expected = g * torch.sigmoid(g)
    assert ((got - expected).abs() <= 1e-6 * expected.abs()).all()


@native
@each_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_values_saturate_and_nan_stays_in_its_place(level: int, dtype: torch.dtype) -> None:
    gate = torch.tensor([1e4, -1e4, torch.inf, torch.nan, 0.0, -90.0, 90.0, 1.0], dtype=dtype)
    with at_level(level):
        got = swiglu(gate, torch.full_like(gate, 2.0))
    assert got[0] == 2 * gate[0]
    assert got[2] == torch.inf
    assert got.isnan().nonzero().flatten().tolist() == [3]
    assert got[[1, 4, 5]].abs().max() < 1e-30


@native
@each_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_of_one_tensor_and_transposed_ones(level: int, dtype: torch.dtype) -> None:
    gate, up = torch.randn(3, 5, 42).to(dtype).chunk(2, dim=-1)
    with at_level(level):
        assert_close(swiglu(gate, up), swiglu_definition(gate, up))
        turned = swiglu(gate.transpose(0, 2), up.transpose(0, 2))
    assert_close(turned, swiglu_definition(gate, up).transpose(0, 2))


def test_shapes_that_differ_are_refused() -> None:
    unchecked = getattr(swiglu, "__wrapped__", swiglu)
    with pytest.raises(ValueError, match="up"):
        unchecked(torch.ones(2, 3), torch.ones(3, 2))
