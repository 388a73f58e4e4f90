from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import at_level, each_level, extension, native
from respike.ops import backends
from respike.ops.norm import (
    add_rms_norm,
    add_rms_norm_definition,
    rms_norm,
    rms_norm_definition,
)
from tolerance import assert_close

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16)


def kernel_for(dtype: torch.dtype) -> Callable[..., None]:
    names = {torch.float32: "rms_norm_f32", torch.bfloat16: "rms_norm_bf16"}
    kernel: Callable[..., None] = getattr(extension(), names[dtype])
    return kernel


def by_kernel(level: int, x: Tensor, weight: Tensor) -> Tensor:
    out = torch.full_like(x, torch.nan)
    rows, cols = x.numel() // x.shape[-1], x.shape[-1]
    pointers = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
    kernel_for(x.dtype)(level, 1, *pointers, rows, cols, EPS)
    return out


def inputs(*shape: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    r = torch.Generator().manual_seed(seed)
    x = 3.0 * torch.randn(*shape, generator=r)
    weight = 1.0 + torch.randn(shape[-1], generator=r)
    return x.to(dtype), weight.to(dtype)


@native
@each_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(rows=st.integers(1, 5), cols=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_level_matches_the_definition(
    level: int, dtype: torch.dtype, rows: int, cols: int, seed: int
) -> None:
    x, weight = inputs(rows, cols, dtype=dtype, seed=seed)
    assert_close(by_kernel(level, x, weight), rms_norm_definition(x, weight, EPS))


@native
@each_level
def test_bf16_is_rounded_where_the_definition_rounds(level: int) -> None:
    x, weight = inputs(64, 577, dtype=torch.bfloat16)
    expected = rms_norm_definition(x, weight, EPS)
    rounded_once = (weight * x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + EPS)).to(
        torch.bfloat16
    )
    got = by_kernel(level, x, weight)
    assert (rounded_once != expected).float().mean() > 0.1  # so that the next line can fail
    assert (got != expected).float().mean() < 0.002


@native
@each_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_written_or_read_outside_the_buffers(level: int, dtype: torch.dtype) -> None:
    kernel = kernel_for(dtype)
    for cols in (1, 7, 16, 17, 31, 33, 64, 65):
        x, weight = inputs(3, cols, dtype=dtype)
        guard = torch.full((32,), torch.nan, dtype=dtype)
        padded = [torch.cat([guard, t.flatten(), guard]) for t in (x, weight, torch.zeros_like(x))]
        kernel(level, 1, *(t.data_ptr() + 32 * dtype.itemsize for t in padded), 3, cols, EPS)
        assert_close(padded[2][32:-32].view(3, cols), rms_norm_definition(x, weight, EPS))
        assert padded[2][:32].isnan().all()
        assert padded[2][-32:].isnan().all()


@native
def test_a_level_beyond_the_processor_is_refused() -> None:
    x, weight = inputs(2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="cannot run here"):
        by_kernel(len(backends.LEVELS), x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_the_output_is_written_completely(dtype: torch.dtype) -> None:
    x, weight = inputs(3, 5, 131, dtype=dtype)
    assert_close(rms_norm(x, weight, EPS), rms_norm_definition(x, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[1:2, 1:2], lambda x: x[:0]],
    ids=["transposed", "strided", "one row", "no rows"],
)
def test_strides_do_not_matter(dtype: torch.dtype, view: Callable[[Tensor], Tensor]) -> None:
    x, weight = inputs(3, 5, 12, dtype=dtype)
    every_other = torch.stack([weight, torch.full_like(weight, torch.nan)], dim=1)[:, 0]
    got = rms_norm(view(x), every_other, EPS)
    assert_close(got, rms_norm_definition(view(x), weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_stay_zero_and_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    x, weight = inputs(4, 33, dtype=dtype)
    x[1] = 0.0
    x[2, 5] = torch.nan
    y = rms_norm(x, weight, EPS)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert y[2].isnan().all()
    assert not y[[0, 3]].isnan().any()


@pytest.fixture
def _auto(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """RESPIKE_BACKEND=auto, even when the tests run under another choice."""
    monkeypatch.setenv("RESPIKE_BACKEND", "auto")
    backends.kernels.cache_clear()
    yield
    monkeypatch.undo()
    backends.kernels.cache_clear()


@pytest.mark.usefixtures("_auto")
def test_other_dtypes_run_in_torch() -> None:
    x, weight = inputs(3, 12, dtype=torch.float16)
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm_definition(x, weight, EPS))


def test_the_definition_is_that_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in DTYPES:
        x, weight = inputs(3, 5, 48, dtype=dtype)
        theirs = LlamaRMSNorm(48, eps=EPS).to(dtype)
        theirs.weight.data.copy_(weight)
        with torch.no_grad():
            assert torch.equal(rms_norm_definition(x, weight, EPS), theirs(x))


def test_a_weight_of_another_width_is_refused() -> None:
    x, weight = inputs(4, 12, dtype=torch.float32)
    unchecked = getattr(rms_norm, "__wrapped__", rms_norm)  # past the shape checks of the tests
    with pytest.raises(ValueError, match="x has 12 columns"):
        unchecked(x, weight[:6], EPS)


@native
@each_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 31), (5, 1, 64), (1, 40, 577)], ids=str)
@pytest.mark.usefixtures("poison")
def test_addition_and_norm_in_one_match_the_definition(
    level: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, weight = inputs(*shape, dtype=dtype)
    residual, _ = inputs(*shape, dtype=dtype, seed=1)
    expected, total = add_rms_norm_definition(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    with at_level(level):
        got, got_total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(got_total, total)
    assert_close(got, expected)


def test_a_residual_of_another_shape_is_refused() -> None:
    x, weight = inputs(4, 12, dtype=torch.float32)
    unchecked = getattr(add_rms_norm, "__wrapped__", add_rms_norm)
    with pytest.raises(ValueError, match="do not fit together"):
        unchecked(x, x[:3], weight, EPS)
