"""Rotary angles against float64 arithmetic and against transformers' scalings."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import at_level, each_level, native
from respike.config import RopeConfig
from respike.models.build import frequencies
from respike.ops.rotary import (
    rotary_frequencies,
    rotary_tables,
    rotate,
    rotate_,
    rotate_definition,
)
from tiny import LINEAR_ROPE, LLAMA3_ROPE, tiny_config
from tolerance import assert_close

B, T, H, K = 2, 5, 3, 14
FAR = 4_000_000
HALF_AN_ULP = 2.0**-25  # of a float32 just below 1


def by_hand(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Each pair (i, i + K/2) turned by its angle, one complex number at a time, in float64."""
    K = x.shape[-1]
    out = np.zeros(x.shape)
    for index in np.ndindex(*x.shape[:3]):
        for i in range(K // 2):
            angle = math.fmod(int(positions[index[:2]]) * theta ** (-2 * i / K), 2 * math.pi)
            a, b = float(x[(*index, i)]), float(x[(*index, i + K // 2)])
            turned = complex(a, b) * complex(math.cos(angle), math.sin(angle))
            out[(*index, i)], out[(*index, i + K // 2)] = turned.real, turned.imag
    return torch.from_numpy(out)


@pytest.mark.parametrize("theta", [10_000.0, 1e6], ids=str)
@pytest.mark.parametrize("start", [0, 1000, FAR - T], ids=str)
def test_rotation_matches_complex_arithmetic_even_far_out(start: int, theta: float) -> None:
    x = torch.randn(B, T, H, K)
    positions = torch.stack([start + torch.arange(T), torch.arange(T)])
    got = rotate(x, *rotary_tables(positions, rotary_frequencies(K, theta)))
    assert_close(got, by_hand(x, positions, theta).float())


def test_the_tables_are_as_exact_as_float32_can_be() -> None:
    positions = torch.tensor([[0, 1, 4095, 131_071, FAR - 1]])
    omega = rotary_frequencies(K, 10_000.0)
    cos, sin = rotary_tables(positions, omega)
    for t, position in enumerate(positions[0].tolist()):
        for r in range(K // 2):
            angle = position * 10_000.0 ** (-2 * r / K)
            assert abs(cos[0, t, r].item() - math.cos(angle)) <= 2 * HALF_AN_ULP
            assert abs(sin[0, t, r].item() - math.sin(angle)) <= 2 * HALF_AN_ULP


@given(shift=st.integers(0, FAR), gap=st.integers(0, 4096))
@settings(max_examples=25, deadline=None)
def test_scores_depend_on_the_distance_and_not_on_the_position(shift: int, gap: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, K, generator=torch.Generator().manual_seed(3))
    omega = rotary_frequencies(K, 10_000.0)

    def score(at: int) -> Tensor:
        tables = [rotary_tables(torch.tensor([[p]]), omega) for p in (at + gap, at)]
        return (rotate(q, *tables[0]) * rotate(k, *tables[1])).sum()

    size = q.norm() * k.norm()
    assert_close(size + score(shift), size + score(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotation_keeps_dtype_and_length(dtype: torch.dtype) -> None:
    x = torch.randn(B, T, H, K).to(dtype)
    positions = FAR + torch.arange(T).expand(B, -1)
    turned = rotate(x, *rotary_tables(positions, rotary_frequencies(K, 10_000.0)))
    assert turned.dtype == dtype
    assert_close(turned.float().norm(dim=-1), x.float().norm(dim=-1), dtype)


def test_position_zero_is_left_alone() -> None:
    x = torch.randn(B, 1, H, K)
    tables = rotary_tables(torch.zeros(B, 1, dtype=torch.int64), rotary_frequencies(K, 500.0))
    assert torch.equal(rotate(x, *tables), x)


@pytest.mark.parametrize("head_dim", [8, 20, 64, 128])
@pytest.mark.parametrize(
    "scaling",
    [LLAMA3_ROPE, LLAMA3_ROPE | {"factor": 32.0, "original_max_position_embeddings": 8192}],
    ids=["short", "as released"],
)
def test_llama3_frequencies_are_those_of_transformers(
    scaling: dict[str, float], head_dim: int
) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": 500_000.0, **scaling}
    theirs, factor = ROPE_INIT_FUNCTIONS["llama3"](
        tiny_config("llama", rope=rope, head_dim=head_dim), "cpu"
    )
    numbers = {name: value for name, value in scaling.items() if name != "rope_type"}
    ours = frequencies(RopeConfig(theta=500_000.0, kind="llama3", **numbers), head_dim)
    assert factor == 1.0
    assert ours.dtype == torch.float64
    # A divisor can be lost in a sum of frequencies, so each one is compared by its ratio.
    assert_close((ours / theirs).float(), torch.ones(head_dim // 2))
    assert not torch.equal(ours, rotary_frequencies(head_dim, 500_000.0))


def test_linear_frequencies_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, factor = ROPE_INIT_FUNCTIONS["linear"](tiny_config("llama", rope=LINEAR_ROPE), "cpu")
    ours = frequencies(RopeConfig(theta=10_000.0, kind="linear", factor=2.5), 8)
    assert factor == 1.0
    assert_close((ours / theirs).float(), torch.ones(4))


def test_factors_divide_their_own_frequency() -> None:
    divisors = (1.0, 2.0, 4.0, 8.0)
    ours = frequencies(RopeConfig(theta=10_000.0, kind="factors", factors=divisors), 8)
    assert_close(
        ours * torch.tensor(divisors, dtype=torch.float64),
        rotary_frequencies(8, 10_000.0),
        torch.float32,
    )


def each_layout(x: Tensor) -> list[Tensor]:
    """The values of x (B, T, H, K) lying in memory in several ways."""
    B, T, H, K = x.shape
    part = torch.cat((x.flatten(2), x.flatten(2)), -1)[..., : H * K].view(B, T, H, K)
    heads_first = x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    every_other = torch.stack((x, x), -1)[..., 0]
    return [x.clone(), part, heads_first, every_other]


@native
@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 9, 64), (2, 3, 2, 6), (3, 1, 1, 34), (1, 40, 3, 32), (2, 0, 3, 8)], ids=str
)
@pytest.mark.usefixtures("poison")
def test_every_level_matches_the_definition(
    level: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    B, T, _, K = shape
    x = torch.randn(shape).to(dtype)
    tables = rotary_tables(torch.randint(0, 1 << 20, (B, T)), rotary_frequencies(K, 10_000.0))
    expected = rotate_definition(x, *tables)
    for layout in each_layout(x):
        with at_level(level):
            assert_close(rotate(layout, *tables), expected)
            assert torch.equal(layout, x)
            rotate_(layout, *tables)
        assert_close(layout.contiguous(), expected)


@native
def test_tables_that_do_not_fit_are_refused() -> None:
    x = torch.randn(2, 3, 4, 8)
    cos, sin = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    unchecked = getattr(rotate, "__wrapped__", rotate)
    for bad in (cos[:1], cos[..., :3], cos.double()):
        with at_level(0), pytest.raises(ValueError, match="a table is"):
            unchecked(x, bad, sin)
