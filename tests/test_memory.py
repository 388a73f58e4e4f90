"""Linear mixers against the papers' equations, token by token in float64.

Letters: B batch, T tokens, D model width, H query heads, G KV groups, R = H / G, K head dim.
"""

import itertools
import math
from typing import Any

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
    D,
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
    window_in_words,
)
from respike.layers.attention import Attention
from respike.layers.far import FarSoftmax
from respike.layers.memory import (
    GatedDelta,
    GatedLinear,
    Linear,
    Memory,
    TiedGate,
    WindowBesideMemory,
)
from respike.layers.mixer import Mixer
from respike.layers.softmax import FullSoftmax, WindowSoftmax
from respike.layers.state import MemoryState
from tolerance import TOLERANCES, assert_close, differences

EPS = 1e-3
"""Of the norms: large enough that leaving it out, or applying it elsewhere, shows."""
RULE = (5, 2, 16)
"""Window, sinks, reach."""


def gla(*, rectify: bool, normalizer: float = 16.0, groups: int = G) -> GatedLinear:
    return GatedLinear(
        hidden_size=D, num_groups=groups, head_dim=K, gate_rank=4, gate_normalizer=normalizer,
        rectify=rectify,
    )  # fmt: skip


def delta(*, negative: bool, groups: int = G) -> GatedDelta:
    return GatedDelta(hidden_size=D, num_groups=groups, negative_eigenvalues=negative)


MEMORIES = {
    "gla relu": lambda: gla(rectify=True),
    "gla": lambda: gla(rectify=False, normalizer=1.0),
    "tied": lambda: TiedGate(),
    "delta": lambda: delta(negative=False),
    "delta to 2": lambda: delta(negative=True),
}


def linear(name: str) -> Linear:
    mixer = Linear(MEMORIES[name](), K, EPS)
    randomise(mixer)
    return mixer


def beside(name: str) -> WindowBesideMemory:
    mixer = WindowBesideMemory(WindowSoftmax(*RULE), MEMORIES[name](), K, EPS)
    randomise(mixer)
    return mixer


MIXERS = {"alone": linear, "beside a window": beside}


# ---- in words --------------------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def unit(x: Array) -> Array:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def normed(x: Array, weight: Tensor) -> Array:
    return double(weight) * x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


