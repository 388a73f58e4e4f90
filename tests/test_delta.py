"""The gated delta rule: the definition in words, and every other form against it."""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

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
    uniform,
)
from respike.ops import recurrence
from respike.ops.delta import delta, delta_definition, delta_step, unit_silu
from tolerance import assert_close

each_decay = pytest.mark.parametrize("decay", DECAYS)
STATE = normal(B, G, K, V, seed=3)


@pytest.fixture(autouse=True)
def _in_torch() -> Iterator[None]:
    """Kernels have tests of their own."""
    with at_torch():
        yield


def inputs(T: int, decay: str = "mixture") -> list[Tensor]:
    """Keys of length 1; beta from 0 to 2, and some of both."""
    q, k, v = normal(B, T, H, K, seed=0), normal(B, T, G, K, seed=1), normal(B, T, G, V, seed=2)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    beta = (2.4 * uniform(B, T, G, seed=4) - 0.2).clamp(0, 2)
    return [q, k, v, beta, DECAYS[decay]((B, T, G))]


def chunked(chunk_tokens: int) -> Op:
    return functools.partial(delta, chunk_tokens=chunk_tokens)


def in_words(tensors: list[Tensor], state: Tensor, scale: float) -> tuple[Array, Array]:
    """Head by head and token by token in float64, as the report writes it."""
    q, k, v, beta, log_decay = (x.double().numpy() for x in tensors)
    T, heads, groups = q.shape[1], q.shape[2], k.shape[2]
    out, last = np.zeros((B, T, heads, V)), np.zeros((B, groups, K, V))
    for b, h in itertools.product(range(B), range(heads)):
        g = h // (heads // groups)
        S = state[b, g].double().numpy()
        for t in range(T):
            key, alpha = k[b, t, g], np.exp(log_decay[b, t, g])
            erase = np.eye(K) - beta[b, t, g] * np.outer(key, key)
            S = alpha * (erase @ S) + beta[b, t, g] * np.outer(key, v[b, t, g])
            out[b, t, h] = scale * (S.T @ q[b, t, h])
        last[b, g] = S
    return out, last


# ---- the definition, and the forms that run --------------------------------------------------


@each_decay
def test_every_form_is_what_the_words_say(decay: str) -> None:
    tensors = inputs(140, decay)
    expected = in_words(tensors, STATE, K**-0.5)
    assert_same(delta_definition(*tensors, STATE), expected)
    out, states = steps(delta_step, tensors, STATE)
    assert_same((out, states[-1]), expected)
    for chunk_tokens in CHUNKS:
        assert_same(delta(*tensors, STATE, chunk_tokens=chunk_tokens), expected)


@each_decay
@pytest.mark.parametrize("chunk_tokens", [1, 7, 32, 64])
def test_gradients_of_the_chunked_form(decay: str, chunk_tokens: int) -> None:
    tensors = inputs(75, decay)
    with at_torch():
        assert_same_gradients(chunked(chunk_tokens), delta_definition, tensors, STATE)


@each_decay
def test_gradients_of_the_step(decay: str) -> None:
    assert_same_gradients(delta_step, delta_definition, inputs(1, decay), STATE)


