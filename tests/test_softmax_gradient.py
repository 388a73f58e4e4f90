"""Gradients of the softmax of sinks and window against autograd through its definition."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradients import gradients
from kernels import at_level, at_torch, each_level, native
from mixers import normal
from respike.device import set_threads
from respike.ops import softmax_gradient
from respike.ops.softmax import Keys, window_softmax, window_softmax_definition
from test_softmax_native import CASES, DTYPES, Case, inputs, where
from tolerance import assert_close

MORE = {
    "several blocks, window and sinks": Case(300, 296, 6, 2, 10, 6, 4, 4, 0, 70),
    "several blocks, causal": Case(275, 290, 6, 3, 10, 6, 0, 0, 15),
    "nothing but sinks": Case(3, 0, 6, 2, 10, 6, 3, 3, 0, 5),
    "window behind the last key": Case(40, 20, 6, 2, 10, 6, 4, 4, 0, 7),
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_case = pytest.mark.parametrize("case", (CASES | MORE).values(), ids=CASES | MORE)
own_sinks = pytest.mark.parametrize("own", [False, True], ids=["", "sinks seen by own queries"])
BFLOAT16 = ["causal", "window and sinks"]
"""Cases whose heads are as wide as models have them: in narrow ones rounding weighs more."""


def leaves_of(case: Case, dtype: torch.dtype, own: bool) -> list[Tensor]:
    q, keys, sinks = inputs(case, dtype)
    parts = [*keys[:2], *(sinks[:2] if sinks else ())]
    return [q, *([2 * normal(*q.shape, seed=9).to(dtype)] if own else []), *parts]


def run(form: Any, own: bool, case: Case, scale: float | None = None) -> Any:
    def call(q: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        q_sink, parts = (rest[0], rest[1:]) if own else (None, rest)
        sinks = Keys(*parts[2:]) if parts[2:] else None
        return form(q, Keys(*parts[:2]), sinks, q_sink=q_sink, scale=scale, **where(case))  # type: ignore[no-any-return]

    return call


def compare(case: Case, dtype: torch.dtype, own: bool, scale: float | None = None) -> None:
    own = own and case.sinks > 0
    leaves = leaves_of(case, dtype, own)
    exact = run(window_softmax_definition, own, case, scale)
    expected = gradients(exact, [x.float() for x in leaves])
    got = gradients(run(window_softmax, own, case, scale), leaves)
    for ours, wanted in zip(got, expected, strict=True):
        assert_close(ours, wanted.to(dtype))


@each_case
@own_sinks
def test_gradients_are_those_of_the_definition(case: Case, own: bool) -> None:
    compare(case, torch.float32, own, scale=0.21)


@own_sinks
@pytest.mark.parametrize("name", BFLOAT16)
def test_gradients_in_bfloat16_are_those_of_the_definition(name: str, own: bool) -> None:
    compare(CASES[name], torch.bfloat16, own)


def test_gradients_do_not_need_the_kernels() -> None:
    with at_torch():
        compare(MORE["several blocks, window and sinks"], torch.float32, own=True)


@each_dtype
def test_the_forward_pass_is_that_of_inference_bit_for_bit(dtype: torch.dtype) -> None:
    case = CASES["window and sinks"]
    q, keys, sinks = inputs(case, dtype)
    expected = window_softmax(q, keys, sinks, **where(case))
    got = window_softmax(q.clone().requires_grad_(), keys, sinks, **where(case))
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_a_gradient_of_the_gradient_is_refused() -> None:
    q, keys, _ = inputs(CASES["odd sizes"], torch.float32)
    out, _ = window_softmax(q.requires_grad_(), keys)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_memory_does_not_grow_with_the_square_of_the_tokens() -> None:
    q, keys, _ = inputs(Case(3000, 3000, 2, 1, 4, 6), torch.float32, rows=1)
    leaves = [x.requires_grad_() for x in (q, *keys[:2])]
    out, mass = window_softmax(leaves[0], Keys(*leaves[1:]), window_tokens=9)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with at_torch(), Watch():
        torch.autograd.grad((out.sum() + mass.sum()), leaves)
    assert 0 < largest <= max(softmax_gradient.TILE_SCORES, 3000 * 2 * 8)


# ---- the kernel ------------------------------------------------------------------------------


@native
@each_level
@each_case
def test_the_kernel_is_the_definition_at_every_level(case: Case, level: int) -> None:
    with at_level(level):
        compare(case, torch.float32, own=level % 2 == 0, scale=0.21)


@native
@each_level
@pytest.mark.parametrize("name", BFLOAT16)
def test_the_kernel_in_bfloat16_is_the_definition_at_every_level(name: str, level: int) -> None:
    with at_level(level):
        compare(CASES[name], torch.bfloat16, own=level % 2 == 0)


@native
@each_level
@each_dtype
def test_the_kernel_writes_every_gradient_and_reads_nothing_behind(
    dtype: torch.dtype, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that no query sees are NaN; so is memory that nothing was written to."""
    case = Case(66, 150, 6, 2, 10, 130, 3, 3, 40, 20)
    leaves = leaves_of(case, dtype, own=True)
    clean = [x.clone() for x in leaves]
    unseen = [slice(0, 18), slice(103, None)]
    for some in unseen:
        leaves[2][:, :, some] = leaves[3][:, :, some] = torch.nan
    empty = Tensor.new_empty

    def poisoned(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return empty(x, *args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x, x.shape))
    with at_level(level):
        got = gradients(run(window_softmax, True, case), leaves)
        expected = gradients(run(window_softmax, True, case), clean)
    for ours, wanted in zip(got, expected, strict=True):
        assert torch.equal(ours, wanted)
    for some in unseen:
        assert not got[2][:, :, some].any()
        assert not got[3][:, :, some].any()


@native
@each_dtype
def test_threads_do_not_show_in_the_bits_of_gradients(dtype: torch.dtype) -> None:
    case = Case(1100, 1100, 6, 1, 64, 64, 4, 4, 4, 90)
    leaves, found = leaves_of(case, dtype, own=True), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            set_threads(count)
            found.append(gradients(run(window_softmax, True, case), leaves))
    finally:
        set_threads(threads)
    for some in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(some, found[0], strict=True))
