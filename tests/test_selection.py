"""Selection: the measurements are what they say, and the groups that matter are the ones picked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from respike.config import ModelConfig
from respike.errors import UsageError
from respike.evaluation import Task, Vocabulary
from respike.layers.far import FarSoftmax
from respike.layers.mixer import Mixer
from respike.layers.softmax import FullSoftmax, WindowSoftmax
from respike.models.decoder import Decoder
from respike.recipe import apply_recipe, dump_recipe, load_recipe
from respike.selection import Budget, Group, Selection, select, selected_recipe
from respike.tasks import make_trials
from respike.tokenizer import Tokenizer
from tiny import FAR, full, model_config, random_decoder, random_tokens, save_tokenizer, window

WINDOW, SINKS, TRIALS = 9, 2, 3
LAG = WINDOW + 64
"""Of the copying probe, for a window this small."""
CONTEXTS = (2, 37)
LAYERS, GROUPS = 2, 3
EVERY = [(layer, group) for layer in range(LAYERS) for group in range(GROUPS)]
ALONE: Group = (1, 2)
"""The one group that does anything in `lonely`."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, add_bos=False)
    return Tokenizer.from_folder(folder)


def small(seed: int = 0) -> Decoder:
    return random_decoder(model_config(((full(0, 1, 2),),) * LAYERS), seed=seed)


def lonely(seed: int = 0) -> Decoder:
    """A model in which the heads of one KV group alone reach the output."""
    decoder = small(seed)
    config = decoder.config
    width = config.heads_per_group * config.head_dim
    for number, layer in enumerate(decoder.layers):
        for group in range(GROUPS):
            if (number, group) != ALONE:
                layer.self_attn.o_proj.weight[:, group * width : (group + 1) * width] = 0
    return decoder


def budget(count: int, **changes: Any) -> Budget:
    fields = {
        "window_tokens": WINDOW,
        "sink_tokens": SINKS,
        "copy_trials": TRIALS,
        "passkey_trials": 0,
        **changes,
    }
    return Budget(softmax_groups=count, **fields)


def run(decoder: Decoder, tokenizer: Tokenizer, count: int, **changes: Any) -> Selection:
    return select(decoder, tokenizer, random_tokens(*CONTEXTS), budget(count, **changes))


# ---- an independent measurement --------------------------------------------------------------