def read_in_words(name: str, memory: Memory, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    """One sequence: what is read (T, H, K), before any norm, and the last state (G, K, K)."""
    x, q, k, v = inputs
    T, H, _ = q.shape
    w = {n: double(p) for n, p in memory.named_parameters()}
    out, states = np.zeros(q.shape), np.zeros((G, K, K))
    for t, g in itertools.product(range(T), range(G)):
        S, key, value = states[g], k[t, g], v[t, g]
        heads = q[t, g * (H // G) : (g + 1) * (H // G)]
        if name.startswith("gla"):
            if name == "gla relu":
                heads, key = np.maximum(heads, 0), np.maximum(key, 0)
            gate = w["gate_up.weight"] @ (w["gate_down.weight"] @ x[t]) + w["gate_up.bias"]
            power = 1 / 16 if name == "gla relu" else 1.0
            decay = sigmoid(gate[g * K : (g + 1) * K]) ** power
            S = np.diag(decay) @ S + np.outer(key, value)
        elif name == "tied":
            key, heads = sigmoid(key), sigmoid(heads)
            S = np.diag(1 - key) @ S + np.outer(key, value)
        else:
            heads, key, value = unit(silu(heads)), unit(silu(key)), silu(value)
            step = np.log1p(np.exp(w["a_proj.weight"][g] @ x[t] + w["dt_bias"][g]))
            alpha = np.exp(-np.exp(w["A_log"][g]) * step)
            beta = sigmoid(w["b_proj.weight"][g] @ x[t]) * (2 if name == "delta to 2" else 1)
            # S (I - beta k k^T) in the paper, where S is value x key.
            S = alpha * (np.eye(K) - beta * np.outer(key, key)) @ S + beta * np.outer(key, value)
        states[g] = S
        out[t, g * (H // G) : (g + 1) * (H // G)] = heads @ S / math.sqrt(K)
    return out, states


def expected(name: str, mixer: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs and memory of every row."""
    outputs, memories = [], []
    window, sinks, reach = RULE
    for row in range(len(inputs[1])):
        one = tuple(double(z[row]) for z in inputs)
        read, memory = read_in_words(name, mixer.memory, one)
        if isinstance(mixer, Linear):
            out = normed(read, mixer.norm.weight)
        else:
            near, _ = window_in_words(*one[1:], window=window, sinks=sinks, reach=reach)
            out = normed(near, mixer.window_norm.weight) + normed(read, mixer.memory_norm.weight)
        outputs.append(out)
        memories.append(memory)
    return tuple(torch.from_numpy(np.stack(x)).float() for x in (outputs, memories))  # type: ignore[return-value]


def memory_of(state: Any) -> Tensor:
    return tensors_of(state)["memory"]


# ---- the mixers do what the papers say -------------------------------------------------------


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("R", [1, 3])
@torch.no_grad()
def test_the_mixer_does_what_the_papers_say(kind: str, name: str, R: int, cuts: list[int]) -> None:
    mixer, inputs = MIXERS[kind](name), mixer_inputs(34, R * G)
    out, memory = expected(name, mixer, inputs)
    got, state = in_spans(mixer, inputs, cuts)
    assert_close(got, out)
    assert_close(memory_of(state), memory)


@given(
    name=st.sampled_from(sorted(MEMORIES)),
    tokens=st.integers(1, 120),
    cuts=st.lists(st.integers(1, 119), max_size=5),
)
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_any_split_is_what_the_papers_say(name: str, tokens: int, cuts: list[int]) -> None:
    mixer, inputs = linear(name), mixer_inputs(tokens, 3 * G, rows=1)
    out, memory = expected(name, mixer, inputs)
    got, state = in_spans(mixer, inputs, cuts)
    assert_close(got, out)
    assert_close(memory_of(state), memory)


@given(
    name=st.sampled_from(sorted(MEMORIES)),
    kind=st.sampled_from(sorted(MIXERS)),
    calls=st.lists(st.lists(st.integers(0, 14), min_size=3, max_size=3), min_size=1, max_size=4),
)
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_ragged_rows_give_what_each_gives_alone(
    name: str, kind: str, calls: list[list[int]]
) -> None:
    calls = [call for call in calls if max(call)] or [[1, 0, 2]]
    mixer, inputs = MIXERS[kind](name), mixer_inputs(56, 3 * G, rows=3)
    first, second = (in_ragged_spans(mixer, inputs, calls, pad) for pad in (3.0, -500.0))
    for ours, others in zip(first[0], second[0], strict=True):
        assert torch.equal(ours, others)
    for tensor_name, tensor in tensors_of(first[1]).items():
        assert torch.equal(tensor, tensors_of(second[1])[tensor_name]), tensor_name
    for row, total in enumerate(map(sum, zip(*calls, strict=True))):
        if not total:
            assert not memory_of(first[1])[row].any()
            continue
        out, memory = expected(name, mixer, tuple(z[row : row + 1, :total] for z in inputs))  # type: ignore[arg-type]
        assert_close(first[0][row], out[0])
        assert_close(memory_of(first[1])[row], memory[0])


# ---- what may be seen ------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_the_future_does_not_reach_back(kind: str, name: str, cuts: list[int]) -> None:
    mixer, inputs = MIXERS[kind](name), mixer_inputs(34, 3 * G)
    before, _ = in_spans(mixer, inputs, cuts)
    for z in inputs:
        z[:, 19:] += 1.0
    after, _ = in_spans(mixer, inputs, cuts)
    assert torch.equal(after[:, :19], before[:, :19])
    assert not torch.isclose(after[:, 19:], before[:, 19:]).all(-1).any()


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_memory_is_written_before_it_is_read(kind: str, name: str) -> None:
    mixer, inputs = MIXERS[kind](name), mixer_inputs(34, 3 * G)
    assert torch.empty(3).isnan().all(), "the fixture does not bite"
    assert not in_spans(mixer, inputs, CUTS["spans of 1 to 13"])[0].isnan().any()
    rows, state = in_ragged_spans(mixer, inputs, [[9, 4], [1, 7], [0, 3]], 5.0)
    assert not torch.cat(rows).isnan().any()
    assert not memory_of(state).isnan().any()


@pytest.mark.parametrize("name", MEMORIES)
@torch.no_grad()
def test_parts_switched_off_leave_the_others_and_the_state(name: str) -> None:
    inputs, alone, pair = mixer_inputs(34, 3 * G), linear(name), beside(name)
    _, kept = in_spans(alone, inputs, [20])
    alone.off = frozenset({"memory"})
    out, state = in_spans(alone, inputs, [20])
    assert not out.any()
    assert torch.equal(memory_of(state), memory_of(kept))
    both, kept = in_spans(pair, inputs, [20])
    parts = []
    for off in ("window", "memory"):
        pair.off = frozenset({off})
        out, state = in_spans(pair, inputs, [20])
        parts.append(out)
        for tensor_name, tensor in tensors_of(state).items():
            assert torch.equal(tensor, tensors_of(kept)[tensor_name]), tensor_name
    only_memory, only_window = parts
    near, _ = in_spans(WindowSoftmax(*RULE), inputs, [20])
    assert torch.equal(only_window, pair.window_norm(near))
    assert_close(only_memory + only_window, both)


@pytest.mark.parametrize("gate", [-1000.0, 1000.0], ids=["all is forgotten", "nothing is"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_a_saturated_gate_is_exact(gate: float, cuts: list[int]) -> None:
    mixer, (x, q, k, v) = linear("gla"), mixer_inputs(34, 3 * G)
    with torch.no_grad():
        mixer.memory.gate_up.weight.zero_()
        mixer.memory.gate_up.bias.fill_(gate)
    leaves = [z.requires_grad_() for z in (q, k, v)]
    out, state = in_spans(mixer, (x, q, k, v), cuts)
    assert out.isfinite().all()
    written = torch.einsum("btgk,btgv->btgkv", k, v)
    wanted = written.cumsum(1) if gate > 0 else written
    assert_close(memory_of(state), wanted[:, -1].detach())
    for grad in torch.autograd.grad(out.square().sum(), [*leaves, *mixer.parameters()]):
        assert grad.isfinite().all()


@torch.no_grad()
def test_a_read_out_too_large_for_half_precision_is_normed_all_the_same() -> None:
    """Sums over thousands of tokens leave float16's range; their norm does not."""
    mixer = linear("gla relu").half()
    mixer.memory.gate_up.bias.fill_(15.0)
    x, q, k, v = mixer_inputs(40, 3 * G)
    inputs = tuple(z.half() for z in (x, 100 * q, 100 * k, 100 * v))
    exact = linear("gla relu")
    exact.load_state_dict({n: p.float() for n, p in mixer.state_dict().items()})
    out, state = in_spans(mixer, inputs, [20])  # type: ignore[arg-type]
    assert memory_of(state).abs().max() > 65504
    wanted, _ = in_spans(exact, tuple(z.float() for z in inputs), [20])  # type: ignore[arg-type]
    assert_close(out.float(), wanted, torch.bfloat16)


# ---- gradients -------------------------------------------------------------------------------


def token_by_token(mixer: Mixer, inputs: Inputs, state: Any) -> Tensor:
    """The steps' outputs with the memory's graph kept from one to the next."""
    outputs = []
    for t in range(inputs[1].shape[1]):
        span = make_span([t] * B, [1] * B, 1, inputs[2])
        read, state = mixer.memory(*(z[:, t : t + 1] for z in inputs), span, state)  # type: ignore[operator]
        outputs.append(mixer.norm(read))  # type: ignore[operator]
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("name", MEMORIES)
def test_gradients_of_a_pass_are_those_of_its_steps(name: str) -> None:
    mixer, inputs = linear(name), mixer_inputs(40, 3 * G)
    leaves = [z.requires_grad_() for z in inputs] + list(mixer.parameters())
    if name == "tied":
        leaves = leaves[1:]  # it does not look at x
    outs = in_spans(mixer, inputs, [])[0], token_by_token(mixer, inputs, torch.zeros(B, G, K, K))
    weight = normal(*outs[0].shape, seed=9)
    ours, wanted = (torch.autograd.grad((out * weight).sum(), leaves) for out in outs)
    for got, want in zip(ours, wanted, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_no_gradient_flows_into_the_call_before(kind: str, name: str, tokens: int) -> None:
    mixer, inputs = MIXERS[kind](name), mixer_inputs(20 + tokens, 3 * G)
    for z in inputs[1:]:
        z.requires_grad_()
    out, state = in_spans(mixer, inputs, [20])
    assert not any(t.requires_grad for t in tensors_of(state).values())
    for grad in torch.autograd.grad(out[:, 20:].square().sum(), inputs[1:]):
        assert not grad[:, :20].any()
        assert grad[:, 20:].any(-1).any()


# ---- bf16 and size ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_512_steps_in_bf16_do_not_drift(kind: str, name: str) -> None:
    mixer, exact = MIXERS[kind](name).bfloat16(), MIXERS[kind](name)
    exact.load_state_dict({n: p.float() for n, p in mixer.state_dict().items()})
    inputs = mixer_inputs(512, 3 * G, dtype=torch.bfloat16)
    truth, _ = in_spans(exact, tuple(z.float() for z in inputs), [])  # type: ignore[arg-type]
    one_pass, _ = in_spans(mixer, inputs, [])
    steps, state = in_spans(mixer, inputs, range(512))
    assert memory_of(state).dtype == torch.float32
    allowed, at_once = TOLERANCES[torch.bfloat16], differences(one_pass, truth)
    for part in (slice(None), slice(-64, None)):
        got = differences(steps[:, part], truth[:, part])
        assert got.rms <= at_once.rms + allowed.rms
        assert got.max <= at_once.max + allowed.max


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_the_state_stays_as_large_as_it_began(kind: str, name: str) -> None:
    mixer, inputs = MIXERS[kind](name), mixer_inputs(90, 3 * G)
    sizes = set()
    for cuts in ([], range(90), [89]):
        for T in (1, 5, 90):
            state = in_spans(mixer, tuple(z[:, :T] for z in inputs), cuts)[1]  # type: ignore[arg-type]
            held = sum(t.untyped_storage().nbytes() for t in tensors_of(state).values())
            sizes.add((held, B * state.nbytes(T)))
    window = 0 if kind == "alone" else 2 * (RULE[0] + RULE[1]) * K
    wanted = B * G * 4 * (K * K + window)
    assert sizes == {(wanted, wanted)}


def test_a_memory_state_can_be_cloned_cut_and_joined() -> None:
    state = MemoryState(normal(3, G, K, K))
    copy, first = state.clone(), state.rows(slice(0, 1)).clone()
    rejoined = MemoryState.join([state.rows(slice(b, b + 1)) for b in range(3)])
    assert torch.equal(rejoined.memory, state.memory)
    state.memory.zero_()
    assert copy.memory.any()
    assert first.memory.any()


# ---- groups ----------------------------------------------------------------------------------


def far(groups: int) -> FarSoftmax:
    return FarSoftmax(
        WindowSoftmax(*RULE), num_heads=2 * groups, num_groups=groups, head_dim=K, features=5
    )


PER_GROUP = {
    "far": far,
    "gla": lambda groups: Linear(gla(rectify=True, groups=groups), K, EPS),
    "delta": lambda groups: WindowBesideMemory(
        WindowSoftmax(*RULE), delta(negative=False, groups=groups), K, EPS
    ),
}
ROWS_OF_A_GROUP = {"query_weight": 2, "beta": 2, "gate_up.weight": K, "gate_up.bias": K}
SHARED = ("norm.weight", "gate_down.weight")


def of_groups(kind: str, whole: Mixer, groups: list[int]) -> Mixer:
    """A mixer for some groups that treats each as ``whole`` does."""
    mixer, weights = PER_GROUP[kind](len(groups)), {}
    for name, tensor in whole.state_dict().items():
        rows = ROWS_OF_A_GROUP.get(name.removeprefix("memory."), 1)
        parts = tensor.split(rows)
        weights[name] = tensor if name.endswith(SHARED) else torch.cat([parts[g] for g in groups])
    mixer.load_state_dict(weights)
    return mixer


def attention(mixers: list[tuple[list[int], Mixer]]) -> Attention:
    layer = Attention(
        hidden_size=D, num_heads=2 * G, head_dim=K, mixers=mixers, qkv_bias=False, o_bias=False,
        qk_norm_eps=None,
    )  # fmt: skip
    for i, part in enumerate((layer.q_proj, layer.k_proj, layer.v_proj)):
        part.weight.copy_(0.4 * normal(*part.weight.shape, seed=60 + i))
    layer.o_proj = torch.nn.Identity()  # type: ignore[assignment]
    return layer


@pytest.mark.parametrize("kind", PER_GROUP)
@pytest.mark.parametrize(
    "cut", [[[2, 0, 1]], [[2, 0], [1]], [[1], [0, 2]], [[2], [1], [0]]], ids=str
)
@torch.no_grad()
def test_each_group_keeps_its_own_weights_in_any_arrangement(
    kind: str, cut: list[list[int]]
) -> None:
    whole = PER_GROUP[kind](G)
    randomise(whole)
    x = normal(B, 30, D)
    span = make_span([0] * B, [30] * B, 30, normal(1, K))
    outputs = []
    for mixers in ([([0, 1, 2], whole)], [(g, of_groups(kind, whole, g)) for g in cut]):
        layer = attention(mixers)
        outputs.append(layer(x, span, layer.init_state(B, x))[0])
    assert_close(outputs[1], outputs[0])


@torch.no_grad()
def test_unlike_memories_live_in_one_layer() -> None:
    parts: list[tuple[list[int], Mixer]] = [
        ([2], of_groups("gla", randomised(PER_GROUP["gla"](G)), [2])),
        ([0], FullSoftmax()),
        ([1], of_groups("far", randomised(far(G)), [1])),
    ]
    layer, x = attention(parts), normal(B, 30, D)
    span = make_span([0] * B, [30] * B, 30, normal(1, K))
    out = layer(x, span, layer.init_state(B, x))[0].view(B, 30, G, 2, K)
    q, k, v = layer.project(x)
    for (group,), mixer in parts:
        heads, own = slice(2 * group, 2 * group + 2), slice(group, group + 1)
        state = mixer.init_state(B, 1, K, x)
        alone, _ = mixer(x, q[:, :, heads], k[:, :, own], v[:, :, own], span, state)
        assert_close(out[:, :, group], alone)


def randomised(mixer: Mixer) -> Mixer:
    randomise(mixer)
    return mixer
