"""The far memory: its definition and its mixer against the words, in float64 and token by token.

Letters: B batch, T tokens, H query heads, G KV groups, R = H / G, F prototypes, K head dim.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixers import (
    CUTS,
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
    randomise,
    tensors_of,
    turned,
)
from respike.layers.far import FarSoftmax
from respike.layers.softmax import FullSoftmax, WindowSoftmax
from respike.ops.far import far_definition, far_read, share_denominator
from tolerance import assert_close

F = 6
HALF_LIVES = (5.0, 60.0, 1000.0)
RULES = [(1, 0, 512), (7, 3, 16), (5, 2, 512), (3, 0, 8), (4, 4, 9), (9, 1, 1), (2, 4, 512)]
"""Window, sinks, reach."""


def far_mixer(window: int, sinks: int, reach: int, heads: int = 3 * G) -> FarSoftmax:
    """Random prototypes, half-lives that matter at once, soon and late, gates open."""
    inner = WindowSoftmax(window, sinks, reach)
    mixer = FarSoftmax(inner, num_heads=heads, num_groups=G, head_dim=K, features=F)
    randomise(mixer)
    with torch.no_grad():
        mixer.log2_half_life.copy_(torch.tensor(HALF_LIVES).log2())
    return mixer


def log_sum_exp(x: Array) -> Array:
    top = x.max(-1, keepdims=True)
    return np.log(np.exp(x - top).sum(-1)) + top[..., 0]


def far_in_words(
    q: Array, k: Array, v: Array, log_query: Array, phi: Array, *, rule: tuple[int, int, int]
) -> tuple[Array, Array]:
    """One sequence, query by query: outputs (T, H, K) and the far tokens' weight (T, H)."""
    window, sinks, reach = rule
    T, H, _ = q.shape
    keys = np.array([[turned(k[j, g], j) for g in range(G)] for j in range(T)])
    out, share = np.zeros(q.shape), np.zeros((T, H))
    for p, h in itertools.product(range(T), range(H)):
        g = h // (H // G)
        scores = np.zeros(p + 1)
        is_far = np.zeros(p + 1, dtype=bool)
        as_window, as_sink = turned(q[p, h], p), turned(q[p, h], min(p, reach - 1))
        for j in range(p + 1):
            if j < sinks:
                scores[j] = as_sink @ keys[j, g] / math.sqrt(K)
            elif p - j < window:
                scores[j] = as_window @ keys[j, g] / math.sqrt(K)
            else:
                age = p - j - window  # steps since it left
                likes = log_sum_exp(log_query[p, h] + np.log(phi[j, g]))
                scores[j] = likes + math.log(0.5) * age / HALF_LIVES[g]
                is_far[j] = True
        weights = np.exp(scores - log_sum_exp(scores))
        out[p, h], share[p, h] = weights @ v[: p + 1, g], weights[is_far].sum()
    return out, share


def features_in_words(mixer: FarSoftmax, q: Array, k: Array) -> tuple[Array, Array]:
    """``log_query`` (T, H, F) and ``phi`` (T, G, F) of one sequence, not rotated."""
    log_query = np.einsum("hfk,thk->thf", double(mixer.query_weight), q)
    log_query += double(mixer.beta)[:, None]
    scores = np.einsum("gfk,tgk->tgf", double(mixer.key_weight), k) + double(mixer.key_bias)
    return log_query, np.exp(scores - log_sum_exp(scores)[..., None])


