"""Block-sparse softmax against its own words, written out token by token in float64.

Letters: B batch, T tokens, H query heads, G KV groups, K head dim, V value dim, S slots.
"""

import itertools
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradients import gradients
from kernels import at_level, at_torch, each_level, native
from mixers import (
    CUTS,
    FREQUENCIES,
    Array,
    B,
    G,
    Inputs,
    K,
    double,
    in_ragged_spans,
    in_spans,
    make_span,
    mixer_inputs,
    normal,
    tensors_of,
    turned,
)
from respike.device import set_threads
from respike.errors import UsageError
from respike.layers.blocks import BlockSoftmax
from respike.layers.state import MixerState
from respike.layers.storage import VARIABLE
from respike.ops import backends
from respike.ops import blocks as blocks_op
from respike.ops.block_rule import BlockRule
from respike.ops.blocks import block_softmax, block_weights, blocks_definition, summarise
from respike.ops.rotary import rotary_frequencies, rotary_tables, rotate_definition
from respike.ops.softmax import Keys, quantise_rows
from tolerance import assert_close

F32, BF16 = torch.float32, torch.bfloat16
RULE = BlockRule(
    window_tokens=6, sink_tokens=3, block_tokens=4, summary_tokens=2, top_blocks=2,
    sink_reach_tokens=20, reach_tokens=15,
)  # fmt: skip
RULES = {
    "near": RULE,
    "true": replace(RULE, reach_tokens=None, summary_tokens=4, window_tokens=1, top_blocks=3),
    "no sinks": replace(RULE, sink_tokens=0, block_tokens=3, summary_tokens=1, top_blocks=1),
    "two sink blocks": replace(RULE, sink_tokens=5, sink_reach_tokens=11),
    "true at first": replace(RULE, true_tokens=31),
    "large blocks": replace(RULE, block_tokens=10, summary_tokens=5, top_blocks=1),
}


# ---- in words --------------------------------------------------------------------------------


