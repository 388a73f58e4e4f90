"""Sparse state expansion: the paper's loop in float64, and every form against it.

Letters as in `respike.ops.sse`.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import at_level, at_torch, each_level, native
from recurrent import Array, B, G, H, K, V, normal, uniform
from respike.ops.delta import unit
from respike.ops.routing import balance_loss, kept_gates, route
from respike.ops.sse import Choice, Stream, gated, sse, sse_definition
from tolerance import assert_close

N, C = 5, 2
STATE = normal(B, 1 + N, G, K, V, seed=30)
FORMS = {"definition": sse_definition, "fast": sse}
both_gates = pytest.mark.parametrize("corrected", [False, True], ids=["released", "corrected"])


@pytest.fixture(autouse=True)
def _in_torch() -> Iterator[None]:
    """The kernel of the delta rule has tests of its own."""
    with at_torch():
        yield


def stream(T: int, seed: int) -> Stream:
    return Stream(
        3 * normal(B, T, H, K, seed=seed),
        2 * normal(B, T, G, K, seed=seed + 1),
        uniform(B, T, G, seed=seed + 2),
        -0.2 * uniform(B, T, G, seed=seed + 3),
    )


def inputs(T: int, real: Tensor | None = None) -> tuple[Stream, Stream, Tensor, Choice]:
    shares, index = route(2 * normal(B, T, N, seed=20), C)
    return stream(T, 0), stream(T, 10), normal(B, T, G, V, seed=21), Choice(shares, index, real)


def unit_in_words(x: Array) -> Array:
    return x / np.sqrt((x * x).sum() + 1e-6)


def in_words(
    shared: Stream, sparse: Stream, v: Tensor, choice: Choice, state: Tensor, *, corrected: bool
) -> tuple[Tensor, Tensor]:
    """Token by token, head by head; every head has its own copy of its group's state."""
    one, two = ([x.double().numpy() for x in part] for part in (shared, sparse))
    value, shares, T = v.double().numpy(), choice.shares.double().numpy(), v.shape[1]
    S = state.double().repeat_interleave(H // G, 2).numpy()
    out = np.zeros((B, T, H, V))
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        if choice.real is not None and not choice.real[b, t]:
            continue
        g = h // (H // G)
        visits = [(0, one, None)]
        visits += [(1 + int(n), two, shares[b, t, n]) for n in choice.where[b, t]]
        for p, (q, k, beta, log_decay), eta in visits:
            query, key = q[b, t, h], k[b, t, g]
            if eta is not None and not corrected:
                query, key = eta * query, eta * key
            query, key = unit_in_words(query), unit_in_words(key)
            if eta is not None and corrected:
                query, key = eta * query, eta * key
            M = np.exp(log_decay[b, t, g]) * S[b, p, h]
            M = M + np.outer(key, beta[b, t, g] * (value[b, t, g] - M.T @ key))
            S[b, p, h] = M
            out[b, t, h] += M.T @ query / np.sqrt(K)
    return torch.from_numpy(out).float(), torch.from_numpy(S[:, :, :: H // G]).float()


# ---- every form is what the words say --------------------------------------------------------


@both_gates
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 2, 39])
def test_every_form_is_what_the_words_say(form: str, T: int, corrected: bool) -> None:
    got = FORMS[form](*inputs(T), STATE, corrected=corrected)
    for ours, wanted in zip(got, in_words(*inputs(T), STATE, corrected=corrected), strict=True):
        assert_close(ours, wanted)


@both_gates
@pytest.mark.parametrize("T", [1, 17])
def test_gradients_are_those_of_the_definition(T: int, corrected: bool) -> None:
    grads = []
    for form in FORMS.values():
        shared, sparse, v, choice = inputs(T)
        leaves = [*shared, *sparse, v, choice.shares, STATE]
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        one, two = Stream(*leaves[:4]), Stream(*leaves[4:8])
        given = Choice(leaves[9], choice.where)
        out, after = form(one, two, leaves[8], given, leaves[10], corrected=corrected)
        loss = (out * normal(*out.shape, seed=8)).sum()
        loss = loss + (after * normal(*after.shape, seed=9)).sum()
        grads.append(torch.autograd.grad(loss, leaves))
    names = [f"{a}.{b}" for a in ("shared", "sparse") for b in Stream._fields]
    for name, ours, wanted in zip([*names, "v", "shares", "state"], *grads, strict=True):
        if name == "shares" and not corrected:
            # What undoes the share leaves of its gradient the rounding of a difference.
            assert (ours - wanted).abs().max() < 1e-5
            continue
        assert wanted.abs().max() > 1e-3, name
        assert_close(ours, wanted)


# ---- what routing means ----------------------------------------------------------------------


def test_released_gates_cancel_and_corrected_gates_act() -> None:
    """The same choice with other shares: no difference as released, a large one corrected."""
    shared, sparse, v, choice = inputs(25)
    flat = Choice(torch.full_like(choice.shares, 0.25), choice.where)
    change = {}
    for corrected in (False, True):
        before, _ = sse(shared, sparse, v, choice, STATE, corrected=corrected)
        after, _ = sse(shared, sparse, v, flat, STATE, corrected=corrected)
        change[corrected] = float((after - before).norm() / before.norm())
    assert change[False] < 1e-4
    assert change[True] > 0.1


def test_the_router_learns_only_where_gates_act() -> None:
    sizes = []
    for corrected in (False, True):
        shared, sparse, v, choice = inputs(25)
        logits = (2 * normal(B, 25, N, seed=20)).requires_grad_()
        given = Choice(route(logits, C)[0], choice.where)
        out, _ = sse(shared, sparse, v, given, STATE, corrected=corrected)
        (grad,) = torch.autograd.grad((out * normal(*out.shape, seed=8)).sum(), logits)
        sizes.append(float(grad.norm()))
    assert sizes[0] < 1e-4 * sizes[1]


@both_gates
@pytest.mark.parametrize("T", [1, 23])
def test_partitions_that_were_not_chosen_keep_every_bit(T: int, corrected: bool) -> None:
    shared, sparse, v, choice = inputs(T)
    index = torch.tensor([3, 1]).expand(B, T, C)
    _, after = sse(shared, sparse, v, Choice(choice.shares, index), STATE, corrected=corrected)
    for n in range(N):
        assert torch.equal(after[:, 1 + n], STATE[:, 1 + n]) == (n not in (1, 3))


def test_all_partitions_chosen_are_as_many_dense_memories() -> None:
    """Each then is a gated delta rule over every token, scaled by its share."""
    from respike.ops.delta import delta

    shared, sparse, v, choice = inputs(31)
    index = torch.arange(N).expand(B, 31, N)
    everyone = Choice(choice.shares, index)
    out, after = sse(shared, sparse, v, everyone, STATE, corrected=True)
    wanted, first = delta(
        unit(shared.q), unit(shared.k), v, shared.beta, shared.log_decay, STATE[:, 0]
    )
    states = [first]
    for n in range(N):
        q, k = (gated(x, choice.shares[..., n], corrected=True) for x in sparse[:2])
        read, memory = delta(q, k, v, sparse.beta, sparse.log_decay, STATE[:, 1 + n])
        wanted = wanted + read
        states.append(memory)
    assert_close(out, wanted)
    assert_close(after, torch.stack(states, 1))


@pytest.mark.parametrize("released_share", [1.0, 0.25, 0.02])
def test_how_exactly_the_released_gate_cancels(released_share: float) -> None:
    x = 2 * normal(7, H, K, seed=3)
    got = gated(x, torch.full((7,), released_share), corrected=False)
    assert float((got - unit(x)).norm() / unit(x).norm()) < 1e-4


# ---- any split, padding ----------------------------------------------------------------------


def part(
    given: tuple[Stream, Stream, Tensor, Choice], at: slice
) -> tuple[Stream, Stream, Tensor, Choice]:
    shared, sparse, v, choice = given
    real = None if choice.real is None else choice.real[:, at]
    cut = [Stream(*(x[:, at] for x in one)) for one in (shared, sparse)]
    return cut[0], cut[1], v[:, at], Choice(choice.shares[:, at], choice.where[:, at], real)


def in_parts(T: int, cuts: Sequence[int], corrected: bool) -> tuple[Tensor, Tensor]:
    outs, state, given = [], STATE, inputs(T)
    for begin, end in itertools.pairwise([0, *sorted({min(c, T) for c in cuts}), T]):
        if begin < end:
            out, state = sse(*part(given, slice(begin, end)), state, corrected=corrected)
            outs.append(out)
    return torch.cat(outs, 1), state


@given(
    T=st.integers(1, 90),
    cuts=st.lists(st.integers(1, 89), max_size=5),
    corrected=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_split(T: int, cuts: list[int], corrected: bool) -> None:
    whole = sse(*inputs(T), STATE, corrected=corrected)
    for ours, wanted in zip(in_parts(T, cuts, corrected), whole, strict=True):
        assert_close(ours, wanted)


@both_gates
def test_steps_are_the_pass(corrected: bool) -> None:
    whole = sse(*inputs(29), STATE, corrected=corrected)
    for ours, wanted in zip(in_parts(29, range(29), corrected), whole, strict=True):
        assert_close(ours, wanted)


@both_gates
@pytest.mark.parametrize("T", [1, 12])
def test_padding_goes_nowhere(T: int, corrected: bool) -> None:
    real = torch.arange(T) < torch.tensor([[T - 1], [T]])
    given = inputs(T, real)
    out, after = sse(*given, STATE, corrected=corrected)
    wanted = in_words(*given, STATE, corrected=corrected)
    assert_close(out[real], wanted[0][real])
    assert_close(after, wanted[1])
    none = inputs(T, torch.zeros(B, T, dtype=torch.bool))
    _, after = sse(*none, STATE, corrected=corrected)
    assert torch.equal(after, STATE)


def test_no_tokens_and_nothing_written_to() -> None:
    out, after = sse(*inputs(0), STATE, corrected=True)
    assert out.shape == (B, 0, H, V)
    assert torch.equal(after, STATE)
    for T in (1, 9):
        given, state = inputs(T), STATE.clone()
        before = [x.clone() for x in (*given[0], *given[1], given[2], *given[3][:2], state)]
        sse(*given, state, corrected=False)
        now = (*given[0], *given[1], given[2], *given[3][:2], state)
        assert all(torch.equal(x, y) for x, y in zip(now, before, strict=True))


@pytest.mark.usefixtures("poison")
def test_nothing_unset_is_read() -> None:
    for T in (1, 21):
        for x in sse(*inputs(T), STATE, corrected=True):
            assert not x.isnan().any()


@native
@each_level
@both_gates
def test_with_the_kernel_of_the_delta_rule(level: int, corrected: bool) -> None:
    for T in (1, 70):
        wanted = sse_definition(*inputs(T), STATE, corrected=corrected)
        with at_level(level):
            got = sse(*inputs(T), STATE, corrected=corrected)
        for ours, theirs in zip(got, wanted, strict=True):
            assert_close(ours, theirs)


# ---- routing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_routing_is_what_its_words_say(router: str) -> None:
    logits = normal(3, 11, N, seed=4)
    shares, index = route(logits.bfloat16(), C, router)  # type: ignore[arg-type]
    x = logits.bfloat16().double().numpy()
    wanted = 1 / (1 + np.exp(-x))
    if router == "softmax":
        wanted = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    assert_close(shares, torch.from_numpy(wanted).float())
    assert torch.equal(index, torch.from_numpy(np.argsort(-wanted, -1)[..., :C].copy()))
    raw = kept_gates(shares, index, normalised=False)
    assert torch.equal(raw, shares.gather(-1, index))
    assert_close(kept_gates(shares, index, normalised=True).sum(-1), torch.ones(3, 11))


def test_a_normalised_single_gate_is_one_and_has_a_gradient() -> None:
    logits = normal(6, N, seed=4).requires_grad_()
    gates = kept_gates(*route(logits, 1), normalised=True)
    assert torch.equal(gates, torch.ones(6, 1))
    (grad,) = torch.autograd.grad((gates[:, 0] * normal(6, seed=5)).sum(), logits)
    assert grad.abs().amax(-1).gt(1e-3).all()


def test_balance_is_one_when_even_and_counts_real_tokens_only() -> None:
    even = torch.eye(N).repeat(2, 1)  # each thing is best twice
    shares = even * 0.6 + 0.1
    index = shares.topk(1).indices
    assert_close(balance_loss(shares, index), torch.tensor(1.0))
    uneven = torch.zeros(10, 1, dtype=torch.long)
    one = torch.zeros(10, N).index_fill(1, torch.tensor([0]), 1.0)
    assert_close(balance_loss(one, uneven), torch.tensor(float(N)))
    real = torch.arange(10) < 4
    some = balance_loss(torch.cat((shares[:4], one[:6])), torch.cat((index[:4], uneven[:6])), real)
    assert_close(some, balance_loss(shares[:4], index[:4]))


def test_balance_in_words() -> None:
    shares, index = route(normal(4, 9, N, seed=6), C, "sigmoid")
    p = (shares / shares.sum(-1, keepdim=True)).double().numpy().reshape(-1, N).mean(0)
    f = np.bincount(index.flatten().numpy(), minlength=N) / 36
    wanted = torch.tensor(N / C * float((p * f).sum()), dtype=torch.float32)
    assert_close(balance_loss(shares, index), wanted)