def expected(mixer: FarSoftmax, inputs: Inputs, rule: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Outputs, shares and memory of every row."""
    outputs, shares, memories = [], [], []
    for row in range(len(inputs[1])):
        q, k, v = (double(z[row]) for z in inputs[1:])
        log_query, phi = features_in_words(mixer, q, k)
        out, share = far_in_words(q, k, v, log_query, phi, rule=rule)
        memory = np.zeros((G, F, K + 1))
        for g, j in itertools.product(range(G), range(rule[1], len(q) - rule[0])):
            left = 0.5 ** ((len(q) - 1 - rule[0] - j) / HALF_LIVES[g])
            memory[g] += left * np.outer(phi[j, g], [*v[j, g], 1.0])
        outputs.append(out)
        shares.append(share)
        memories.append(memory)
    return tuple(torch.from_numpy(np.stack(x)).float() for x in (outputs, shares, memories))


# ---- the definition --------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [(1, 0), (5, 2), (4, 4), (50, 0)], ids=str)
@pytest.mark.parametrize("size", [1.0, 40.0], ids="likes of {}".format)
@pytest.mark.parametrize("R", [1, 3])
def test_the_definition_is_one_softmax_written_in_numpy(
    rule: tuple[int, int], size: float, R: int
) -> None:
    _, q, k, v = mixer_inputs(40, R * G, rows=1)
    log_query = size * normal(1, 40, R * G, F, seed=5)
    phi = normal(1, 40, G, F, seed=6).softmax(-1)
    wanted, _ = far_in_words(*(double(z[0]) for z in (q, k, v, log_query, phi)), rule=(*rule, 512))
    span = make_span([0], [40], 40, k)
    decay = -math.log(2) / torch.tensor(HALF_LIVES)
    got = far_definition(span.rotate(q), span.rotate(k), v, log_query, phi, decay, *rule)
    assert_close(got[0], torch.from_numpy(wanted).float())


def test_nothing_remembered_is_a_mean_of_zero_and_a_mass_of_nothing() -> None:
    memory = torch.zeros(B, G, F, K + 1)
    v, phi = normal(B, 4, G, K), torch.zeros(B, 4, G, F)
    log_query = 100 * normal(B, 4, 3 * G, F)
    mean, mass, after = far_read(log_query, phi, v, torch.zeros(B, 4, G, 1), memory)
    assert not mean.any()
    assert (mass == -math.inf).all()
    assert not after.any()
    near = normal(B, 4, 3 * G, K, dtype=torch.bfloat16)
    out, share = share_denominator(near, normal(B, 4, 3 * G), mean, mass)
    assert torch.equal(out, near)
    assert not share.any()


@given(a=st.floats(-40, 40), b=st.floats(-40, 40))  # farther apart float32 rounds one away
@settings(max_examples=30, deadline=None)
def test_two_averages_meet_in_proportion_to_their_masses(a: float, b: float) -> None:
    near, far = normal(1, 2, 3, K), normal(1, 2, 3, K, seed=1)
    masses = torch.full((1, 2, 3), a), torch.full((1, 2, 3), b)
    out, share = share_denominator(near, masses[0], far, masses[1])
    part = 1 / (1 + math.exp(a - b))
    assert_close(share, torch.full((1, 2, 3), part))
    assert_close(out, ((1 - part) * near.double() + part * far.double()).float())


# ---- the mixer does what the definition says -------------------------------------------------


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("rule", RULES, ids="window {0[0]} sinks {0[1]} reach {0[2]}".format)
@pytest.mark.parametrize("R", [1, 3])
@torch.no_grad()
def test_the_mixer_does_what_its_words_say(
    rule: tuple[int, int, int], R: int, cuts: list[int]
) -> None:
    mixer, inputs = far_mixer(*rule, heads=R * G), mixer_inputs(40, R * G)
    out, _, memory = expected(mixer, inputs, rule)
    got, state = in_spans(mixer, inputs, cuts)
    assert_close(got, out)
    assert_close(state.memory.memory, memory)


@given(
    tokens=st.integers(40, 150),
    window=st.integers(1, 9),
    sinks=st.integers(0, 4),
    reach=st.sampled_from([1, 11, 200]),
    lengths=st.lists(st.integers(1, 13), max_size=20),
)
@settings(max_examples=12, deadline=None)
@torch.no_grad()
def test_any_window_and_any_split_is_what_the_words_say(
    tokens: int, window: int, sinks: int, reach: int, lengths: list[int]
) -> None:
    rule = window, sinks, reach
    mixer, inputs = far_mixer(*rule), mixer_inputs(tokens, 3 * G, rows=1)
    out, _, memory = expected(mixer, inputs, rule)
    got, state = in_spans(mixer, inputs, itertools.accumulate(lengths))
    assert_close(got, out)
    assert_close(state.memory.memory, memory)


@torch.no_grad()
def test_the_share_it_shows_is_the_weight_of_all_far_tokens() -> None:
    mixer, inputs = far_mixer(5, 2, 16), mixer_inputs(40, 3 * G)
    mixer.watch = True
    in_spans(mixer, inputs, [])
    assert mixer.share is not None
    wanted = expected(mixer, inputs, (5, 2, 16))[1]
    assert 0.1 < wanted[:, 10:].mean() < 0.9
    assert_close(mixer.share, wanted)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("rule", RULES, ids="window {0[0]} sinks {0[1]} reach {0[2]}".format)
@torch.no_grad()
def test_every_token_counts_once(rule: tuple[int, int, int], cuts: list[int]) -> None:
    """All scores zero and one-hot values: the output is the weight of every token."""
    T = 44
    inner = WindowSoftmax(*rule)
    mixer = FarSoftmax(inner, num_heads=3, num_groups=3, head_dim=T, features=F)
    mixer.beta.zero_()
    mixer.log2_half_life.fill_(100.0)
    v = torch.eye(T)[None, :, None].expand(1, T, 3, T)
    zero = torch.zeros(1, T, 3, T)
    out, _ = in_spans(mixer, (normal(1, T, 5), zero, zero, v), cuts)
    wanted = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    assert_close(out, wanted[None, :, None].expand(1, T, 3, T))


@torch.no_grad()
def test_a_window_as_long_as_the_context_is_full_softmax() -> None:
    inputs = mixer_inputs(40, 3 * G)
    for window, sinks in ((40, 0), (36, 4), (60, 2)):
        for cuts in CUTS.values():
            got, state = in_spans(far_mixer(window, sinks, 512), inputs, cuts)
            assert_close(got, in_spans(FullSoftmax(), inputs, cuts)[0])
            assert not state.memory.memory.any()


@pytest.mark.parametrize("strength", [0.0, 12.0, 60.0])
@torch.no_grad()
def test_the_memory_vanishes_beside_a_strong_match(strength: float) -> None:
    mixer, (x, q, k, v) = far_mixer(5, 0, 512), mixer_inputs(40, 3 * G)
    mixer.watch = True
    own = k.repeat_interleave(3, 2)  # each query its own key: the match is in the window
    q = own / own.norm(dim=-1, keepdim=True).square() * strength * math.sqrt(K)
    mixer.query_weight.zero_()
    in_spans(mixer, (x, q, k, v), [])
    assert mixer.share is not None
    late = mixer.share[:, 20:]
    if strength == 0:
        assert late.min() > 0.05
    assert late.max() < 40 * math.exp(mixer.beta.max().item() - strength) + 1e-12


# ---- ragged batches --------------------------------------------------------------------------


@given(
    calls=st.lists(st.lists(st.integers(0, 14), min_size=3, max_size=3), min_size=1, max_size=5),
    rule=st.sampled_from(RULES),
)
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_ragged_rows_give_what_each_gives_alone(
    calls: list[list[int]], rule: tuple[int, int, int]
) -> None:
    calls = [call for call in calls if max(call)] or [[1, 0, 2]]
    mixer, inputs = far_mixer(*rule), mixer_inputs(70, 3 * G, rows=3)
    first, second = (in_ragged_spans(mixer, inputs, calls, pad) for pad in (30.0, -1000.0))
    for ours, others in zip(first[0], second[0], strict=True):
        assert torch.equal(ours, others)
    for name, tensor in tensors_of(first[1]).items():
        assert torch.equal(tensor, tensors_of(second[1])[name]), name
    for row, total in enumerate(map(sum, zip(*calls, strict=True))):
        alone = tuple(z[row : row + 1, :total] for z in inputs)
        if total:
            out, _, memory = expected(mixer, alone, rule)  # type: ignore[arg-type]
            assert_close(first[0][row], out[0])
            assert_close(first[1].memory.memory[row], memory[0])
        else:
            assert not first[1].memory.memory[row].any()


# ---- what may be seen ------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@torch.no_grad()
def test_the_future_does_not_reach_back_and_the_past_is_not_lost(cuts: list[int]) -> None:
    mixer, inputs = far_mixer(5, 2, 16), mixer_inputs(40, 3 * G)
    before, _ = in_spans(mixer, inputs, cuts)
    for x in inputs[1:]:
        x[:, 19] += 1.0
    after, _ = in_spans(mixer, inputs, cuts)
    assert torch.equal(after[:, :19], before[:, :19])
    assert not torch.isclose(after[:, 19:], before[:, 19:]).all(-1).any()


@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_memory_is_written_before_it_is_read() -> None:
    mixer, inputs = far_mixer(5, 2, 16), mixer_inputs(40, 3 * G)
    assert torch.empty(3).isnan().all(), "the fixture does not bite"
    assert not in_spans(mixer, inputs, CUTS["spans of 1 to 13"])[0].isnan().any()
    rows, state = in_ragged_spans(mixer, inputs, [[9, 4], [1, 7], [0, 3]], 5.0)
    assert not torch.cat(rows).isnan().any()
    assert not state.memory.memory.isnan().any()


# ---- shut heads and parts switched off -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("reach", [16, 512])
@torch.no_grad()
def test_a_shut_head_is_the_window_bit_for_bit(
    dtype: torch.dtype, cuts: list[int], reach: int
) -> None:
    inputs = mixer_inputs(40, 3 * G, dtype=dtype)
    wanted, window = in_spans(WindowSoftmax(5, 2, reach), inputs, cuts)
    mixer = far_mixer(5, 2, reach).to(dtype)
    for shut in (range(9), (0, 4, 5, 8), ()):
        mixer.beta.fill_(0.0)
        mixer.beta[list(shut)] = -math.inf
        out, state = in_spans(mixer, inputs, cuts)
        assert out.dtype == dtype
        for h in range(9):
            assert torch.equal(out[:, :, h], wanted[:, :, h]) == (h in shut)
        assert torch.equal(state.window.k, window.k)
        assert torch.equal(state.window.v, window.v)
        assert bool(state.memory.memory.any()) == (len(shut) < 9)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@torch.no_grad()
def test_without_memory_it_is_the_window_bit_for_bit(cuts: list[int]) -> None:
    mixer, inputs = far_mixer(5, 2, 16), mixer_inputs(40, 3 * G)
    mixer.off = frozenset({"memory"})
    wanted, _ = in_spans(WindowSoftmax(5, 2, 16), inputs, cuts)
    assert torch.equal(in_spans(mixer, inputs, cuts)[0], wanted)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("reach", [16, 512])
@torch.no_grad()
def test_without_window_it_sees_sinks_itself_and_the_memory(cuts: list[int], reach: int) -> None:
    window, sinks, T = 5, 2, 40
    mixer, inputs = far_mixer(window, sinks, reach), mixer_inputs(T, 3 * G)
    mixer.off = frozenset({"window"})
    whole, state = in_spans(mixer, inputs, cuts)
    mixer.off = frozenset()
    rest = in_spans(mixer, inputs, cuts)[1]
    for name, tensor in tensors_of(state).items():
        assert torch.equal(tensor, tensors_of(rest)[name]), name
    x, q, k, v = inputs
    for p in (0, 1, 4, 12, 39):
        # The same query after a text in which the rest of its window has values it cannot tell:
        # moving them changes nothing. Its own, a sink's and a far one's do.
        for j in range(p + 1):
            moved = v.clone()
            moved[:, j] += 1.0
            out, _ = in_spans(off_window(mixer), (x, q, k, moved), cuts)
            seen = j < sinks or j == p or j <= p - window
            assert torch.equal(out[:, p], whole[:, p]) == (not seen), (p, j)


def off_window(mixer: FarSoftmax) -> FarSoftmax:
    mixer.off = frozenset({"window"})
    return mixer


# ---- extremes --------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], list(range(40))], ids=["one span", "steps"])
@pytest.mark.parametrize("near", [0.0, 200.0])
@pytest.mark.parametrize("likes", [-200.0, 0.0, 200.0])
@torch.no_grad()
def test_scores_of_any_size_neither_overflow_nor_get_lost(
    near: float, likes: float, cuts: list[int]
) -> None:
    """Scores of the window up to 200 either way, likes around -200, 0 and 200."""
    mixer, (x, q, k, v) = far_mixer(5, 2, 16), mixer_inputs(40, 3 * G)
    mixer.beta.add_(likes)
    if near:
        raw = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(3, 2))
        k = k * (near * math.sqrt(K) / raw.abs().max())
        mixer.key_weight.div_(near)
    inputs = (x, q, k, v)
    got, _ = in_spans(mixer, inputs, cuts)
    assert got.isfinite().all()
    assert_close(got, expected(mixer, inputs, (5, 2, 16))[0])


# ---- gradients -------------------------------------------------------------------------------


def by_definition(mixer: FarSoftmax, inputs: Inputs) -> Tensor:
    _, q, k, v = inputs
    T = q.shape[1]
    span = make_span([0] * len(q), [T] * len(q), T, k)
    scores = (k[:, :, :, None] * mixer.key_weight).sum(-1) + mixer.key_bias
    log_query = (q[:, :, :, None] * mixer.query_weight).sum(-1) + mixer.beta[:, None]
    decay = -math.log(2) / 2**mixer.log2_half_life
    window, sinks = mixer.window.window_tokens, mixer.window.sink_tokens
    rotated = span.rotate(q), span.rotate(k)
    return far_definition(*rotated, v, log_query, scores.softmax(-1), decay, window, sinks)


@pytest.mark.parametrize("rule", [(5, 2, 512), (1, 0, 512), (9, 4, 512)], ids=str)
@pytest.mark.parametrize("R", [1, 3])
def test_gradients_are_those_of_the_definition(rule: tuple[int, int, int], R: int) -> None:
    mixer, inputs = far_mixer(*rule, heads=R * G), mixer_inputs(70, R * G)
    leaves = [z.requires_grad_() for z in inputs[1:]]
    names = ["q", "k", "v", *dict(mixer.named_parameters())]
    leaves += mixer.parameters()
    outs = in_spans(mixer, inputs, [])[0], by_definition(mixer, inputs)
    weight = normal(*outs[0].shape, seed=9)
    ours, wanted = (torch.autograd.grad((out * weight).sum(), leaves) for out in outs)
    assert len(names) == len(ours) == 8
    for name, got, want in zip(names, ours, wanted, strict=True):
        print(name)  # noqa: T201 - shown by pytest when the test fails
        assert_close(got, want)


def test_gradients_beside_shut_heads_are_finite_and_theirs_are_zero() -> None:
    mixer, inputs = far_mixer(5, 2, 512), mixer_inputs(40, 3 * G)
    with torch.no_grad():
        mixer.beta[[0, 4, 5]] = -math.inf
    out, _ = in_spans(mixer, inputs, [])
    out.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert (mixer.beta.grad == 0).tolist() == [h in (0, 4, 5) for h in range(9)]  # type: ignore[union-attr]


@pytest.mark.parametrize("tokens", [1, 6])
def test_no_gradient_flows_into_the_call_before(tokens: int) -> None:
    mixer, inputs = far_mixer(5, 2, 512), mixer_inputs(30 + tokens, 3 * G)
    for z in inputs[1:]:
        z.requires_grad_()
    out, state = in_spans(mixer, inputs, [30])
    assert not any(t.requires_grad for t in tensors_of(state).values())
    grads = torch.autograd.grad(out[:, 30:].square().sum(), inputs[1:])
    for grad in grads:
        assert not grad[:, :30].any()
        assert grad[:, 30:].any(-1).all()


# ---- bf16 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [1.0, 4.0])
@torch.no_grad()
def test_in_bf16_one_pass_and_512_steps_stay_near_float32(sharpness: float) -> None:
    mixer = far_mixer(16, 2, 1024).bfloat16()
    exact = far_mixer(16, 2, 1024)
    exact.load_state_dict({n: p.float() for n, p in mixer.state_dict().items()})
    x, q, k, v = mixer_inputs(512, 3 * G, dtype=torch.bfloat16)
    inputs = (x, q * sharpness, k, v)
    truth, _ = in_spans(exact, tuple(z.float() for z in inputs), [])  # type: ignore[arg-type]
    for cuts in ([], range(512)):
        got, state = in_spans(mixer, inputs, cuts)
        assert got.dtype == torch.bfloat16
        assert state.memory.memory.dtype == torch.float32
        assert_close(got.float(), truth, torch.bfloat16)
        assert_close(got[:, -64:].float(), truth[:, -64:], torch.bfloat16)