def with_full(decoder: Decoder, full_groups: set[Group]) -> Callable[[Tensor], Tensor]:
    """Logits of the model in which these groups are full and all others windowed."""
    twin = random_decoder(decoder.config)
    twin.load_state_dict(decoder.state_dict())
    for number, layer in enumerate(twin.layers):
        window = WindowSoftmax(WINDOW, SINKS, decoder.config.max_position_embeddings)
        layer.self_attn.set_mixers(
            [
                ([group], FullSoftmax() if (number, group) in full_groups else window)
                for group in range(GROUPS)
            ]
        )

    def logits(tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            return twin(tokens)[0].double()

    return logits


def kl_beyond_the_window(decoder: Decoder, full_groups: set[Group]) -> float:
    tokens = random_tokens(*CONTEXTS)
    p = with_full(decoder, set(EVERY))(tokens).log_softmax(-1)
    q = with_full(decoder, full_groups)(tokens).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return float(kl[:, WINDOW : tokens.shape[1] - 1 : 4].mean())


def copy_nats(decoder: Decoder, tokenizer: Tokenizer, full_groups: set[Group]) -> float:
    trials = make_trials(Vocabulary(tokenizer), Task("copy", LAG), TRIALS)
    tokens = torch.tensor([t.tokens for t in trials])
    nats = -with_full(decoder, full_groups)(tokens).log_softmax(-1)
    at = torch.arange(LAG, 2 * LAG - 1, 2)
    return float(nats[:, at].gather(2, tokens[:, at + 1, None]).mean())


def passkey_nats(decoder: Decoder, tokenizer: Tokenizer, full_groups: set[Group]) -> float:
    trials = make_trials(Vocabulary(tokenizer), Task("passkey", 2 * LAG, 0.1), 2)
    tokens, at = torch.tensor([t.tokens for t in trials]), torch.tensor(trials[0].answers)
    nats = -with_full(decoder, full_groups)(tokens).log_softmax(-1)
    return float(nats[:, at - 1].gather(2, tokens[:, at, None]).mean())


def test_recall_is_copying_plus_the_passkey(tokenizer: Tokenizer) -> None:
    decoder = small()
    found = run(decoder, tokenizer, 1, passkey_trials=2)
    for step, kept in zip(found.rounds, (set(), set(found.picked)), strict=True):
        parts = [nats(decoder, tokenizer, kept) for nats in (copy_nats, passkey_nats)]
        assert step["recall"] == pytest.approx(sum(parts), rel=1e-4)
    intact = copy_nats(decoder, tokenizer, set(EVERY)) + passkey_nats(
        decoder, tokenizer, set(EVERY)
    )
    for group, damage in found.recall_damage.items():
        rest = set(EVERY) - {group}
        without = copy_nats(decoder, tokenizer, rest) + passkey_nats(decoder, tokenizer, rest)
        assert damage == pytest.approx(without - intact, abs=1e-4)


@pytest.fixture(scope="module")
def measured(tokenizer: Tokenizer) -> tuple[Decoder, Selection]:
    decoder = small()
    return decoder, run(decoder, tokenizer, 3, picks_per_round=2)


def test_gains_equal_a_full_pass_of_each_candidate(
    measured: tuple[Decoder, Selection], tokenizer: Tokenizer
) -> None:
    decoder, found = measured
    for step in found.rounds[:2]:
        kept = set(step["kept"])
        kl, copy = kl_beyond_the_window(decoder, kept), copy_nats(decoder, tokenizer, kept)
        assert step["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert step["recall"] == pytest.approx(copy, rel=1e-4)
        assert step["kl_gain"].keys() == step["recall_gain"].keys() <= set(EVERY) - kept
        assert len(step["kl_gain"]) >= 3 - len(kept)
        for group in step["kl_gain"]:
            more = kept | {group}
            gain = kl - kl_beyond_the_window(decoder, more)
            assert step["kl_gain"][group] == pytest.approx(gain, abs=2e-5)
            gain = copy - copy_nats(decoder, tokenizer, more)
            assert step["recall_gain"][group] == pytest.approx(gain, abs=2e-5)


def test_the_gains_differ_so_that_mixing_them_up_would_show(
    measured: tuple[Decoder, Selection],
) -> None:
    _, found = measured
    for scores in (found.rounds[0]["kl_gain"], found.rounds[0]["recall_gain"], found.recall_damage):
        assert len({round(x, 4) for x in scores.values()}) == len(EVERY)


def test_recall_damage_equals_a_full_pass_without_the_group(
    measured: tuple[Decoder, Selection], tokenizer: Tokenizer
) -> None:
    decoder, found = measured
    original = copy_nats(decoder, tokenizer, set(EVERY))
    assert set(found.recall_damage) == set(EVERY)
    for group, damage in found.recall_damage.items():
        without = copy_nats(decoder, tokenizer, set(EVERY) - {group})
        assert damage == pytest.approx(without - original, abs=2e-5)


def test_the_last_round_measures_what_was_kept(
    measured: tuple[Decoder, Selection], tokenizer: Tokenizer
) -> None:
    decoder, found = measured
    last = found.rounds[-1]
    assert set(last["kept"]) == set(found.picked)
    assert last["kl"] == pytest.approx(kl_beyond_the_window(decoder, set(found.picked)), rel=1e-4)
    assert last["recall"] == pytest.approx(
        copy_nats(decoder, tokenizer, set(found.picked)), rel=1e-4
    )
    assert last["kl"] < found.rounds[0]["kl"]


def test_picks_alternate_between_the_best_by_recalling_and_the_best_by_kl(
    measured: tuple[Decoder, Selection],
) -> None:
    _, found = measured
    assert found.reasons == ["recall", "kl", "recall"]
    first, second = found.rounds[:2]
    copying = {g: first["recall_gain"][g] + found.recall_damage[g] for g in EVERY}
    assert found.picked[0] == max(EVERY, key=lambda g: copying[g])
    others = [g for g in EVERY if g != found.picked[0]]
    assert found.picked[1] == max(others, key=lambda g: first["kl_gain"][g])
    assert second["kept"] == found.picked[:2]


# ---- picks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 6])
def test_picks_are_unique_and_as_many_as_asked_for(tokenizer: Tokenizer, count: int) -> None:
    found = run(small(), tokenizer, count)
    assert len(found.picked) == len(set(found.picked)) == len(found.reasons) == count
    assert set(found.picked) <= set(EVERY)


def test_keeping_everything_is_the_original(tokenizer: Tokenizer) -> None:
    assert run(small(), tokenizer, 6).rounds[-1]["kl"] == pytest.approx(0, abs=1e-6)


def test_the_same_call_gives_the_same_selection(tokenizer: Tokenizer) -> None:
    assert run(small(), tokenizer, 3) == run(small(), tokenizer, 3)
    assert (
        run(small(), tokenizer, 3).recall_damage != run(small(), tokenizer, 3, seed=1).recall_damage
    )


def test_the_one_group_that_matters_is_picked_first(tokenizer: Tokenizer) -> None:
    decoder = lonely(seed=1)
    found = run(decoder, tokenizer, 2)
    first = found.rounds[0]
    assert first["recall_gain"][ALONE] > 1e-3, "the seed must make the group help with copying"
    assert first["kl_gain"][ALONE] > 1e-3
    for group in set(EVERY) - {ALONE}:
        assert first["kl_gain"][group] == pytest.approx(0, abs=1e-6)
        assert first["recall_gain"][group] == pytest.approx(0, abs=1e-6)
        assert found.recall_damage[group] == pytest.approx(0, abs=1e-6)
    assert found.picked[0] == ALONE
    assert found.rounds[-1]["kl"] == pytest.approx(0, abs=1e-6)


# ---- the model afterwards --------------------------------------------------------------------


def logits(decoder: Decoder) -> Tensor:
    with torch.inference_mode():
        return decoder(random_tokens(2, 41, seed=3))[0]


def test_the_models_mixers_are_put_back(tokenizer: Tokenizer) -> None:
    decoder = small()
    before = [layer.self_attn.arrangement() for layer in decoder.layers]
    expected = logits(decoder)
    run(decoder, tokenizer, 2)
    after = [layer.self_attn.arrangement() for layer in decoder.layers]
    assert after == before
    assert torch.equal(logits(decoder), expected)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", [1, 7])
def test_the_models_mixers_are_put_back_after_an_exception(
    tokenizer: Tokenizer, error: BaseException, when: int
) -> None:
    decoder = small()
    expected = logits(decoder)

    def stop(done: int, _: int) -> None:
        if done == when:
            raise error

    with pytest.raises(type(error)):
        select(decoder, tokenizer, random_tokens(*CONTEXTS), budget(2), stop)
    assert torch.equal(logits(decoder), expected)


def test_the_first_round_measures_every_group(measured: tuple[Decoder, Selection]) -> None:
    assert set(measured[1].rounds[0]["kl_gain"]) == set(EVERY)


def test_progress_rises_and_stays_within_its_total(tokenizer: Tokenizer) -> None:
    steps: list[tuple[int, int]] = []
    decoder = small()
    select(
        decoder, tokenizer, random_tokens(*CONTEXTS), budget(3, picks_per_round=2),
        lambda *x: steps.append(x),
    )  # fmt: skip
    assert {total for _, total in steps} == {18}
    done = [done for done, _ in steps]
    assert done == sorted(set(done))
    assert done[0] == 1
    assert 12 < done[-1] <= 18


# ---- beside a conversion ---------------------------------------------------------------------


def conversion(decoder: Decoder, memory: bool = True) -> Decoder:
    """Of all groups of ``decoder``: the window, and a far memory with random weights."""
    reach = decoder.config.max_position_embeddings
    part = window(0, 1, 2, tokens=WINDOW, sinks=SINKS, reach=reach, memory=FAR if memory else None)
    config = model_config(((part,),) * LAYERS)
    made = random_decoder(config, seed=5)
    made.load_state_dict({**made.state_dict(), **decoder.state_dict()}, strict=False)
    return made


def test_a_conversion_without_memories_is_the_window(tokenizer: Tokenizer) -> None:
    decoder, text = small(), random_tokens(*CONTEXTS)
    found = select(decoder, tokenizer, text, budget(3), rest=conversion(decoder, memory=False))
    assert found == run(decoder, tokenizer, 3)


def test_with_memories_the_student_is_the_conversion(tokenizer: Tokenizer) -> None:
    """Before the first pick it is the conversion itself, after the last some groups are full."""
    decoder, text = small(), random_tokens(*CONTEXTS)
    other = conversion(decoder)
    found = select(decoder, tokenizer, text, budget(2), rest=other)
    p = with_full(decoder, set(EVERY))(text).log_softmax(-1)

    def kl_of(model: Decoder) -> float:
        with torch.inference_mode():
            q = model(text)[0].double().log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1)[:, WINDOW : text.shape[1] - 1 : 4].mean())

    first, last = found.rounds[0], found.rounds[-1]
    assert first["kl"] == pytest.approx(kl_of(other), rel=1e-4)
    assert abs(first["kl"] - run(decoder, tokenizer, 1).rounds[0]["kl"]) > 1e-4
    for number, layer in enumerate(other.layers):
        kept = [g for n, g in found.picked if n == number]
        groups = [g for g in range(GROUPS) if g not in kept]
        mixer = layer.self_attn.mixers[0]
        assert isinstance(mixer, FarSoftmax)
        parts: list[tuple[list[int], Mixer]] = [(groups, mixer.of_groups(groups))] if groups else []
        layer.self_attn.set_mixers([*parts, *([(kept, FullSoftmax())] if kept else [])])
    assert last["kl"] == pytest.approx(kl_of(other), rel=1e-4)


