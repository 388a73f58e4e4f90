"""Softmax over visible keys: the definition, the fused form, and the window mixer in words."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixers import CUTS, B, G, K, in_spans, normal, window_in_words
from respike.layers.softmax import FullSoftmax, WindowSoftmax
from respike.layers.state import WindowState
from respike.ops.attention import attend, attention_bias, attention_definition, visible
from tolerance import assert_close

H = 6


def inputs(T: int, S: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((B, T, H, K), (B, S, G, K), (B, S, G, K))
    return tuple(normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))  # type: ignore[return-value]


def some_seen(T: int, S: int) -> Tensor:
    """A mask with no pattern in it, and at least one key for each query."""
    seen = normal(B, T, S, seed=7) > 0.3
    seen[:, torch.arange(T), torch.arange(T) % S] = True
    return seen


def by_attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return attend(q, k.transpose(1, 2), v.transpose(1, 2), attention_bias(seen, q.dtype))


# ---- which keys are seen ---------------------------------------------------------------------


@given(
    tokens=st.integers(1, 25),
    window=st.none() | st.integers(1, 30),
    sinks=st.integers(0, 9),
    start=st.integers(0, 11),
)
@settings(max_examples=60, deadline=None)
def test_visible_is_what_its_text_says(
    tokens: int, window: int | None, sinks: int, start: int
) -> None:
    queries = torch.stack([start + torch.arange(tokens), 3 + torch.arange(tokens)])
    slots = torch.arange(start + tokens) - 2  # -2 and -1 are empty slots
    keys = torch.stack([slots, slots.flip(0)])
    got = visible(queries, keys, window, sinks)
    assert got.shape == (2, tokens, len(slots))
    for b, t, s in itertools.product(range(2), range(tokens), range(len(slots))):
        p, j = int(queries[b, t]), int(keys[b, s])
        stored, not_future = j >= 0, j <= p
        in_window = window is None or j in range(p - window + 1, p + 1)
        assert bool(got[b, t, s]) == (stored and not_future and (in_window or j < sinks))


def test_a_window_of_one_token_sees_only_itself_and_the_sinks() -> None:
    positions = torch.arange(5)[None]
    assert visible(positions, positions, 1, 0)[0].int().tolist() == torch.eye(5).int().tolist()
    assert visible(positions, positions, 1, 2)[0, 4].tolist() == [True, True, False, False, True]


def test_the_bias_is_zero_or_minus_infinity() -> None:
    bias = attention_bias(torch.tensor([[[True, False]]]), torch.bfloat16)
    assert bias.dtype == torch.bfloat16
    assert bias.tolist() == [[[[0.0, -math.inf]]]]


# ---- definition and fused form ---------------------------------------------------------------


@pytest.mark.parametrize("heads", [(6, 3), (6, 2), (6, 6), (5, 1)], ids=str)
def test_the_definition_is_softmax_written_in_numpy(heads: tuple[int, int]) -> None:
    H, G = heads
    T, S, V = 7, 11, 4
    q, k, v = normal(B, T, H, K), normal(B, S, G, K, seed=1), normal(B, S, G, V, seed=2)
    seen = some_seen(T, S)
    expected = np.zeros((B, T, H, V))
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        keys = np.flatnonzero(seen[b, t].numpy())
        group = h // (H // G)
        scores = k[b, keys, group].double().numpy() @ q[b, t, h].double().numpy() / math.sqrt(K)
        weights = np.exp(scores) / np.exp(scores).sum()
        expected[b, t, h] = weights @ v[b, keys, group].double().numpy()
    assert_close(attention_definition(q, k, v, seen), torch.from_numpy(expected).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 19), (7, 7), (7, 23)], ids=str)
def test_the_fused_form_matches_the_definition(
    lengths: tuple[int, int], dtype: torch.dtype
) -> None:
    q, k, v = inputs(*lengths, dtype=dtype)
    seen = some_seen(*lengths)
    assert_close(by_attend(q, k, v, seen), attention_definition(q, k, v, seen))


def test_the_fused_form_without_a_mask_matches_the_definition() -> None:
    q, k, v = inputs(7, 7)
    everything = torch.ones(B, 7, 7, dtype=torch.bool)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    assert_close(attend(q, keys, values), attention_definition(q, k, v, everything))
    assert_close(
        attend(q, keys, values, causal=True), attention_definition(q, k, v, everything.tril())
    )
    assert_close(
        attend(q, keys, values, scale=0.5 * K**-0.5),
        attention_definition(q * 0.5, k, v, everything),
    )


def test_the_gradients_of_the_fused_form_match_the_definition() -> None:
    seen, grads = some_seen(7, 23), []
    for form in (attention_definition, by_attend):
        x = [z.requires_grad_() for z in inputs(7, 23)]
        grads.append(torch.autograd.grad(form(*x, seen).square().sum(), x))
    for ours, expected in zip(grads[1], grads[0], strict=True):
        assert_close(ours, expected)


@pytest.mark.parametrize("form", [attention_definition, by_attend])
def test_what_is_not_seen_does_not_matter_at_all(form: Callable[..., Tensor]) -> None:
    q, k, v = inputs(7, 23)
    seen = some_seen(7, 23)
    seen[:, :, 9:14] = False
    before = form(q, k, v, seen)
    k[:, 9:14], v[:, 9:14] = 1e30, -1e30
    assert torch.equal(form(q, k, v, seen), before)


# ---- the window mixer ------------------------------------------------------------------------


def run(
    mixer: FullSoftmax | WindowSoftmax, q: Tensor, k: Tensor, v: Tensor, cuts: list[int]
) -> Tensor:
    """The mixer over spans that end at ``cuts`` and at the end."""
    return in_spans(mixer, (q, q, k, v), cuts)[0]


def expected_window(q: Tensor, k: Tensor, v: Tensor, **rule: int) -> tuple[Tensor, int]:
    rows = [
        window_in_words(*(x[b].double().numpy() for x in (q, k, v)), **rule) for b in range(len(q))
    ]
    return torch.from_numpy(np.stack([out for out, _ in rows])).float(), sum(n for _, n in rows)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(
    "rule",
    [(7, 3, 256), (7, 3, 16), (7, 3, 5), (7, 3, 1), (1, 0, 256), (1, 2, 9), (5, 0, 8), (4, 9, 6)],
    ids="window {0[0]} sinks {0[1]} reach {0[2]}".format,
)
def test_the_window_mixer_does_what_its_words_say(
    rule: tuple[int, int, int], cuts: list[int]
) -> None:
    window, sinks, reach = rule
    q, k, v = inputs(34, 34)
    expected, shortened = expected_window(q, k, v, window=window, sinks=sinks, reach=reach)
    assert bool(shortened) == (sinks > 0 and reach < 34)
    assert_close(run(WindowSoftmax(*rule), q, k, v, cuts), expected)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_the_full_mixer_is_a_window_that_never_ends(cuts: list[int]) -> None:
    q, k, v = inputs(34, 34)
    expected, _ = expected_window(q, k, v, window=34, sinks=0, reach=256)
    assert_close(run(FullSoftmax(), q, k, v, cuts), expected)


def test_within_reach_a_long_window_is_full_softmax() -> None:
    q, k, v = inputs(34, 34)
    expected = run(FullSoftmax(), q, k, v, [])
    assert_close(run(WindowSoftmax(34, 4, 34), q, k, v, [13, 14]), expected)


@pytest.mark.parametrize("mixer", [FullSoftmax(), WindowSoftmax(7, 3, 16)], ids=["full", "window"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_the_future_does_not_reach_back(
    mixer: FullSoftmax | WindowSoftmax, cuts: list[int]
) -> None:
    q, k, v = inputs(34, 34)
    before = run(mixer, q, k, v, cuts)
    for x in (q, k, v):
        x[:, 19:] += 1.0
    after = run(mixer, q, k, v, cuts)
    assert torch.equal(after[:, :19], before[:, :19])
    assert not torch.isclose(after[:, 19:], before[:, 19:]).all(-1).any()


@pytest.mark.parametrize("mixer", [FullSoftmax(), WindowSoftmax(7, 3, 16)], ids=["full", "window"])
@pytest.mark.usefixtures("poison")
def test_memory_is_written_before_it_is_read(mixer: FullSoftmax | WindowSoftmax) -> None:
    q, k, v = inputs(34, 34)
    assert torch.empty(3).isnan().all(), "the fixture does not bite"
    assert not run(mixer, q, k, v, CUTS["spans of 1 to 13"]).isnan().any()


def test_a_token_is_stored_in_one_slot_only() -> None:
    window, sinks = 5, 3
    state = WindowState(torch.zeros(1, 1, sinks + window, K), torch.zeros(1, 1, 8, K), sinks)
    for seen in range(30):
        positions = state.slot_positions(torch.tensor([seen]))[0].tolist()
        stored = [p for p in positions if p >= 0]
        last = range(max(seen - window, 0), seen)
        assert sorted(stored) == sorted(set(range(min(sinks, seen))) | {p for p in last})


def test_rows_at_unlike_positions_keep_their_own_slots() -> None:
    state = WindowState(torch.zeros(2, 1, 8, K), torch.zeros(2, 1, 8, K), 3)
    both = state.slot_positions(torch.tensor([4, 21]))
    assert both[0].tolist() == state.slot_positions(torch.tensor([4]))[0].tolist()
    assert both[1].tolist() == state.slot_positions(torch.tensor([21]))[0].tolist()