@pytest.mark.parametrize("heads_per_group", [1, 3])
def test_a_group_is_shared_by_its_heads(heads_per_group: int) -> None:
    tensors = inputs(40)
    tensors[0] = normal(B, 40, G * heads_per_group, K, seed=7)
    expected = in_words(tensors, STATE, 1.7)
    for op in (delta_definition, delta):
        assert_same(op(*tensors, STATE, scale=1.7), expected)
    assert_same(
        delta_step(*tokens(tensors, 0, 1), STATE, scale=1.7),
        in_words(tokens(tensors, 0, 1), STATE, 1.7),
    )
    apart = [tensors[0], *(x.repeat_interleave(heads_per_group, 2) for x in tensors[1:])]
    out, _ = delta(*apart, STATE.repeat_interleave(heads_per_group, 1), scale=1.7)
    assert_close(out, torch.as_tensor(expected[0]).float())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("form", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
def test_it_is_the_rule_of_transformers(form: Op, normalise: bool) -> None:
    """It has a state for each head, scales queries by 1 / sqrt(K), can normalise by itself."""
    q, k, v, beta, log_decay = inputs(150, "to -0.1")
    q, k = 3 * normal(B, 150, H, K, seed=0) if normalise else q, 3 * k if normalise else k
    apart = [x.repeat_interleave(H // G, 2) for x in (k, v, log_decay, beta)]
    theirs, last = form(
        q, *apart, initial_state=STATE.repeat_interleave(H // G, 1), output_final_state=True,
        use_qk_l2norm_in_kernel=normalise,
    )  # fmt: skip
    if normalise:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    out, state = delta(q, k, v, beta, log_decay, STATE)
    assert_close(out, theirs)
    assert_close(state, last[:, :: H // G])


# ---- what the rule is for --------------------------------------------------------------------


def test_beta_zero_writes_nothing() -> None:
    for T, op in ((70, delta), (70, delta_definition), (1, delta_step)):
        q, k, v, beta, log_decay = inputs(T, "none")
        _, state = op(q, k, v, torch.zeros_like(beta), log_decay, STATE)
        assert torch.equal(state, STATE)


def test_beta_one_reads_back_what_was_just_written() -> None:
    for T, op in ((70, delta), (70, delta_definition), (1, delta_step)):
        _, k, v, beta, log_decay = inputs(T, "none")
        read = k / 0.3
        out, _ = op(read, k, v, torch.ones_like(beta), log_decay, STATE, scale=0.3)
        assert_close(out, v)


def test_one_key_after_another_is_a_table_of_values() -> None:
    """Unit vectors as keys: values stand to the last bit, until the key is written again."""
    T = 2 * K
    k = torch.eye(K).repeat(2, 1)[None, :, None].expand(B, T, G, K)
    written = [k, k, normal(B, T, G, V, seed=2), torch.ones(B, T, G), torch.zeros(B, T, G)]
    _, state = delta(*tokens(written, 0, K), torch.zeros_like(STATE))
    assert torch.equal(state, written[2][:, :K].transpose(1, 2))
    _, state = delta(*written, STATE)
    assert_close(state, written[2][:, K:].transpose(1, 2))


# ---- any length, any split -------------------------------------------------------------------


def test_every_length() -> None:
    tensors = inputs(300)
    out, states = steps(delta_step, tensors, STATE)
    assert_same((out, states[-1]), delta_definition(*tensors, STATE))
    for T in range(1, 301):
        assert_same(delta(*tokens(tensors, 0, T), STATE), (out[:, :T], states[T]))
        rest = delta(*tokens(tensors, T - 1, None), states[T - 1])
        assert_same(rest, (out[:, T - 1 :], states[300]))


@pytest.mark.parametrize("T", SPLIT_LENGTHS)
def test_every_split_in_two(T: int) -> None:
    tensors = inputs(T)
    expected = delta_definition(*tensors, STATE)
    for cut in range(T + 1):
        assert_same(in_parts(delta, tensors, STATE, [cut]), expected)


@given(
    cuts=st.lists(st.integers(0, 300), max_size=6),
    T=st.integers(1, 300),
    chunk_tokens=st.integers(1, 130),
    decay=st.sampled_from(list(DECAYS)),
)
@settings(max_examples=40, deadline=None)
def test_any_split(cuts: list[int], T: int, chunk_tokens: int, decay: str) -> None:
    tensors = inputs(T, decay)
    parts = in_parts(chunked(chunk_tokens), tensors, STATE, [min(cut, T) for cut in cuts])
    assert_same(parts, delta(*tensors, STATE))


def test_more_than_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "BLOCK_TOKENS", 50)
    tensors = inputs(230)
    for chunk_tokens in (16, 64):
        op = chunked(chunk_tokens)
        assert_same(op(*tensors, STATE), delta_definition(*tensors, STATE))
    assert_same_gradients(op, delta_definition, tensors, STATE)


def test_no_tokens() -> None:
    for op in (delta, delta_definition):
        out, state = op(*inputs(0), STATE)
        assert out.shape == (B, 0, H, V)
        assert out.dtype == torch.float32
        assert torch.equal(state, STATE)


# ---- numbers that hurt -----------------------------------------------------------------------


def test_minus_infinity_forgets_everything() -> None:
    tensors = inputs(90, "to -0.1")
    tensors[4][:, 41] = -torch.inf
    out, state = delta(*tensors, 1e30 * STATE)
    fresh = delta_definition(*tokens(tensors, 41, None), torch.zeros_like(STATE))
    assert_same((out[:, 41:], state), fresh)
    assert all(grad.isfinite().all() for grad in gradients(delta, tensors, STATE))


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_one_key_again_and_again(strength: float) -> None:
    """The worst system there is: every entry of its matrix is beta."""
    q, k, v, beta, log_decay = inputs(200, "none")
    k, beta = torch.zeros_like(k), torch.full_like(beta, strength)
    k[..., 2:6] = torch.tensor([0.5, -0.5, 0.5, 0.5])  # of length 1 to the last bit
    expected = in_words([q, k, v, beta, log_decay], STATE, K**-0.5)
    assert_same(delta(q, k, v, beta, log_decay, STATE, chunk_tokens=64), expected)


def test_bf16_inputs_do_not_drift() -> None:
    exact = inputs(512, "to -0.1")
    rounded = [*(x.bfloat16() for x in exact[:3]), *exact[3:]]
    out, states = steps(delta_step, rounded, STATE)
    for op in (delta, delta_definition):
        assert_same(op(*rounded, STATE), (out, states[-1]))
    assert_same((out, states[-1]), in_words([x.float() for x in rounded], STATE, K**-0.5))
    unrounded = delta(*exact, STATE)
    assert_close(out, unrounded[0], torch.bfloat16)
    assert_close(states[-1], unrounded[1], torch.bfloat16)


@pytest.mark.usefixtures("poison")
def test_nothing_unset_is_read() -> None:
    tensors = inputs(45)
    assert_same(delta(*tensors, STATE), in_words(tensors, STATE, K**-0.5))
    for grad in gradients(delta, tensors, STATE):
        assert grad.isfinite().all()


def test_no_input_is_written_to() -> None:
    for T, op in ((70, delta), (70, delta_definition), (1, delta_step)):
        given = [*inputs(T), STATE.clone()]
        before = [x.clone() for x in given]
        op(*given)
        assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_layout_of_the_inputs_does_not_matter() -> None:
    tensors = inputs(70)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    state = STATE.transpose(2, 3).contiguous().transpose(2, 3)
    assert_same(delta(*turned, state), delta(*tensors, STATE))


def test_padding_changes_nothing() -> None:
    q, k, v, beta, log_decay = inputs(70)
    for T, op in ((70, delta), (70, delta_definition), (1, delta_step)):
        nothing = [torch.zeros_like(x[:, :T]) for x in (beta, log_decay)]
        _, state = op(q[:, :T], torch.zeros_like(k[:, :T]), v[:, :T], *nothing, STATE)
        assert torch.equal(state, STATE)


def test_a_chunk_has_tokens() -> None:
    with pytest.raises(ValueError, match="chunk_tokens is -1"):
        delta(*inputs(5), STATE, chunk_tokens=-1)


# ---- keys of length 1 ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unit_silu_is_what_its_text_says(dtype: torch.dtype) -> None:
    x = (4 * normal(B, 5, G, K, seed=11)).to(dtype)
    x[0, 0] = 0
    x64 = x.double().numpy()
    z = x64 / (1 + np.exp(-x64))
    expected = z / np.sqrt((z * z).sum(-1, keepdims=True) + 1e-3)
    assert_close(unit_silu(x, eps=1e-3), torch.as_tensor(expected).float())
    lengths = unit_silu(x).norm(dim=-1)
    assert lengths[0, 0].eq(0).all()
    assert_close(lengths[1], torch.ones(5, G))


def test_unit_silu_of_zeros_has_a_gradient() -> None:
    x = torch.zeros(B, K, requires_grad=True)
    unit_silu(x).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), 500.0, rtol=1e-5)