def test_a_conversion_of_another_shape_or_with_softmax_is_refused(tokenizer: Tokenizer) -> None:
    decoder, text = small(), random_tokens(*CONTEXTS)
    with pytest.raises(UsageError, match="layer 0 is not one window"):
        select(decoder, tokenizer, text, budget(2), rest=small())
    with pytest.raises(UsageError, match="other layers or heads"):
        select(decoder, tokenizer, text, budget(2), rest=random_decoder(model_config()))


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [-1, 0, 7])
def test_a_budget_that_the_model_cannot_have_is_refused(tokenizer: Tokenizer, count: int) -> None:
    with pytest.raises(UsageError, match=f"softmax-groups {count}: expected 1 to 6"):
        run(small(), tokenizer, count)


def test_contexts_that_do_not_reach_beyond_the_window_are_refused(tokenizer: Tokenizer) -> None:
    decoder = small()
    with pytest.raises(UsageError, match="at least 18 are needed"):
        select(decoder, tokenizer, random_tokens(2, 17), budget(2))
    select(decoder, tokenizer, random_tokens(1, 18), budget(1, copy_trials=1))


def test_a_model_that_has_windows_already_is_refused(tokenizer: Tokenizer) -> None:
    """Its windowed groups would be measured as if they were full."""
    decoder = random_decoder(model_config())
    with pytest.raises(UsageError, match="full softmax in 4 of its 12 KV groups"):
        run(decoder, tokenizer, 2)


