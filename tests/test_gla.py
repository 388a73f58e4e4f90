"""Gated linear attention: the definition in words, and every other form against it."""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import at_torch
from recurrent import (
    CHUNKS,
    DECAYS,
    SPLIT_LENGTHS,
    Array,
    B,
    G,
    H,
    K,
    Op,
    V,
    assert_same,
    assert_same_gradients,
    gradients,
    in_parts,
    normal,
    steps,
    tokens,
)
from respike.ops import recurrence
from respike.ops.gla import gla, gla_definition, gla_step, tied_gate
from tolerance import assert_close

WIDTHS = {"per channel": K, "one decay": 1}
each_width = pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
each_decay = pytest.mark.parametrize("decay", DECAYS)
STATE = normal(B, G, K, V, seed=3)


@pytest.fixture(autouse=True)
def _in_torch() -> Iterator[None]:
    """Kernels have tests of their own."""
    with at_torch():
        yield


def inputs(T: int, width: int, decay: str = "mixture") -> list[Tensor]:
    q, k, v = normal(B, T, H, K, seed=0), normal(B, T, G, K, seed=1), normal(B, T, G, V, seed=2)
    return [q, k, v, DECAYS[decay]((B, T, G, width))]


def chunked(chunk_tokens: int) -> Op:
    return functools.partial(gla, chunk_tokens=chunk_tokens)


def in_words(tensors: list[Tensor], state: Tensor, scale: float) -> tuple[Array, Array]:
    """Head by head and token by token in float64."""
    q, k, v, log_decay = (x.double().numpy() for x in tensors)
    T, heads, groups = q.shape[1], q.shape[2], k.shape[2]
    out, last = np.zeros((B, T, heads, V)), np.zeros((B, groups, K, V))
    for b, h in itertools.product(range(B), range(heads)):
        g = h // (heads // groups)
        S = state[b, g].double().numpy()
        for t in range(T):
            S = np.exp(log_decay[b, t, g])[:, None] * S + np.outer(k[b, t, g], v[b, t, g])
            out[b, t, h] = scale * (S.T @ q[b, t, h])
        last[b, g] = S
    return out, last


# ---- the definition, and the forms that run --------------------------------------------------


@each_width
@each_decay
def test_every_form_is_what_the_words_say(decay: str, width: int) -> None:
    tensors = inputs(140, width, decay)
    expected = in_words(tensors, STATE, K**-0.5)
    assert_same(gla_definition(*tensors, STATE), expected)
    out, states = steps(gla_step, tensors, STATE)
    assert_same((out, states[-1]), expected)
    for chunk_tokens in CHUNKS:
        assert_same(gla(*tensors, STATE, chunk_tokens=chunk_tokens), expected)


@each_width
@each_decay
@pytest.mark.parametrize("chunk_tokens", [1, 7, 32, 64])
def test_gradients_of_the_chunked_form(decay: str, width: int, chunk_tokens: int) -> None:
    tensors = inputs(75, width, decay)
    with at_torch():
        assert_same_gradients(chunked(chunk_tokens), gla_definition, tensors, STATE)


@each_width
@each_decay
def test_gradients_of_the_step(decay: str, width: int) -> None:
    assert_same_gradients(gla_step, gla_definition, inputs(1, width, decay), STATE)


@pytest.mark.parametrize("heads_per_group", [1, 3])
@each_width
def test_a_group_is_shared_by_its_heads(width: int, heads_per_group: int) -> None:
    tensors = inputs(40, width)
    tensors[0] = normal(B, 40, G * heads_per_group, K, seed=7)
    expected = in_words(tensors, STATE, 1.7)
    for op in (gla_definition, gla):
        assert_same(op(*tensors, STATE, scale=1.7), expected)
    assert_same(
        gla_step(*tokens(tensors, 0, 1), STATE, scale=1.7),
        in_words(tokens(tensors, 0, 1), STATE, 1.7),
    )
    apart = [tensors[0], *(x.repeat_interleave(heads_per_group, 2) for x in tensors[1:])]
    out, _ = gla(*apart, STATE.repeat_interleave(heads_per_group, 1), scale=1.7)
    assert_close(out, torch.as_tensor(expected[0]).float())


def test_one_decay_is_equal_decays_of_all_channels() -> None:
    q, k, v, one = inputs(100, 1)
    assert_same(gla(q, k, v, one, STATE), gla(q, k, v, one.expand(B, 100, G, K), STATE))


# ---- any length, any split -------------------------------------------------------------------


@each_width
def test_every_length(width: int) -> None:
    tensors = inputs(300, width)
    out, states = steps(gla_step, tensors, STATE)
    assert_same((out, states[-1]), gla_definition(*tensors, STATE))
    for T in range(1, 301):
        assert_same(gla(*tokens(tensors, 0, T), STATE), (out[:, :T], states[T]))
        assert_same(
            gla(*tokens(tensors, T - 1, None), states[T - 1]), (out[:, T - 1 :], states[300])
        )


@each_width
@pytest.mark.parametrize("T", SPLIT_LENGTHS)
def test_every_split_in_two(T: int, width: int) -> None:
    tensors = inputs(T, width)
    expected = gla_definition(*tensors, STATE)
    for cut in range(T + 1):
        assert_same(in_parts(gla, tensors, STATE, [cut]), expected)


