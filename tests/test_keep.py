"""Tokens that stay exact behind a window: who they are, and attention to them, against the words.

Letters: B batch, T tokens, G KV groups, R = H / G, F prototypes, K head dim, M kept tokens.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import at_level, at_torch, each_level, native
from mixers import (
    CUTS,
    Array,
    G,
    Inputs,
    K,
    double,
    in_ragged_spans,
    in_spans,
    mixer_inputs,
    normal,
    randomise,
    tensors_of,
    turned,
)
from respike.account import kept_tokens, state_bytes
from respike.conversion.calibrate import calibrate
from respike.conversion.worth import ASKED_EVERY, KEPT_HALF_LIVES, FarAttention, fit_worth
from respike.device import set_threads
from respike.errors import RecipeError, UsageError
from respike.layers.far import FarSoftmax
from respike.layers.softmax import FullSoftmax, WindowSoftmax
from respike.models.state import DecoderState
from respike.ops import backends
from respike.ops.keep import (
    STEPS,
    Places,
    Rule,
    attend_kept,
    keep,
    keep_definition,
    keep_torch,
)
from respike.recipe import dump_recipe, load_recipe
from respike.recipe_apply import apply_recipe
from tiny import KEEPING, full, model_config, random_decoder, random_tokens, window
from tolerance import assert_close

F = 6
HALF_LIVES = (5.0, 60.0, 1000.0)
WORTH_HALF_LIVES = (1000.0, 8.0, 40.0)
RULES = [(5, 2, 512, 4), (7, 3, 16, 3), (3, 0, 8, 9), (4, 4, 9, 1), (2, 1, 30, 12), (5, 2, 5, 3)]
"""Window, sinks, reach, kept tokens: some let go for age, some for worth; one never full, one where
nothing can be kept."""
Forms = Callable[..., Places]


def keeping(rule: tuple[int, int, int, int], heads: int = 3 * G) -> FarSoftmax:
    """Random prototypes and worths, gates open."""
    inner = WindowSoftmax(*rule[:3])
    mixer = FarSoftmax(
        inner, num_heads=heads, num_groups=G, head_dim=K, features=F, kept_tokens=rule[3]
    )
    randomise(mixer)
    with torch.no_grad():
        mixer.log2_half_life.copy_(torch.tensor(HALF_LIVES).log2())
        mixer.keep_log2_half_life.copy_(torch.tensor(WORTH_HALF_LIVES).log2())
    return mixer


def held_before(rule: Rule, places: int, starts: list[int]) -> tuple[Tensor, Tensor]:
    """Worths and positions that could be held before positions ``starts``."""
    worth = normal(len(starts), G, places, seed=7)
    position = torch.full(worth.shape, -1)
    for b, start in enumerate(starts):
        gone = start - rule.window_tokens - rule.sink_tokens
        for m in range(max(0, min(places, rule.reach_tokens - rule.window_tokens, gone))):
            position[b, :, m] = start - rule.window_tokens - 1 - m
    return worth, position


def in_words(mixer: FarSoftmax, inputs: Inputs, row: int) -> tuple[Array, Array, list[set[int]]]:
    """One sequence, query by query: outputs (T, H, K), memory, and what each group keeps."""
    q, k, v = (double(z[row]) for z in inputs[1:])
    T, H, _ = q.shape
    R, window, M = H // G, mixer.window, mixer.kept_tokens
    W, sinks, reach = window.window_tokens, window.sink_tokens, window.sink_reach_tokens
    out, memories, ends = np.zeros(q.shape), np.zeros((G, F, K + 1)), []
    for g in range(G):
        ages = T - np.arange(T)
        worth = np.exp(k[:, g] @ double(mixer.keep_weight[g])) * 0.5 ** (ages / WORTH_HALF_LIVES[g])
        scores = k[:, g] @ double(mixer.key_weight[g]).T + double(mixer.key_bias[g])
        phi = np.exp(scores - scores.max(-1, keepdims=True))
        phi /= phi.sum(-1, keepdims=True)
        kept: set[int] = set()
        for p in range(T):
            memories[g] *= 0.5 ** (1 / HALF_LIVES[g])
            new, gone = p - W, None
            if new >= sinks:
                gone = new
                if reach > W:
                    old = {j for j in kept if p - j >= reach}
                    kept |= {new}
                    if not old and len(kept) > M:
                        old = {min(kept, key=lambda j: worth[j])}
                    gone = old.pop() if old else None
                    kept -= {gone}
            if gone is not None:
                memories[g] += np.outer(phi[gone], [*v[gone, g], 1.0])
            seen = [j for j in range(p + 1) if j < sinks or p - j < W or j in kept]
            for h in range(g * R, (g + 1) * R):
                turn = {j: min(p, reach - 1) if j < sinks else p for j in seen}
                logits = [
                    turned(q[p, h], turn[j]) @ turned(k[j, g], j) / math.sqrt(K) for j in seen
                ]
                likes = np.exp(double(mixer.query_weight[h]) @ q[p, h] + double(mixer.beta[h]))
                sums = np.append(np.exp(logits) @ v[seen, g], np.exp(logits).sum())
                sums += likes @ memories[g]
                out[p, h] = sums[:-1] / sums[-1]
        ends.append(kept)
    return out, memories, ends


# ---- who is kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [keep_torch, keep], ids=["torch", "fastest"])
@given(
    starts=st.lists(st.integers(0, 300), min_size=2, max_size=2),
    tokens=st.integers(1, 2 * STEPS + 5),
    missing=st.integers(0, 20),
    rule=st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(-1, 90)),
    places=st.integers(1, 12),
    coarse=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_every_form_keeps_whom_the_definition_keeps(
    form: Forms,
    starts: list[int],
    tokens: int,
    missing: int,
    rule: tuple[int, int, int],
    places: int,
    coarse: bool,
) -> None:
    limits = Rule(rule[0], rule[1], rule[0] + rule[2])
    worth = normal(2, tokens, G, seed=3)
    held_worth, position = held_before(limits, places, starts)
    if coarse:  # equals
        worth, held_worth = worth.round(), held_worth.round()
    span = torch.tensor([[starts[0], tokens], [starts[1], max(0, tokens - missing)]])
    wanted = keep_definition(worth, span, held_worth, position, limits)
    got = form(worth, span, held_worth, position, limits)
    for name, mine, theirs in zip(Places._fields, got, wanted, strict=True):
        assert torch.equal(mine, theirs), name
    for b, (start, valid) in enumerate(span.tolist()):
        first = max(0, limits.first_lost(places) - start)
        assert (wanted.lost[b, :first] == -1).all()
        assert (wanted.lost[b, first:valid] >= 0).all()
        assert (wanted.lost[b, valid:] == -1).all()


def test_the_kernel_is_what_runs_where_there_is_one() -> None:
    if backends.kernels() is None:
        pytest.skip("no native kernels here")
    assert backends.choose("keep", torch.zeros(1)) is not None


# ---- the mixer does what the words say -------------------------------------------------------


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(
    "rule", RULES, ids="window {0[0]} sinks {0[1]} reach {0[2]} kept {0[3]}".format
)
@pytest.mark.parametrize("R", [1, 3])
@torch.no_grad()
def test_the_mixer_does_what_its_words_say(
    rule: tuple[int, int, int, int], R: int, cuts: list[int]
) -> None:
    mixer, inputs = keeping(rule, R * G), mixer_inputs(40, R * G)
    got, state = in_spans(mixer, inputs, cuts)
    for row in range(len(got)):
        out, memory, ends = in_words(mixer, inputs, row)
        assert_close(got[row], torch.from_numpy(out).float())
        assert_close(state.memory.memory[row], torch.from_numpy(memory).float())
        for g, kept in enumerate(ends):
            assert set(state.memory.position[row, g].tolist()) - {-1} == kept


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@torch.no_grad()
def test_room_for_all_is_full_softmax(cuts: list[int]) -> None:
    mixer, inputs = keeping((5, 2, 512, 40)), mixer_inputs(40, 3 * G)
    got, state = in_spans(mixer, inputs, cuts)
    assert_close(got, in_spans(FullSoftmax(), inputs, cuts)[0])
    assert not state.memory.memory.any()


@torch.no_grad()
def test_spans_longer_than_a_list_are_what_short_ones_are() -> None:
    mixer, inputs = keeping((5, 2, 100, 7)), mixer_inputs(3 * STEPS + 11, 3 * G, rows=1)
    whole, state = in_spans(mixer, inputs, [])
    pieces, other = in_spans(mixer, inputs, range(1, 200, 3))
    assert_close(whole, pieces)
    for name, tensor in tensors_of(other).items():
        assert_close(tensors_of(state)[name].float(), tensor.float())


@given(
    calls=st.lists(st.lists(st.integers(0, 14), min_size=3, max_size=3), min_size=1, max_size=5),
    rule=st.sampled_from(RULES),
)
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_ragged_rows_give_what_each_gives_alone(
    calls: list[list[int]], rule: tuple[int, int, int, int]
) -> None:
    calls = [call for call in calls if max(call)] or [[1, 0, 2]]
    mixer, inputs = keeping(rule), mixer_inputs(70, 3 * G, rows=3)
    rows, state = in_ragged_spans(mixer, inputs, calls, 30.0)
    for row, total in enumerate(map(sum, zip(*calls, strict=True))):
        if total:
            alone, own = in_spans(mixer, tuple(z[row : row + 1, :total] for z in inputs), [])  # type: ignore[arg-type]
            assert_close(rows[row], alone[0])
            for name, tensor in tensors_of(own.memory).items():
                assert_close(tensors_of(state.memory)[name][row].float(), tensor[0].float())


@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_memory_is_written_before_it_is_read() -> None:
    mixer, inputs = keeping((5, 2, 16, 4)), mixer_inputs(40, 3 * G)
    assert not in_spans(mixer, inputs, CUTS["spans of 1 to 13"])[0].isnan().any()
    rows, _ = in_ragged_spans(mixer, inputs, [[9, 4], [1, 7], [0, 3]], 5.0)
    assert not torch.cat(rows).isnan().any()


@torch.no_grad()
def test_what_is_kept_is_the_memorys_and_goes_with_it() -> None:
    mixer, inputs = keeping((5, 2, 512, 4)), mixer_inputs(40, 3 * G)
    mixer.off = frozenset({"memory"})
    wanted, _ = in_spans(WindowSoftmax(5, 2, 512), inputs, [])
    assert torch.equal(in_spans(mixer, inputs, [])[0], wanted)


@torch.no_grad()
def test_shut_heads_still_see_what_is_kept() -> None:
    mixer, inputs = keeping((5, 2, 512, 4)), mixer_inputs(40, 3 * G)
    mixer.beta.fill_(-math.inf)
    out, state = in_spans(mixer, inputs, [])
    assert (state.memory.position >= 0).all()
    assert not torch.isclose(out, in_spans(WindowSoftmax(5, 2, 512), inputs, [])[0]).all()


def test_gradients_are_those_of_one_softmax_over_what_is_seen() -> None:
    """Against the slope of the loss in a direction of every input and weight but the worths."""
    mixer, inputs = keeping((4, 1, 30, 3)), mixer_inputs(20, 3 * G)
    mixer.keep_weight.data.zero_()  # a choice has no slope: here no step changes it
    leaves = [z.requires_grad_() for z in inputs[1:]]
    fixed = ("keep_weight", "keep_log2_half_life", "log2_half_life")
    leaves += [p for name, p in mixer.named_parameters() if name not in fixed]
    probe = normal(*inputs[1].shape, seed=9)

    def loss() -> Tensor:
        return (in_spans(mixer, inputs, [])[0] * probe).double().sum()

    slopes, wanted = [], []
    for i, (leaf, grad) in enumerate(zip(leaves, torch.autograd.grad(loss(), leaves), strict=True)):
        way = normal(*leaf.shape, seed=50 + i)
        wanted.append((grad * way).sum())
        with torch.no_grad():
            values = []
            for step in (1e-3, -2e-3, 1e-3):
                leaf += step * way
                values.append(loss())
        slopes.append((values[0] - values[1]).float() / 2e-3)
    assert torch.stack(wanted).abs().min() > 0.01
    torch.testing.assert_close(torch.stack(slopes), torch.stack(wanted), rtol=0.02, atol=0.02)


class Attention(NamedTuple):
    """Two sequences whose queries see kept tokens, and the gradient of what they make of them."""

    leaves: tuple[Tensor, Tensor, Tensor]
    places: Places
    probe: Tensor
    weight: Tensor

    @classmethod
    def of(
        cls, rule: Rule, kept_tokens: int, tokens: int, rep: int, dim: int, dtype: torch.dtype
    ) -> "Attention":
        starts = [0, 40]
        span = torch.tensor([[0, tokens], [40, tokens - 3]])
        held = held_before(rule, kept_tokens, starts)
        places = keep(normal(2, tokens, G), span, *held, rule)
        shapes = (tokens, rep * G, dim), (G, kept_tokens + tokens, dim)
        q, k, v = (normal(2, *shapes[i > 0], seed=1 + i).to(dtype) for i in range(3))
        probe, weight = normal(*q.shape, seed=4).to(dtype), normal(*q.shape[:3], seed=5)
        return cls((q, k, v), places, probe.float(), weight)

    def by_the_definition(self) -> list[Tensor]:
        """Of all queries times all candidates, float32, by autograd."""
        q, k, v = (x.detach().float().requires_grad_() for x in self.leaves)
        (B, T, H, dim), M = q.shape, k.shape[2] - q.shape[1]
        step = torch.arange(T)
        seen = torch.arange(M + T) - M <= step[:, None]
        seen = seen & (step[:, None] < self.places.until[:, :, None])
        scores = torch.einsum("btgrk,bgck->bgrtc", q.view(B, T, G, H // G, dim), k) * dim**-0.5
        scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
        some = seen.any(-1)[:, :, None].expand(-1, -1, H // G, -1)
        weights = scores.masked_fill(~some[..., None], 0).softmax(-1) * some[..., None]
        mean = torch.einsum("bgrtc,bgck->btgrk", weights, v).flatten(2, 3)
        mass = scores.logsumexp(-1).permute(0, 3, 1, 2).flatten(2)
        return self._with_gradients(mean, mass, (q, k, v))

    def by_the_op(self) -> list[Tensor]:
        leaves = tuple(x.detach().requires_grad_() for x in self.leaves)
        return self._with_gradients(*attend_kept(*leaves, self.places), leaves)

    def _with_gradients(
        self, mean: Tensor, mass: Tensor, leaves: tuple[Tensor, ...]
    ) -> list[Tensor]:
        some = mass > -torch.inf
        loss = (mean * self.probe).sum() + (mass[some] * self.weight[some]).sum()
        gradients = torch.autograd.grad(loss, leaves)
        assert torch.isneginf(mass[~some]).all()
        return [
            mean.detach().to(leaves[0].dtype),
            mass.detach().where(some, 0),
            some.float(),
            *gradients,
        ]

    def compare(self) -> None:
        for mine, theirs in zip(self.by_the_op(), self.by_the_definition(), strict=True):
            assert_close(mine, theirs.to(mine.dtype))


ATTENTIONS = {
    "some see nobody": (Rule(6, 1, 90), 5, 2 * STEPS + 9, 3, K),
    "nobody is ever kept": (Rule(6, 1, 6), 5, 20, 3, K),
    "more than a block of columns, odd sizes": (Rule(9, 2, 500), 150, 3 * STEPS + 5, 7, 10),
    "as wide as models have them": (Rule(9, 2, 120), 70, 2 * STEPS, 3, 64),
    "more heads than a tile has rows": (Rule(9, 2, 120), 20, 40, 200, 6),
}
each_attention = pytest.mark.parametrize("case", ATTENTIONS.values(), ids=ATTENTIONS)
Sizes = tuple[Rule, int, int, int, int]


@each_attention
def test_attention_to_the_kept_is_that_to_whom_each_step_sees(case: Sizes) -> None:
    with at_torch():
        Attention.of(*case, torch.float32).compare()


@native
@each_level
@each_attention
def test_the_kernel_attends_to_the_same_at_every_level(case: Sizes, level: int) -> None:
    with at_level(level):
        Attention.of(*case, torch.float32).compare()


@native
@each_level
def test_the_kernel_does_so_in_bfloat16(level: int) -> None:
    with at_level(level):
        Attention.of(*ATTENTIONS["as wide as models have them"], torch.bfloat16).compare()


@native
@pytest.mark.usefixtures("poison")
def test_the_kernel_writes_all_that_it_gives_whatever_the_threads() -> None:
    found = []
    rule, M, _, rep, dim = ATTENTIONS["some see nobody"]
    for threads in (1, 3):
        set_threads(threads)
        found.append(Attention.of(rule, M, 2100, rep, dim, torch.float32).by_the_op())
    for one, three in zip(*found, strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, three)


def test_attention_to_the_kept_holds_no_scores() -> None:
    case = Attention.of(Rule(6, 1, 90), 5, 2 * STEPS + 9, 3, K, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        case.by_the_op()
    largest = max(x.numel() for x in saved)
    assert largest <= max(x.numel() for x in (*case.leaves, *case.places))


# ---- recipes ---------------------------------------------------------------------------------


def test_a_recipe_says_how_many_are_kept_and_none_is_written_as_before() -> None:
    source = model_config()
    shaped = apply_recipe(load_recipe("constant", ("far.kept_tokens=5", "window_tokens=9")), source)
    memory = shaped.layers[0].mixers[0].memory  # type: ignore[union-attr]
    assert memory is not None
    assert memory.kind == "far"
    assert memory.kept_tokens == 5
    plain = apply_recipe(load_recipe("constant"), source).model_dump_json()
    assert "kept_tokens" not in plain
    with pytest.raises(RecipeError, match=r"far\.kept_tokens"):
        load_recipe("constant", ("far.kept_tokens=-1",))


def test_groups_may_keep_more_tokens_than_others() -> None:
    by_group = "far.kept_by_group={1: {0: 9, 2: 9}, 2: {1: 0}}"
    made = load_recipe("constant", ("far.kept_tokens=5", by_group))
    again = yaml.safe_load(dump_recipe(made))
    assert again["far"]["kept_by_group"] == {1: {0: 9, 2: 9}, 2: {1: 0}}
    shaped = apply_recipe(made, model_config())
    kept = [[(m.groups, kept_tokens(m)) for m in layer.mixers] for layer in shaped.layers]
    assert kept[:4] == [
        [((0, 1, 2), 5)], [((0, 2), 9), ((1,), 5)], [((0, 2), 5), ((1,), 0)], [((0, 1, 2), 5)],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("memory=none far.kept_by_group={0: {1: 9}}", ["names KV group 1", "has none"]),
        ("far.kept_by_group={99: {0: 9}}", ["kept_by_group names layer 99", "layers 0 to"]),
        ("far.kept_by_group={0: {7: 9}}", ["kept_by_group.0 names KV group 7", "groups 0 to 2"]),
        ("far.kept_by_group={1: {1: 9}}", ["kept_by_group.1 names KV group 1", "keeps softmax"]),
        ("far.kept_by_group={1: {1: -9}}", ["far.kept_by_group.1.1", "-9"]),
        ("far.kept_by_group=[9]", ["far.kept_by_group"]),
    ],
)
def test_kept_tokens_of_groups_that_cannot_have_them_are_refused(
    change: str, words: list[str]
) -> None:
    changes = ["softmax_groups={1: [1]}", *re.split(r" (?=far)", change)]
    with pytest.raises(RecipeError) as error:
        apply_recipe(load_recipe("constant", changes), model_config())
    for word in words:
        assert word in str(error.value)


# ---- states ----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_state_is_as_large_as_its_account_and_goes_on_from_a_file(tmp_path: Path) -> None:
    config = model_config(((window(0, 1, 2, memory=KEEPING),), (full(1), window(0, 2))))
    decoder, ids = random_decoder(config), random_tokens(2, 60)
    _, state = decoder(ids[:, :40])
    assert state.nbytes() == 2 * state_bytes(config, 40, 4)  # of two sequences
    state.save(tmp_path / "state", "of this model")
    other = decoder.init_state(2)
    other.load(tmp_path / "state", "of this model")
    copy = DecoderState.join(state.split())
    wanted, _ = decoder(ids[:, 40:], state)
    for again in (other, copy):
        assert torch.equal(decoder(ids[:, 40:], again)[0], wanted)


# ---- which are worth keeping -----------------------------------------------------------------


def planted(T: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (T, 1, 2, K), keys (T, 1, K) as they are and rotated.

    Every seventh key has much of one direction, which every query looks for.
    """
    way = torch.nn.functional.normalize(normal(K, seed=1), dim=0)
    k = 0.3 * normal(T, 1, K, seed=seed)
    k[::7] += 3 * way
    turned_k = k.clone()  # as at one place: what is tested is who is looked at
    q = 3 * way + 0.3 * normal(T, 1, 2, K, seed=seed + 1)
    return q, k, turned_k


