"""Gradients of the far memory's op against autograd through its definition, token by token."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradients import gradients
from kernels import at_level, at_torch, each_level, native
from mixers import normal
from respike.device import set_threads
from respike.ops.far import Prototypes, far, share_denominator
from respike.ops.gla import gla_definition
from tolerance import assert_close

B, H, G, K, V, F = 2, 6, 3, 10, 8, 5
DTYPES = (torch.float32, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
MEMORY = torch.cat((normal(B, G, F, V, seed=20), normal(B, G, F, 1, seed=21).abs()), -1)


def leaves(T: int, dtype: torch.dtype, shut: bool = False) -> list[Tensor]:
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, V), (B, T, H, V), (B, T, H))
    tensors = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    tensors = [*(x.to(dtype) for x in tensors[:4]), tensors[4]]
    weights = [normal(*s, seed=9 + i) for i, s in enumerate(((G, F, K), (G, F), (H, F, K), (H,)))]
    if shut:
        weights[3][1] = -torch.inf
    return [*tensors, *weights, torch.tensor([-0.5, -0.05, -0.001])]


def by_definition(real: Tensor, memory: Tensor, given: list[Tensor]) -> Tensor:
    """The op written out with `gla_definition`, without any scaling of the exponentials."""
    q, k, v, near, mass, *rest = given
    prototypes = Prototypes(*rest)
    step = torch.arange(q.shape[1])
    ages = (step < real[:, 1:])[:, :, None, None]
    leaving = ages & (step >= real[:, :1])[:, :, None, None]
    read, _ = gla_definition(
        prototypes.log_query(q).exp(),
        prototypes.key_features(k) * leaving,
        torch.cat((v, torch.ones_like(v[..., :1])), -1),
        prototypes.log_decay[:, None] * ages,
        memory,
        scale=1.0,
    )
    total = read[..., -1]
    some = total > 0
    total = total.where(some, 1)
    return share_denominator(
        near, mass, read[..., :-1] / total[..., None], total.log().where(some, -torch.inf)
    )[0]


CASES = {
    "fresh": ([[4, 21], [4, 21]], False),
    "from a memory": ([[-7, 21], [0, 21]], True),
    "ragged": ([[3, 21], [0, 13]], True),
    "nothing leaves": ([[30, 21], [25, 21]], False),
}


@each_dtype
@pytest.mark.parametrize(("real", "remembers"), CASES.values(), ids=CASES)
def test_gradients_are_those_of_the_definition(
    real: list[list[int]], remembers: bool, dtype: torch.dtype
) -> None:
    rows, memory = torch.tensor(real), MEMORY if remembers else torch.zeros_like(MEMORY)
    given = leaves(21, dtype)

    def ours(q: Tensor, k: Tensor, v: Tensor, near: Tensor, mass: Tensor, *rest: Tensor) -> Tensor:
        return far(q, k, v, rows, Prototypes(*rest), memory, (near, mass))[0]

    got = gradients(ours, given)
    expected = gradients(
        lambda *x: by_definition(rows, memory, list(x)), [x.float() for x in given]
    )
    for grad, wanted, leaf in zip(got, expected, given, strict=True):
        assert_close(grad, wanted.to(leaf.dtype), dtype)


def test_chunks_do_not_show() -> None:
    rows, given = torch.tensor([[0, 300], [9, 260]]), leaves(300, torch.float32)
    got = gradients(
        lambda q, k, v, near, mass, *p: far(q, k, v, rows, Prototypes(*p), MEMORY, (near, mass))[0],
        given,
    )
    expected = gradients(lambda *x: by_definition(rows, MEMORY, list(x)), given)
    for grad, wanted in zip(got, expected, strict=True):
        assert_close(grad, wanted)


def test_a_shut_head_gives_gradients_of_zero_and_no_nan() -> None:
    rows, given = torch.tensor([[2, 21], [0, 21]]), leaves(21, torch.float32, shut=True)
    got = gradients(
        lambda q, k, v, near, mass, *p: far(q, k, v, rows, Prototypes(*p), MEMORY, (near, mass))[0],
        given,
    )
    assert all(grad.isfinite().all() for grad in got)
    q, _, _, _, mass, _, _, query_weight, beta, _ = got
    for grad in (q[:, :, 1], mass[:, :, 1], query_weight[1], beta[1]):
        assert (grad == 0).all()
    assert (beta[[0, 2, 3, 4, 5]] != 0).all()


@each_dtype
def test_the_forward_pass_is_that_of_inference_bit_for_bit(dtype: torch.dtype) -> None:
    rows, (q, k, v, near, mass, *rest) = torch.tensor([[2, 21], [0, 13]]), leaves(21, dtype)
    expected = far(q, k, v, rows, Prototypes(*rest), MEMORY, (near, mass))
    got = far(q.requires_grad_(), k, v, rows, Prototypes(*rest), MEMORY, (near, mass))
    assert got[0].requires_grad
    assert not got[1].requires_grad
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_a_gradient_of_the_gradient_or_of_the_memory_is_refused() -> None:
    rows, (q, k, v, near, mass, *rest) = torch.tensor([[2, 5], [0, 5]]), leaves(5, torch.float32)
    out, _ = far(q.requires_grad_(), k, v, rows, Prototypes(*rest), MEMORY, (near, mass))
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises(ValueError, match="is a cache"):
        far(q, k, v, rows, Prototypes(*rest), MEMORY.clone().requires_grad_(), (near, mass))


# ---- the kernel ------------------------------------------------------------------------------


def in_ours(rows: Tensor, memory: Tensor) -> Callable[..., Tensor]:
    def form(q: Tensor, k: Tensor, v: Tensor, near: Tensor, mass: Tensor, *rest: Tensor) -> Tensor:
        return far(q, k, v, rows, Prototypes(*rest), memory, (near, mass))[0]

    return form


@native
@each_level
@each_dtype
@pytest.mark.parametrize(("real", "remembers"), CASES.values(), ids=CASES)
def test_the_kernel_is_the_definition_at_every_level(
    real: list[list[int]], remembers: bool, dtype: torch.dtype, level: int
) -> None:
    rows, memory = torch.tensor(real), MEMORY if remembers else torch.zeros_like(MEMORY)
    given = leaves(21, dtype)
    with at_level(level):
        got = gradients(in_ours(rows, memory), given)
    expected = gradients(
        lambda *x: by_definition(rows, memory, list(x)), [x.float() for x in given]
    )
    for grad, wanted, leaf in zip(got, expected, given, strict=True):
        assert_close(grad, wanted.to(leaf.dtype), dtype)


def test_gradients_do_not_need_the_kernel() -> None:
    rows, given = torch.tensor([[3, 40], [0, 31]]), leaves(40, torch.float32)
    got = gradients(in_ours(rows, MEMORY), given)
    with at_torch():
        expected = gradients(in_ours(rows, MEMORY), given)
    for grad, wanted in zip(got, expected, strict=True):
        assert_close(grad, wanted)


@native
@each_level
@each_dtype
def test_the_kernel_writes_every_gradient_and_reads_nothing_else(
    dtype: torch.dtype, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What never leaves the window is NaN; so is memory that nothing was written to."""
    rows, given = torch.tensor([[5, 19], [0, 13]]), leaves(21, dtype)
    clean = [x.clone() for x in given]
    for x in given[1:3]:
        x[0, :5] = x[0, 19:] = x[1, 13:] = torch.nan
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *shape: empty(x, *shape).fill_(torch.nan))
    with at_level(level):
        got = gradients(in_ours(rows, MEMORY), given)
        expected = gradients(in_ours(rows, MEMORY), clean)
    for ours, wanted in zip(got, expected, strict=True):
        assert torch.equal(ours, wanted)
    for grad in got[1:3]:
        assert not grad[0, :5].any()
        assert not grad[1, 13:].any()


@native
@each_dtype
def test_threads_do_not_show_in_the_bits_of_gradients(dtype: torch.dtype) -> None:
    rows, given, found = torch.tensor([[0, 200], [9, 150]]), leaves(200, dtype), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            set_threads(count)
            found.append(gradients(in_ours(rows, MEMORY), given))
    finally:
        set_threads(threads)
    for some in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(some, found[0], strict=True))