# ---- the recipe ------------------------------------------------------------------------------


def source() -> ModelConfig:
    return small().config


def test_the_recipe_keeps_exactly_what_was_picked(
    measured: tuple[Decoder, Selection], tmp_path: Path
) -> None:
    _, found = measured
    recipe = selected_recipe(found, budget(3), source(), "mine", "tiny")
    config = apply_recipe(recipe, source())
    assert sorted(config.softmax_groups()) == sorted(found.picked)
    windows = [part for _, part in config.mixers() if part.mixer == "window"]
    assert {(w.window_tokens, w.sink_tokens) for w in windows} == {(WINDOW, SINKS)}
    assert recipe.measured_on == "tiny"
    assert "3 of 6 KV groups" in recipe.about
    path = tmp_path / "mine.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


def test_the_converted_model_is_the_one_that_was_measured(
    measured: tuple[Decoder, Selection],
) -> None:
    decoder, found = measured
    recipe = selected_recipe(found, budget(3), source(), "mine", "tiny")
    converted = random_decoder(apply_recipe(recipe, source()))
    converted.load_state_dict(decoder.state_dict())
    tokens = random_tokens(*CONTEXTS)
    with torch.inference_mode():
        mine = converted(tokens)[0].double()
    torch.testing.assert_close(mine, with_full(decoder, set(found.picked))(tokens))


def test_the_scores_file_holds_every_pick_and_every_score(
    measured: tuple[Decoder, Selection],
) -> None:
    _, found = measured
    scores = json.loads(json.dumps(found.as_dict()))
    picked = zip(found.picked, found.reasons, strict=True)
    assert scores["picked"] == [[*group, why] for group, why in picked]
    names = {f"{layer}.{group}" for layer, group in EVERY}
    assert set(scores["recall_damage_nats"]) == names
    assert [r["kept"] for r in scores["rounds"]] == [0, 2, 3]
    for step, mine in zip(scores["rounds"], found.rounds, strict=True):
        kept = {f"{layer}.{group}" for layer, group in mine["kept"]}
        assert step["kl_gain_nats"].keys() == step["recall_gain_nats"].keys() <= names - kept
        assert len(step["kl_gain_nats"]) == len(mine["kl_gain"])
        assert step["kl_nats"] == pytest.approx(mine["kl"], abs=1e-6)
        assert step["recall_nats"] == pytest.approx(mine["recall"], abs=1e-6)
    group = found.picked[0]
    name = f"{group[0]}.{group[1]}"
    assert scores["recall_damage_nats"][name] == pytest.approx(found.recall_damage[group], abs=1e-6)