def test_keys_that_later_queries_look_at_are_worth_most() -> None:
    seen = [FarAttention.of(*planted(400, seed), 9, 2) for seed in (10, 20)]
    weight, half_life = fit_worth(seen, 0, 5)
    fresh = planted(300, 30)[1][:, 0] @ weight
    rest = torch.ones(300, dtype=torch.bool)
    rest[::7] = False
    assert fresh[~rest].min() > fresh[rest].max()
    assert half_life in KEPT_HALF_LIVES


def test_shares_are_those_of_far_keys_under_one_softmax() -> None:
    q, k, turned_k = planted(60, 10)
    seen = FarAttention.of(q, k, turned_k, 9, 2)
    asked = range(11, 60, ASKED_EVERY)
    wanted = torch.zeros(1, len(asked), 60)
    for row, p in enumerate(asked):
        for r in range(2):
            weights = (q[p, 0, r] @ turned_k[: p + 1, 0].T / math.sqrt(K)).softmax(-1)
            wanted[0, row, 2 : p - 8] += weights[2 : p - 8]
    assert_close(seen.share, wanted)


def test_what_is_caught_is_what_would_be_kept_then() -> None:
    T, kept, half_life = 150, 4, 40.0
    q, k, turned_k = planted(T, 10)
    seen = FarAttention.of(q, k, turned_k, 9, 2)
    weight = normal(K, seed=5)
    worth = k[:, 0] @ weight + torch.arange(T) * math.log(2) / half_life
    rule, total = Rule(9, 2, 1000), 0.0
    leaving = worth.roll(9)[None, :, None]  # at step t the key of t - W
    held, position = torch.zeros(1, 1, kept), torch.full((1, 1, kept), -1)
    for row, p in list(enumerate(range(11, T, ASKED_EVERY)))[::ASKED_EVERY]:
        span = torch.tensor([[0, p + 1]])
        places = keep_definition(leaving[:, : p + 1], span, held, position, rule)
        at = [m - kept - 9 for m in places.held[0, 0, -1].tolist() if m >= 0]
        total += float(seen.share[0, row, at].sum())
    found = seen.sampled(ASKED_EVERY).caught(0, weight, half_life, torch.tensor([kept, 0, T, 1]))
    assert float(found[:, 0].sum()) == pytest.approx(total, rel=1e-5)
    assert (found[:, 1] == 0).all()
    assert_close(found[:, 2], seen.share[0, ::ASKED_EVERY].sum(-1))
    assert 0 < found[:, 3].sum() < found[:, 0].sum()


@pytest.mark.parametrize("fitted", [True, False])
def test_calibration_fits_worths_and_says_when_contexts_are_too_short(fitted: bool) -> None:
    original = random_decoder(model_config(((full(0, 1, 2),),)))
    config = model_config(((window(0, 1, 2, tokens=9, sinks=2, memory=KEEPING),),))
    text = random_tokens(4, 200 if fitted else 100)
    if not fitted:
        with pytest.raises(UsageError, match="calibration needs contexts of at least"):
            calibrate(original, config, text[:2], text[2:], 64.0)
        return
    tensors, _ = calibrate(original, config, text[:2], text[2:], 64.0)
    name = "model.layers.0.self_attn.mixers.0.keep_"
    assert tensors[f"{name}weight"].isfinite().all()
    assert tensors[f"{name}weight"].any(-1).all()
    assert set(tensors[f"{name}log2_half_life"].exp2().tolist()) <= set(KEPT_HALF_LIVES)