@given(
    cuts=st.lists(st.integers(0, 300), max_size=6),
    T=st.integers(1, 300),
    chunk_tokens=st.integers(1, 130),
    width=st.sampled_from([1, K]),
    decay=st.sampled_from(list(DECAYS)),
)
@settings(max_examples=40, deadline=None)
def test_any_split(cuts: list[int], T: int, chunk_tokens: int, width: int, decay: str) -> None:
    tensors = inputs(T, width, decay)
    parts = in_parts(chunked(chunk_tokens), tensors, STATE, [min(cut, T) for cut in cuts])
    assert_same(parts, gla(*tensors, STATE))


@each_width
def test_more_than_one_block(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "BLOCK_TOKENS", 50)
    tensors = inputs(230, width)
    for chunk_tokens in (16, 64):
        op = chunked(chunk_tokens)
        assert_same(op(*tensors, STATE), gla_definition(*tensors, STATE))
    assert_same_gradients(op, gla_definition, tensors, STATE)


@each_width
def test_no_tokens(width: int) -> None:
    for op in (gla, gla_definition):
        out, state = op(*inputs(0, width), STATE)
        assert out.shape == (B, 0, H, V)
        assert out.dtype == torch.float32
        assert torch.equal(state, STATE)


# ---- numbers that hurt -----------------------------------------------------------------------


@each_width
def test_minus_infinity_forgets_everything(width: int) -> None:
    tensors = inputs(90, width, "to -0.1")
    tensors[3][:, 41] = -torch.inf
    out, state = gla(*tensors, 1e30 * STATE)
    fresh = gla_definition(*tokens(tensors, 41, None), torch.zeros_like(STATE))
    assert_same((out[:, 41:], state), fresh)
    assert all(grad.isfinite().all() for grad in gradients(gla, tensors, STATE))


@each_width
def test_bf16_inputs_do_not_drift(width: int) -> None:
    exact = inputs(512, width, "to -0.1")
    rounded = [*(x.bfloat16() for x in exact[:3]), exact[3]]
    out, states = steps(gla, rounded, STATE)
    for op in (gla, gla_definition):
        assert_same(op(*rounded, STATE), (out, states[-1]))
    assert_same((out, states[-1]), in_words([x.float() for x in rounded], STATE, K**-0.5))
    unrounded = gla(*exact, STATE)
    assert_close(out, unrounded[0], torch.bfloat16)
    assert_close(states[-1], unrounded[1], torch.bfloat16)


@pytest.mark.usefixtures("poison")
@each_width
def test_nothing_unset_is_read(width: int) -> None:
    tensors = inputs(45, width)
    assert_same(gla(*tensors, STATE), in_words(tensors, STATE, K**-0.5))
    for grad in gradients(gla, tensors, STATE):
        assert grad.isfinite().all()


@each_width
def test_no_input_is_written_to(width: int) -> None:
    for T, op in ((70, gla), (70, gla_definition), (1, gla_step)):
        given = [*inputs(T, width), STATE.clone()]
        before = [x.clone() for x in given]
        op(*given)
        assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


@each_width
def test_layout_of_the_inputs_does_not_matter(width: int) -> None:
    tensors = inputs(70, width)
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in tensors]
    state = STATE.transpose(2, 3).contiguous().transpose(2, 3)
    assert_same(gla(*turned, state), gla(*tensors, STATE))


@each_width
def test_an_empty_token_changes_nothing(width: int) -> None:
    q, *rest = inputs(70, width)
    for T, op in ((70, gla), (70, gla_definition), (1, gla_step)):
        nothing = [torch.zeros_like(x[:, :T]) for x in rest]
        _, state = op(q[:, :T], *nothing, STATE)
        assert torch.equal(state, STATE)


def test_a_chunk_has_tokens() -> None:
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        gla(*inputs(5, 1), STATE, chunk_tokens=0)


# ---- the tied gate ---------------------------------------------------------------------------


def test_tied_gate_is_exact_at_any_size() -> None:
    x = torch.tensor([-80.0, -30.0, -17.0, -1.0, 0.0, 0.3, 9.0, 17.0, 30.0, 80.0, 300.0])
    x.requires_grad_()
    k, log_decay = tied_gate(x)
    x64 = x.detach().double().numpy()
    np.testing.assert_allclose(k.detach().numpy(), 1 / (1 + np.exp(-x64)), rtol=1e-6)
    np.testing.assert_allclose(log_decay.detach().numpy(), -np.logaddexp(0, x64), rtol=1e-6)
    log_decay.sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), -1 / (1 + np.exp(-x64)), rtol=1e-5)


def test_tied_gate_as_the_reports_write_it() -> None:
    T = 60
    q, x, v, _ = inputs(T, K)
    k, log_decay = tied_gate((3 * x).bfloat16())
    assert k.dtype == log_decay.dtype == torch.float32
    S = STATE.double()
    for t in range(T):
        kt = torch.sigmoid((3 * x).bfloat16().double())[:, t, :, :, None]
        S = (1 - kt) * S + kt * v[:, t, :, None].double()
    assert_close(gla(q, k, v, log_decay, STATE)[1], S.float())