def in_words(q: Array, k: Array, v: Array, rule: BlockRule) -> tuple[Array, int]:
    """One sequence from unrotated q (T, H, K) and k, v (T, G, K); how many blocks were passed by.

    Rotation is a function of positions here: a block at distance d has the query at b + d.
    """
    (T, H, _), groups, size = q.shape, k.shape[1], rule.block_tokens
    out, passed = np.zeros(q.shape), 0
    for p, g in itertools.product(range(T), range(groups)):
        heads = range(g * (H // groups), (g + 1) * (H // groups))
        near = max(0, p - rule.window_tokens + 1) // size
        sinks = math.ceil(rule.sink_tokens / size)
        held = None if p < rule.true_tokens else rule.reach_tokens

        def score(h: int, b: int, key: Array, reach: int | None, p: int = p) -> float:
            distance = p - b * size if reach is None else min(p - b * size, reach - 1)
            return turned(q[p, h], b * size + distance) @ key / math.sqrt(K)

        best = {}
        scores = {}
        for b, h in itertools.product(range(sinks, near), heads):
            keys = np.stack([turned(k[j, g], j) for j in range(b * size, (b + 1) * size)])
            means = keys.reshape(-1, rule.summary_tokens, K).mean(1)
            scores[h, b] = max(score(h, b, mean, held) for mean in means)
        for b in range(sinks, near):
            best[b] = max(
                scores[h, b] - math.log(sum(math.exp(scores[h, c]) for c in range(sinks, near)))
                for h in heads
            )
        chosen = sorted(best, key=lambda b: -best[b])[: rule.top_blocks]
        passed += len(best) - len(chosen)
        for h in heads:
            logits, values = [], []
            for j in range(p + 1):
                b = j // size
                if b >= near:
                    reach = None
                elif b < sinks:
                    reach = rule.sink_reach_tokens
                elif b in chosen:
                    reach = held
                else:
                    continue
                logits.append(score(h, b, turned(k[j, g], j), reach))
                values.append(v[j, g])
            weights = np.exp(np.array(logits) - max(logits))
            out[p, h] = (weights / weights.sum()) @ np.array(values)
    return out, passed


def expected(inputs: Inputs, rule: BlockRule) -> Tensor:
    rows = [in_words(*(double(z[b]) for z in inputs[1:]), rule) for b in range(len(inputs[1]))]
    assert all(passed for _, passed in rows), "every block was seen: nothing is tested"
    return torch.from_numpy(np.stack([out for out, _ in rows])).float()


@pytest.mark.parametrize("name", RULES)
def test_the_definition_does_what_its_words_say(name: str) -> None:
    inputs = mixer_inputs(47, 2 * G)
    assert_close(
        blocks_definition(*inputs[1:], FREQUENCIES, RULES[name]), expected(inputs, RULES[name])
    )


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_the_mixer_does_what_the_definition_says(
    name: str, backend: str, cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESPIKE_BACKEND", backend)
    backends.kernels.cache_clear()
    inputs = mixer_inputs(47, 2 * G)
    got, _ = in_spans(BlockSoftmax(RULES[name]), inputs, cuts)
    backends.kernels.cache_clear()
    assert_close(got, blocks_definition(*inputs[1:], FREQUENCIES, RULES[name]))


@given(
    tokens=st.integers(1, 70),
    cuts=st.lists(st.integers(1, 69), max_size=5),
    name=st.sampled_from(sorted(RULES)),
)
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_any_split_gives_the_same(tokens: int, cuts: list[int], name: str) -> None:
    inputs, mixer = mixer_inputs(tokens, 2 * G), BlockSoftmax(RULES[name])
    (one, whole), (many, parts) = (in_spans(mixer, inputs, c) for c in ([], cuts))
    assert_close(many, one)
    for key, tensor in tensors_of(whole).items():
        assert torch.equal(tensors_of(parts)[key][:, :, :tokens], tensor[:, :, :tokens])


@given(
    calls=st.lists(st.lists(st.integers(0, 14), min_size=3, max_size=3), min_size=1, max_size=4),
    int8=st.booleans(),
)
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_ragged_rows_give_what_each_gives_alone(calls: list[list[int]], int8: bool) -> None:
    calls = [call for call in calls if max(call)] or [[1, 0, 2]]
    mixer, inputs = BlockSoftmax(RULE, int8=int8), mixer_inputs(56, 2 * G, rows=3)
    rows, state = in_ragged_spans(mixer, inputs, calls, -50.0)
    alone: list[MixerState] = []
    for row, total in enumerate(map(sum, zip(*calls, strict=True))):
        if not total:
            continue
        one: Any = tuple(z[row : row + 1, :total] for z in inputs)
        out, part = in_spans(mixer, one, [])
        assert_close(rows[row], out[0])
        alone.append(part)
        for key, tensor in tensors_of(part).items():
            assert torch.equal(tensors_of(state)[key][row, :, :total], tensor[0, :, :total])
    joined = type(state).join(alone)
    assert {key: len(tensor) for key, tensor in tensors_of(joined).items()} == {
        key: len(alone) for key in tensors_of(state)
    }


# ---- the cache -------------------------------------------------------------------------------


@torch.no_grad()
def test_an_int8_cache_is_what_its_rounded_keys_and_values_give() -> None:
    _, q, k, v = inputs = mixer_inputs(47, 2 * G)
    places = (torch.arange(47) % RULE.block_tokens).expand(B, 47)

    def rounded(x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() * step

    cached = rounded(rotate_definition(k, *rotary_tables(places, FREQUENCIES)))
    back = rotate_definition(cached, *rotary_tables(-places, FREQUENCIES))
    wanted = blocks_definition(q, back, rounded(v), FREQUENCIES, RULE)
    got, state = in_spans(BlockSoftmax(RULE, int8=True), inputs, [20, 21])
    assert_close(got, wanted)
    held = {key: (t.dtype, t.shape[3]) for key, t in tensors_of(state).items()}
    scale = (torch.float32, 1)
    assert held == {
        "k": (torch.int8, K), "k_scale": scale, "v": (torch.int8, K), "v_scale": scale
    }  # fmt: skip


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
@torch.no_grad()
def test_a_state_lives_anywhere_is_counted_copied_and_restored(
    int8: bool, mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, inputs = BlockSoftmax(RULE, int8=int8), mixer_inputs(150, 2 * G)
    wanted, _ = in_spans(mixer, inputs, [90])
    if mapped:
        monkeypatch.setenv(VARIABLE, str(tmp_path))
        monkeypatch.setattr("respike.layers.storage.MAPPED_SLOTS", 64)
    first: Any = tuple(z[:, :90] for z in inputs)
    _, state = in_spans(mixer, first, [50])
    assert not list(tmp_path.iterdir())
    row = 2 * (K + 4) if int8 else 2 * K * 4
    assert [state.nbytes(n) for n in (0, 1, 90)] == [0, G * row, G * (90 * row + 45 * K * 4)]
    copy, stored = state.clone(), {n: t.clone() for n, t in state.tensors(90).items()}
    restored: Any = mixer.init_state(1, G, K, inputs[2])
    restored.restore(stored)
    rejoined = type(state).join([state.rows(slice(1, 2)), state.rows(slice(0, 1))])
    for part, order in ((state, [0, 1]), (copy, [0, 1]), (restored, [0, 1]), (rejoined, [1, 0])):
        rest: Any = tuple(z[order, 90:] for z in inputs)
        out, _ = mixer(*rest, make_span([90] * B, [60] * B, 60, rest[2]), part)
        assert_close(out, wanted[order, 90:])


def test_a_cache_that_cannot_be_mapped_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="cannot be mapped there"):
        in_spans(BlockSoftmax(RULE), mixer_inputs(5, 2 * G), [])


SHAPES = {"6 heads of 10": (6, 2, 10, 10), "of 64": (3, 1, 64, 64), "odd": (5, 1, 36, 7)}
"""H, G, K, V."""
WIDE = {
    "blocks of 16": BlockRule(30, 4, 16, 16, 3, 64, 90),
    "of 16, true at first": BlockRule(30, 4, 16, 16, 3, 64, 90, 170),
    "of 6, true": BlockRule(9, 7, 6, 2, 5, 40, None),
    "of 70": BlockRule(20, 1, 70, 35, 1, 90, 75),
    "of 1": BlockRule(4, 2, 1, 1, 9, 30, 50),
}


# ---- gradients -------------------------------------------------------------------------------


def test_gradients_are_those_of_the_definition() -> None:
    inputs = mixer_inputs(40, 2 * G)
    leaves = [z.requires_grad_() for z in inputs[1:]]
    weight = normal(B, 40, 2 * G, K, seed=9)
    outs = (
        in_spans(BlockSoftmax(RULE), inputs, [])[0],
        blocks_definition(*leaves, FREQUENCIES, RULE),
    )  # type: ignore[call-arg]
    ours, wanted = (torch.autograd.grad((out * weight).sum(), leaves) for out in outs)
    for got, want in zip(ours, wanted, strict=True):
        assert_close(got, want)


def block_inputs(T: int, dtype: torch.dtype) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Queries, keys and values that have gradients, and what else the op takes."""
    _, q, k, v = mixer_inputs(T, 2 * G, dtype=dtype)
    span = make_span([0] * B, [T] * B, T, q)
    state = BlockSoftmax(RULE).init_state(B, G, K, k)
    state.append(span.rotate_within(k, RULE.block_tokens).transpose(1, 2), v.transpose(1, 2), span)
    keys, summaries = state.read(T)
    return [q, keys.k, keys.v], (summaries, span.start, span.frequencies, RULE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_many_tiles_are_those_of_the_torch_form_at_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_op, "GRADIENT_QUERIES", 37)
    leaves, rest = block_inputs(150, dtype)
    got = gradients(lambda q, k, v: block_softmax(q, Keys(k, v), *rest), leaves)
    whole = [x.float() for x in leaves]
    want = gradients(lambda q, k, v: blocks_op._block_softmax(q, Keys(k, v), *rest), whole)
    for ours, wanted in zip(got, want, strict=True):
        assert_close(ours, wanted.to(dtype))


KERNEL_CASES = [
    *((name, "6 heads of 10", torch.float32) for name in WIDE),
    *((name, "odd", torch.float32) for name in WIDE),
    # As large as models have them: of few keys the rounding of outputs weighs more.
    *((name, "of 64", torch.bfloat16) for name in ("blocks of 16", "of 70")),
]


@native
@each_level
@pytest.mark.parametrize(("name", "shape", "dtype"), KERNEL_CASES)
def test_the_kernel_of_gradients_is_the_torch_form(
    name: str, shape: str, dtype: torch.dtype, level: int
) -> None:
    leaves, rest = wide_inputs(WIDE[name], SHAPES[shape], 230, dtype)
    with at_level(level):
        got = gradients(lambda q, k, v: block_softmax(q, Keys(k, v), *rest), leaves)
    with at_torch():
        whole = [x.float() for x in leaves]
        want = gradients(lambda q, k, v: block_softmax(q, Keys(k, v), *rest), whole)
    for ours, wanted in zip(got, want, strict=True):
        assert_close(ours, wanted.to(dtype))


def wide_inputs(
    rule: BlockRule, shape: tuple[int, int, int, int], T: int, dtype: torch.dtype
) -> tuple[list[Tensor], tuple[Any, ...]]:
    """As `block_inputs`, of one row that begins at 3, whose last slots are no query's."""
    (H, groups, K, V), size = shape, rule.block_tokens
    S = (-(-(T + 3) // size) + 1) * size
    q, k, v = normal(1, T, H, K), normal(1, groups, S, K, seed=1), normal(1, groups, S, V, seed=2)
    q, k, v = (x.to(dtype) for x in (2 * q, k, v))
    frequencies = rotary_frequencies(K, 1000.0)
    summaries = summarise(k, rule.summary_tokens)
    return [q, k, v], (summaries, torch.tensor([3]), frequencies, rule)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_all_written_and_threads_do_not_show(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, rest = wide_inputs(WIDE["blocks of 16"], SHAPES["of 64"], 600, dtype)
    empty, found, threads = Tensor.new_empty, [], torch.get_num_threads()
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *shape: empty(x, *shape).fill_(torch.nan))
    try:
        for count in (1, 2, 3):
            set_threads(count)
            found.append(gradients(lambda q, k, v: block_softmax(q, Keys(k, v), *rest), leaves))
    finally:
        set_threads(threads)
    assert all(x.isfinite().all() for x in found[0])
    assert not found[0][1][:, :, 603:].any()
    for some in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(some, found[0], strict=True))


def test_the_forward_pass_is_that_of_inference_and_has_one_gradient() -> None:
    (q, k, v), rest = block_inputs(50, torch.float32)
    expected = block_softmax(q, Keys(k, v), *rest)
    out = block_softmax(q.requires_grad_(), Keys(k, v), *rest)
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradients_of_rows_of_unlike_lengths() -> None:
    inputs = mixer_inputs(40, 2 * G)
    leaves = [z.requires_grad_() for z in inputs[1:]]
    mixer = BlockSoftmax(RULE)
    span = make_span([0] * B, [29, 13], 40, inputs[2])
    out, _ = mixer(*inputs, span, mixer.init_state(B, G, K, inputs[2]))
    for row, count in enumerate((29, 13)):
        wanted = blocks_definition(*(z[row : row + 1, :count] for z in leaves), FREQUENCIES, RULE)  # type: ignore[call-arg]
        for got, want in zip(
            torch.autograd.grad(out[row, :count].square().sum(), leaves, retain_graph=True),
            torch.autograd.grad(wanted.square().sum(), leaves),
            strict=True,
        ):
            assert_close(got, want)


def test_no_gradient_flows_into_the_call_before() -> None:
    inputs = mixer_inputs(30, 2 * G)
    for z in inputs[1:]:
        z.requires_grad_()
    out, state = in_spans(BlockSoftmax(RULE), inputs, [20])
    assert not any(t.requires_grad for t in tensors_of(state).values())
    for grad in torch.autograd.grad(out[:, 20:].square().sum(), inputs[1:]):
        assert not grad[:, :20].any()
        assert grad[:, 20:].any(-1).any()


# ---- the kernels -----------------------------------------------------------------------------


def cache_of(k: Tensor, v: Tensor, rule: BlockRule, frequencies: Tensor, int8: bool) -> Any:
    """Keys, what they stand for unrotated, and summaries; what no query may read is NaN."""
    rows, T, groups = k.shape[:3]
    places = (torch.arange(T) % rule.block_tokens).expand(rows, T)
    slots = -(-T // rule.block_tokens) * rule.block_tokens
    held = (
        rotate_definition(k, *rotary_tables(places, frequencies)).transpose(1, 2),
        v.transpose(1, 2),
    )
    full = [x.new_full((rows, groups, slots, x.shape[3]), torch.nan) for x in held]
    for whole, part in zip(full, held, strict=True):
        whole[:, :, :T] = part
    if not int8:
        return Keys(*full), k, v, summarise(full[0], rule.summary_tokens)
    (k8, k_scale), (v8, v_scale) = (quantise_rows(x) for x in full)
    exact = [
        (a.float() * s[..., None])[:, :, :T].transpose(1, 2)
        for a, s in ((k8, k_scale), (v8, v_scale))
    ]
    back = rotate_definition(exact[0], *rotary_tables(-places, frequencies))
    keys = (k8.float() * k_scale[..., None]).to(k.dtype)
    return Keys(k8, v8, k_scale, v_scale), back, exact[1], summarise(keys, rule.summary_tokens)


@cache
def case(name: str, shape: str, dtype: torch.dtype, int8: bool) -> Any:
    """What a kernel takes, and what the definition makes of it; once for all levels."""
    (heads, groups, key_dim, value_dim), rule, T = SHAPES[shape], WIDE[name], 110
    frequencies = rotary_frequencies(key_dim, 10_000.0)
    sizes = ((heads, key_dim), (groups, key_dim), (groups, value_dim))
    q, k, v = (normal(1, T, *s, seed=i, dtype=dtype) for i, s in enumerate(sizes))
    keys, k, v, summaries = cache_of(k, v, rule, frequencies, int8)
    wanted = blocks_definition(q.to(k.dtype), k, v, frequencies, rule).float()
    return (q, keys, summaries), (frequencies, rule), wanted


@native
@each_level
@pytest.mark.parametrize(("dtype", "int8"), [(F32, False), (F32, True), (BF16, False)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WIDE)
def test_the_kernel_is_the_definition(
    name: str, shape: str, dtype: torch.dtype, int8: bool, level: int
) -> None:
    (q, *cache), rest, wanted = case(name, shape, dtype, int8)
    outputs = []
    with at_level(level):
        for begin, end in ((0, 1), (1, 100), (100, 101), (101, 110)):
            outputs.append(block_softmax(q[:, begin:end], *cache, torch.tensor([begin]), *rest))
    assert_close(torch.cat(outputs, 1).float(), wanted, dtype)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", WIDE)
@torch.no_grad()
def test_what_one_token_looks_at_is_what_the_definition_weighs(
    name: str, int8: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESPIKE_BACKEND", backend)
    backends.kernels.cache_clear()
    rule, T, frequencies = WIDE[name], 110, rotary_frequencies(10, 10_000.0)
    q, k = normal(2, T, 6, 10), normal(2, T, 2, 10, seed=1)
    one_hot = torch.eye(T).expand(2, 2, T, T).transpose(1, 2).contiguous()  # out = weights
    keys, k, _, summaries = cache_of(k, one_hot, rule, frequencies, int8)
    wanted = blocks_definition(q, k, one_hot, frequencies, rule)
    start = torch.tensor([T - 1, 21])
    at = torch.stack([q[row, p] for row, p in enumerate(start.tolist())])[:, None]
    got = block_weights(at, keys, summaries, start, frequencies, rule)
    backends.kernels.cache_clear()
    for row, p in enumerate(start.tolist()):
        assert_close(got[row, :, :T], wanted[row, p])


@native
@each_level
@pytest.mark.parametrize("together", [1, 211])
@pytest.mark.parametrize("order", ["equal", "rising", "falling"])
def test_of_many_blocks_the_best_are_chosen_and_of_equal_ones_the_lowest(
    order: str, together: int, level: int
) -> None:
    rule, T, heads, top = BlockRule(3, 1, 2, 1, 7, 40, 30), 2211, 3, 7
    still = torch.zeros(5, dtype=torch.float64)  # nothing is rotated
    slope = {"equal": 0.0, "rising": 1.0, "falling": -1.0}[order]
    size = slope * torch.arange(T) / 100
    k, v = size.view(1, T, 1, 1).expand(1, T, 1, 10), normal(1, T, 1, 7, seed=1)
    q = 1 + 0.1 * normal(1, together, heads, 10, seed=2)
    keys, _, _, summaries = cache_of(k, v, rule, still, int8=False)
    with at_level(level):
        got = block_softmax(q, keys, summaries, torch.tensor([T - together]), still, rule)
    for t in {0, together // 2, together - 1}:
        p = T - together + t
        near = rule.first_near(torch.tensor([p])).item()
        old = range(near - top, near) if order == "rising" else range(1, 1 + top)
        seen = [2 * b + i for b in (0, *old, *range(near, p // 2 + 1)) for i in (0, 1)]
        seen = [j for j in seen if j <= p]
        weights = (q[0, t] @ k[0, seen, 0].T * 10**-0.5).softmax(-1)
        assert_close(got[0, t], weights @ v[0, seen, 0])


@native
@pytest.mark.parametrize("tokens", [1, 190])
def test_the_number_of_threads_changes_no_bit(tokens: int) -> None:
    rule, T, before = BlockRule(3, 1, 2, 1, 4, 40, 30), 6000, torch.get_num_threads()
    q, k, v = (normal(2, T, h, 10, seed=i) for i, h in enumerate((4, 2, 2)))
    keys, _, _, summaries = cache_of(k, v, rule, FREQUENCIES, int8=False)
    start, outputs = torch.tensor([T - tokens, 300]), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = block_softmax(q[:, :tokens], keys, summaries, start, FREQUENCIES, rule)
            outputs.append(out)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_what_does_not_fit_is_refused() -> None:
    q, k = normal(1, 3, 4, 10), normal(1, 2, 8, 10)
    start, summaries = torch.tensor([2]), normal(1, 2, 4, 10)
    with pytest.raises(ValueError, match="blocks of 3"):
        block_softmax(q, Keys(k, k), summaries, start, FREQUENCIES, replace(RULE, block_tokens=3))
    with pytest.raises(ValueError, match=r"summaries have shape .* expected \(1, 2, 2, 10\)"):
        block_softmax(q, Keys(k, k), summaries, start, FREQUENCIES, replace(RULE, summary_tokens=4))
    with pytest.raises(ValueError, match="4 frequencies"):
        block_softmax(q, Keys(k, k), summaries, start, FREQUENCIES[:4], RULE)
