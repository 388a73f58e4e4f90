"""Recipes: what they say, what they may not say, and what comes of them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from respike.config import (
    AnyMemory,
    BlockMixer,
    DeltaMemory,
    FarMemory,
    FullMixer,
    GlaMemory,
    LayerConfig,
    Mixer,
    ModelConfig,
    TiedMemory,
    WindowMixer,
)
from respike.errors import RecipeError
from respike.recipe import (
    Recipe,
    apply_recipe,
    builtin_recipes,
    dump_recipe,
    load_recipe,
    recipe_text,
)
from tiny import CONTEXT, full, model_config

DEPTH, GROUPS = 7, 3
SOURCE = model_config(((full(0, 1, 2),),) * DEPTH, bos_token_id=5)
MINIMAL = {"recipe": 1, "name": "mine", "layers": [{"at": "all", "mixer": "full"}]}


def recipe(*layers: dict[str, Any], **fields: Any) -> Recipe:
    return Recipe.model_validate(MINIMAL | {"layers": list(layers)} | fields)


def rule(at: Any, mixer: str = "window", **fields: Any) -> dict[str, Any]:
    return {"at": at, "mixer": mixer, **fields}


def kinds(config: ModelConfig) -> str:
    """One letter a layer: f full, w window, l linear, m full and window."""
    found = ["".join(sorted({p.mixer[0] for p in layer.mixers})) for layer in config.layers]
    return "".join("m" if kind == "fw" else kind for kind in found)


def write(folder: Path, content: str | bytes | dict[str, Any]) -> str:
    path = folder / "mine.yaml"
    if isinstance(content, dict):
        content = yaml.safe_dump(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def one_line(error: RecipeError, *words: str) -> None:
    message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    for word in words:
        assert word in message
    assert error.hint is None or len(error.hint.splitlines()) == 1


def refused(path: str, *words: str, overrides: tuple[str, ...] = ()) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    one_line(caught.value, *words)
    return caught.value


def does_not_fit(recipe: Recipe, *words: str, source: ModelConfig = SOURCE) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        apply_recipe(recipe, source)
    one_line(caught.value, *words)
    return caught.value


# ---- the built-in ones -----------------------------------------------------------------------


def test_the_simple_recipes_are_built_in() -> None:
    assert {"even", "identity", "window"} <= set(builtin_recipes())
    assert builtin_recipes() == sorted(builtin_recipes())


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_built_in_recipe_says_what_it_does_and_fits_its_model(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe.about) > 20
    source = SOURCE
    if recipe.source is not None:
        layers, groups = recipe.source.num_hidden_layers, recipe.source.num_key_value_heads
        source = model_config(
            ((full(*range(groups)),),) * layers,
            family=recipe.source.family,
            num_key_value_heads=groups,
            num_attention_heads=3 * groups,
            hidden_size=recipe.source.hidden_size,
        )
    apply_recipe(recipe, source)


def test_identity_changes_nothing() -> None:
    mixed = model_config()
    assert apply_recipe(load_recipe("identity"), mixed) == mixed


def test_window_makes_every_group_of_every_layer_constant() -> None:
    config = apply_recipe(load_recipe("window"), SOURCE)
    everywhere = WindowMixer(
        groups=(0, 1, 2), window_tokens=256, sink_tokens=4, sink_reach_tokens=CONTEXT
    )
    assert config.layers == (LayerConfig(mixers=(everywhere,)),) * DEPTH
    assert config.softmax_groups() == ()


def test_even_keeps_eight_of_thirty_layers_in_the_middles_of_eight_stretches() -> None:
    config = apply_recipe(load_recipe("even"), model_config(((full(0, 1, 2),),) * 30))
    kept = [i for i, kind in enumerate(kinds(config)) if kind == "f"]
    assert kept == [1, 5, 9, 13, 16, 20, 24, 28]


# ---- blocks ----------------------------------------------------------------------------------


def test_kept_groups_may_see_blocks() -> None:
    changes = ("softmax=blocks", "softmax_groups={1: [2], 3: [0, 1, 2]}", "window_tokens=20")
    changes += ("blocks={block_tokens: 8, summary_tokens: 4, top_blocks: 3, cache: int8}",)
    config = apply_recipe(load_recipe("window", changes), SOURCE)
    part = BlockMixer(
        groups=(2,), window_tokens=20, sink_tokens=4, sink_reach_tokens=CONTEXT, block_tokens=8,
        summary_tokens=4, top_blocks=3, reach_tokens=CONTEXT, cache="int8",
    )  # fmt: skip
    assert config.layers[1].mixers[0] == part
    assert config.layers[1].mixers[1].groups == (0, 1)
    assert config.layers[3].mixers == (part.model_copy(update={"groups": (0, 1, 2)}),)
    assert config.softmax_groups() == ((1, 2), (3, 0), (3, 1), (3, 2))


@pytest.mark.parametrize(("reach", "tokens"), [("unbounded", None), (77, 77), ("trained", CONTEXT)])
def test_a_rule_of_blocks_takes_whole_layers(reach: str | int, tokens: int | None) -> None:
    changes = ("layers.0.mixer=blocks", f"blocks.reach_tokens={reach}")
    config = apply_recipe(load_recipe("window", changes), SOURCE)
    (part,) = config.layers[0].mixers
    assert part.mixer == "blocks"
    assert part.groups == (0, 1, 2)
    assert part.reach_tokens == tokens


def test_blocks_may_be_seen_where_they_are_inside_the_trained_length() -> None:
    changes = ("layers.0.mixer=blocks", "blocks.reach_tokens=7")
    (held,) = apply_recipe(load_recipe("window", changes), SOURCE).layers[0].mixers
    assert "true_tokens" not in held.model_dump_json()
    for said, tokens in (("trained", CONTEXT), (33, 33)):
        recipe = load_recipe("window", (*changes, f"blocks.true_tokens={said}"))
        (part,) = apply_recipe(recipe, SOURCE).layers[0].mixers
        assert part == held.model_copy(update={"true_tokens": tokens})
    with pytest.raises(RecipeError, match="true_tokens mean nothing beside reach_tokens unbounded"):
        load_recipe("window", ("blocks.true_tokens=9", "blocks.reach_tokens=unbounded"))


def test_full_rules_stay_full_where_kept_groups_see_blocks() -> None:
    config = apply_recipe(load_recipe("even", ("softmax=blocks",)), SOURCE)
    assert "blocks" not in {part.mixer for _, part in config.mixers()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("blocks.summary_tokens=5", "not a multiple of summary_tokens 5"),
        ("blocks.cache=int4", "'int4' is not one of model, int8"),
        ("blocks.block=3", "expected one of block_tokens, summary_tokens"),
        ("blocks.reach_tokens=trainde", "blocks.reach_tokens"),
    ],
)
def test_options_of_blocks_that_make_no_sense_are_refused(change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe("window", (change,))


# ---- rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "where"),
    [
        ("all", "wwwwwww"),
        ("even", "wfwfwfw"),
        ("odd", "fwfwfwf"),
        ([0, -1], "wfffffw"),
        ([-7, 3], "wffwfff"),
        ([], "fffffff"),
        ({"evenly": 1}, "fffwfff"),
        ({"evenly": 2}, "fwfffwf"),
        ({"evenly": 7}, "wwwwwww"),
        ({"evenly": 8}, "wwwwwww"),
        ({"evenly": 10**12}, "wwwwwww"),
    ],
    ids=str,
)
def test_a_rule_applies_where_it_says(at: Any, where: str) -> None:
    assert kinds(apply_recipe(recipe(rule(at), rule("rest", "full")), SOURCE)) == where


@given(count=st.integers(1, 40), depth=st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_evenly_picks_as_many_layers_as_it_says(count: int, depth: int) -> None:
    source = model_config(((full(0, 1, 2),),) * depth)
    found = kinds(apply_recipe(recipe(rule({"evenly": count}), rule("rest", "full")), source))
    assert found.count("w") == min(count, depth)


def test_the_first_rule_that_matches_decides() -> None:
    rules = rule([2], window_tokens=5), rule("even", "full"), rule([2, 3], window_tokens=9)
    config = apply_recipe(recipe(*rules, rule("rest", window_tokens=11)), SOURCE)
    assert kinds(config) == "fwwwfwf"
    windows = [p.window_tokens for _, p in config.mixers() if p.mixer == "window"]
    assert windows == [11, 5, 9, 11]


def test_a_rule_without_figures_takes_the_recipes() -> None:
    rules = rule([0]), rule([1], window_tokens=5), rule("rest", sink_tokens=0)
    config = apply_recipe(
        recipe(*rules, window_tokens=33, sink_tokens=6, sink_reach_tokens=99), SOURCE
    )
    found = [(p.window_tokens, p.sink_tokens, p.sink_reach_tokens) for _, p in config.mixers()]  # type: ignore[union-attr]
    assert found == [(33, 6, 99), (5, 6, 99), *[(33, 0, 99)] * (DEPTH - 2)]


def test_more_sinks_than_window_is_fine() -> None:
    config = apply_recipe(recipe(rule("all"), window_tokens=1, sink_tokens=64), SOURCE)
    assert all(p.sink_tokens == 64 for _, p in config.mixers() if p.mixer == "window")


def test_keep_leaves_what_the_source_has() -> None:
    mixed = model_config()
    config = apply_recipe(recipe(rule([0, 3]), rule("rest", "keep")), mixed)
    assert config.layers[1:3] == mixed.layers[1:3]
    assert kinds(config) == "wmww"


def test_softmax_groups_stay_full_in_a_window_layer() -> None:
    config = apply_recipe(recipe(rule("all"), softmax_groups={2: [2, 0], 5: [0, 1, 2]}), SOURCE)
    mixers: tuple[Mixer, ...] = config.layers[2].mixers
    assert mixers[0] == FullMixer(groups=(0, 2))
    assert mixers[1].groups == (1,)
    assert kinds(config) == "wwmwwfw"
    assert config.softmax_groups() == ((2, 0), (2, 2), (5, 0), (5, 1), (5, 2))


def test_only_layers_and_tying_change() -> None:
    config = apply_recipe(load_recipe("window"), SOURCE)
    assert config.model_copy(update={"layers": SOURCE.layers}) == SOURCE


@pytest.mark.parametrize("retie", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_retie_ties_and_nothing_unties(tied: bool, retie: bool) -> None:
    source = model_config(((full(0, 1, 2),),) * DEPTH, tie_word_embeddings=tied)
    config = apply_recipe(recipe(rule("all", "keep"), retie=retie), source)
    assert config.tie_word_embeddings == (tied or retie)


def test_the_result_is_a_valid_config() -> None:
    for name in ("even", "identity", "window"):
        config = apply_recipe(load_recipe(name), SOURCE)
        assert ModelConfig.model_validate(config.model_dump()) == config


# ---- memories --------------------------------------------------------------------------------

OF_DEFAULTS = {
    "far": FarMemory(features=64),
    "gla": GlaMemory(feature="relu", gate_rank=16, gate_normalizer=16.0),
    "tied": TiedMemory(),
    "delta": DeltaMemory(negative_eigenvalues=False),
    "none": None,
}


def memories(config: ModelConfig) -> list[AnyMemory | None]:
    return [None if part.mixer == "full" else part.memory for _, part in config.mixers()]


@pytest.mark.parametrize("name", OF_DEFAULTS)
def test_an_override_gives_every_window_a_memory(name: str) -> None:
    config = apply_recipe(load_recipe("window", (f"memory={name}",)), SOURCE)
    assert memories(config) == [OF_DEFAULTS[name]] * DEPTH
    assert kinds(config) == "w" * DEPTH
    assert ModelConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("name", ["gla", "tied", "delta"])
def test_a_linear_rule_is_that_memory_alone(name: str) -> None:
    rules = rule("even", "linear", memory=name), rule("rest", "linear")
    config = apply_recipe(recipe(*rules, memory="tied"), SOURCE)
    assert kinds(config) == "l" * DEPTH
    wanted = [OF_DEFAULTS[name] if i % 2 == 0 else TiedMemory() for i in range(DEPTH)]
    assert memories(config) == wanted
    assert ModelConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_rules_memory_goes_before_the_recipes() -> None:
    rules = rule([0], memory="none"), rule([1], memory="tied"), rule([2], "full"), rule("rest")
    config = apply_recipe(recipe(*rules, memory="far", far={"features": 9}), SOURCE)
    assert memories(config) == [None, TiedMemory(), None, *[FarMemory(features=9)] * (DEPTH - 3)]


def test_options_reach_their_memories() -> None:
    config = apply_recipe(
        recipe(
            rule([0], "linear", memory="gla"),
            rule("rest", memory="delta"),
            gla={"feature": "identity", "gate_rank": 3, "gate_normalizer": 2.5},
            delta={"negative_eigenvalues": True},
        ),
        SOURCE,
    )
    gla = GlaMemory(feature="identity", gate_rank=3, gate_normalizer=2.5)
    assert memories(config)[:2] == [gla, DeltaMemory(negative_eigenvalues=True)]


@pytest.mark.parametrize("mixer", ["window", "linear"])
def test_softmax_groups_stay_full_beside_a_memory(mixer: str) -> None:
    made = recipe(rule("all", mixer, memory="gla"), softmax_groups={2: [1], 5: [0, 1, 2]})
    config = apply_recipe(made, SOURCE)
    assert config.softmax_groups() == ((2, 1), (5, 0), (5, 1), (5, 2))
    assert config.layers[2].mixers[1].groups == (0, 2)


def test_constant_and_spikingbrain_are_what_their_text_says() -> None:
    config = apply_recipe(load_recipe("constant"), SOURCE)
    assert kinds(config) == "w" * DEPTH
    assert {m.kind for m in memories(config) if m} == {"far"}
    assert None not in memories(config)
    config = apply_recipe(load_recipe("spikingbrain-7b"), SOURCE)
    assert kinds(config) == "lwlwlwl"
    assert memories(config)[:2] == [OF_DEFAULTS["gla"], None]
    windows = [part for _, part in config.mixers() if part.mixer == "window"]
    assert {(w.window_tokens, w.sink_tokens) for w in windows} == {(4096, 0)}


@pytest.mark.parametrize("name", ["none", "far"])
def test_a_linear_rule_without_a_memory_that_can_stand_alone_is_refused(name: str) -> None:
    words = "layer 0 is linear", repr(name), "gla, tied, delta"
    error = does_not_fit(recipe(rule("all", "linear"), memory=name), *words)
    assert "window" in str(error.hint)
    does_not_fit(recipe(rule("all", "linear", memory=name), memory="gla"), *words)


@pytest.mark.parametrize(
    ("override", "words", "hint"),
    [
        ("memory=gl", "memory: 'gl' is not one of none, far, gla", "did you mean `gla`?"),
        ("layers.0.memory=taid", "layers.0.memory: 'taid'", "did you mean `tied`?"),
        ("memory=7", "memory: '7' is not one of", None),
        ("layers.0.mixer=lineal", "layers.0.mixer: 'lineal'", "did you mean `linear`?"),
        ("gla.feature=rel", "gla.feature: 'rel' is not one of relu, identity", "`relu`"),
        ("gla.featur=relu", "gla.featur: unknown key", "did you mean `feature`?"),
        ("far.featurs=3", "far.featurs: unknown key", "did you mean `features`?"),
        ("delta.negative=true", "delta.negative: unknown key", None),
        ("far.features=0", "far.features", None),
        ("far.features=1000000", "far.features", None),
        ("far.half_life_tokens=0", "far.half_life_tokens", None),
        ("gla.half_life_tokens=.nan", "gla.half_life_tokens", None),
        ("gla.half_life_tokens=1e-300", "gla.half_life_tokens", None),
        ("delta.half_life_tokens=.inf", "delta.half_life_tokens", None),
        ("gla.gate_normalizer=0.0", "gla.gate_normalizer", None),
        ("gla.gate_normalizer=1.0e-320", "gla.gate_normalizer", None),
        ("gla.gate_rank=0", "gla.gate_rank", None),
        ("gla=relu", "gla: ", None),
        ("far.calibration_tokens=-1", "far.calibration_tokens", None),
    ],
)
def test_a_wrong_memory_option_is_refused(override: str, words: str, hint: str | None) -> None:
    error = refused("window", words, overrides=(override,))
    assert (hint or "") in str(error.hint)


# ---- recipes that do not fit -----------------------------------------------------------------


@pytest.mark.parametrize("index", [DEPTH, -DEPTH - 1, 10**9])
def test_a_layer_that_is_not_there_is_refused(index: int) -> None:
    rules = rule([0, index]), rule("rest", "full")
    does_not_fit(recipe(*rules), "layers.0.at", str(index), f"layers 0 to {DEPTH - 1}")


@pytest.mark.parametrize("index", [DEPTH, -1])
def test_softmax_groups_of_a_layer_that_is_not_there_are_refused(index: int) -> None:
    does_not_fit(recipe(rule("all"), softmax_groups={index: [0]}), "softmax_groups", str(index))


@pytest.mark.parametrize("mixer", ["window", "full", "keep"])
@pytest.mark.parametrize("group", [GROUPS, -1])
def test_a_softmax_group_that_is_not_there_is_refused(group: int, mixer: str) -> None:
    wrong = recipe(rule("all", mixer), softmax_groups={4: [0, group]})
    does_not_fit(wrong, "softmax_groups.4", f"group {group}", "groups 0 to 2")


def test_softmax_groups_of_a_layer_that_is_kept_are_refused() -> None:
    wrong = recipe(rule([4], "keep"), rule("rest"), softmax_groups={4: [0]})
    does_not_fit(wrong, "softmax_groups names layer 4", "keeps what the source has")
    apply_recipe(recipe(rule([4], "keep"), rule("rest"), softmax_groups={3: [0]}), SOURCE)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_sinks_that_begin_as_a_token_that_is_not_there_are_refused(token: int) -> None:
    wrong = recipe(rule("all"), learned_sinks={"count": 2, "start": "bos"})
    source = SOURCE.model_copy(update={"bos_token_id": token})
    with pytest.raises(RecipeError, match=f"which is token {token} of"):
        apply_recipe(wrong, source)


def test_a_layer_without_a_rule_is_refused_with_a_hint() -> None:
    error = does_not_fit(recipe(rule("even")), "no rule matches layer 1")
    assert "rest" in str(error.hint)


def test_a_recipe_for_another_shape_is_refused_with_a_hint() -> None:
    shape = {
        "family": "llama",
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "hidden_size": 48,
    }
    wrong = recipe(rule("all"), source=shape, measured_on="Some-135M")
    error = does_not_fit(wrong, "Some-135M", "num_hidden_layers 30", f"num_hidden_layers {DEPTH}")
    assert "respike select" in str(error.hint)
    right = recipe(rule("all"), source=shape | {"num_hidden_layers": DEPTH})
    assert kinds(apply_recipe(right, SOURCE)) == "w" * DEPTH


@pytest.mark.parametrize(
    "fields",
    [
        {"window_tokens": 10**9},
        {"sink_tokens": 10**9},
        {"sink_reach_tokens": 0},
        {"sink_reach_tokens": -5},
        {"layers": [rule("all", window_tokens=10**9)]},
        {"layers": [rule("all", sink_tokens=10**9)]},
    ],
    ids=str,
)
def test_figures_no_model_can_have_are_refused_as_a_recipe_error(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path, MINIMAL | {"layers": [rule("all")]} | fields)
    with pytest.raises(RecipeError) as caught:
        apply_recipe(load_recipe(path), SOURCE)
    one_line(caught.value, "_tokens")


# ---- files that are no recipes ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": 2}, ["recipe", "1"]),
        ({"name": ""}, ["name"]),
        ({"name": 7}, ["name", "7"]),
        ({"layers": "all"}, ["layers", "all"]),
        ({"layers": [3]}, ["layers.0", "3"]),
        ({"layers": [{"mixer": "full"}]}, ["layers.0.at", "missing"]),
        ({"layers": [{"at": "all"}]}, ["layers.0.mixer", "missing"]),
        ({"layers": [rule("all", window_tokens=-1)]}, ["layers.0.window_tokens", "-1"]),
        ({"layers": [rule("all", window_tokens=0)]}, ["layers.0.window_tokens", "0"]),
        ({"layers": [rule("all", sink_tokens=-1)]}, ["layers.0.sink_tokens", "-1"]),
        ({"layers": [rule({"evenly": 0})]}, ["layers.0.at", "0"]),
        ({"layers": [rule({"evenly": -3})]}, ["layers.0.at.evenly", "-3"]),
        ({"layers": [rule({"layers": [4], "of": 4})]}, ["layers.0.at", "less than of"]),
        ({"layers": [rule({"layers": [4]})]}, ["layers.0.at.of: missing"]),
        ({"layers": [rule([0, "x"])]}, ["layers.0.at", "x"]),
        ({"layers": [rule(True)]}, ["layers.0.at", "True"]),
        ({"layers": [rule(None)]}, ["layers.0.at", "None"]),
        ({"window_tokens": 0}, ["window_tokens", "0"]),
        ({"window_tokens": -256}, ["window_tokens", "-256"]),
        ({"window_tokens": "many"}, ["window_tokens", "many"]),
        ({"window_tokens": 2.5}, ["window_tokens", "2.5"]),
        ({"sink_tokens": -4}, ["sink_tokens", "-4"]),
        ({"sink_reach_tokens": "far"}, ["sink_reach_tokens", "far"]),
        ({"softmax_groups": {"x": [0]}}, ["softmax_groups", "x"]),
        ({"softmax_groups": {1: ["x"]}}, ["softmax_groups.1", "x"]),
        ({"softmax_groups": [1]}, ["softmax_groups"]),
        ({"source": {"family": "llama"}}, ["source.num_hidden_layers", "missing"]),
        ({"weights": "f64"}, ["weights", "f64"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_value_is_refused_by_its_place(
    change: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path, MINIMAL | change)
    refused(path, path, *words)


@pytest.mark.parametrize("key", MINIMAL)
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    refused(write(tmp_path, {k: v for k, v in MINIMAL.items() if k != key}), f"{key}: missing")


@pytest.mark.parametrize(
    ("change", "words", "hint"),
    [
        ({"layers": [rule("all", "windo")]}, "layers.0.mixer: 'windo'", "did you mean `window`?"),
        ({"layers": [rule("al")]}, "layers.0.at: 'al'", "did you mean `all`?"),
        ({"layers": [rule("evn")]}, "layers.0.at: 'evn'", "did you mean `even`?"),
        ({"window_token": 9}, "window_token: unknown key", "did you mean `window_tokens`?"),
        ({"layer": []}, "layer: unknown key", "did you mean `layers`?"),
        (
            {"layers": [rule("all", sink_token=2)]},
            "layers.0.sink_token: unknown key",
            "did you mean `sink_tokens`?",
        ),
        ({"layers": [rule({"evnly": 3})]}, "evnly: unknown key", "did you mean `evenly`?"),
        ({"layers": [rule({"layer": [1], "of": 2})]}, "layer: unknown", "did you mean `layers`?"),
        (
            {"source": {"famly": "llama"}},
            "source.famly: unknown key",
            "did you mean `family`?",
        ),
        ({"nonsense": 1}, "nonsense: unknown key; expected one of recipe, name", None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_misspelt_word_is_refused_with_the_right_one(
    change: dict[str, Any], words: str, hint: str | None, tmp_path: Path
) -> None:
    assert refused(write(tmp_path, MINIMAL | change), words).hint == hint


def test_a_misspelt_recipe_name_is_refused_with_the_right_one() -> None:
    assert refused("windw", "'windw'", "identity").hint == "did you mean `window`?"
    assert "respike recipes" in str(refused("zzzzz").hint)
    with pytest.raises(RecipeError):
        recipe_text("../recipes/window")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "expected a mapping, got a NoneType"),
        ("# only a comment\n", "expected a mapping"),
        ("- 1\n- 2\n", "expected a mapping, got a list"),
        ("just words", "expected a mapping, got a str"),
        ("recipe: [1\nname: x", "not valid YAML"),
        ("a:\n\tb: 1", "not valid YAML"),
        ("recipe: 1\n  name: x", "not valid YAML"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['touch pwned']", "not valid YAML"),
        ("a: !unknown 1", "not valid YAML"),
        ("about: 2024-13-45", "not valid YAML"),
        ("recipe: " + "1" * 5000, "not valid YAML"),
        ("a: \0", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        (b"\xff\xfe\x00name: 1", "cannot be read"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_is_not_a_mapping_in_yaml_is_refused(
    content: str | bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, content)
    refused(path, path, words)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def test_keys_that_are_not_words_are_refused(tmp_path: Path) -> None:
    refused(write(tmp_path, MINIMAL | {7: 8}), "7")  # type: ignore[dict-item]


def test_a_small_file_cannot_become_a_large_message(tmp_path: Path) -> None:
    """Each line repeats the one before nine times: 9 ** 12 values, if anything spelt them out."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    text = "\n".join(lines)
    refused(write(tmp_path, text + "\nrecipe: 1\nname: x\nlayers: []"), "unknown key")
    for place in (
        "name: *a11",
        "layers: [{at: *a11, mixer: full}]",
        "layers: [{at: all, mixer: *a11}]",
    ):
        refused(write(tmp_path, f"{text}\n{place}"))


@pytest.mark.parametrize("place", ["name", "weights", "window_tokens", "x" * 5000])
def test_a_long_value_does_not_make_a_long_message(place: str, tmp_path: Path) -> None:
    refused(write(tmp_path, MINIMAL | {place: "y" * 5000}))
    refused(write(tmp_path, MINIMAL | {"layers": [rule("y" * 5000)]}))
    refused(write(tmp_path, MINIMAL | {"layers": [rule("all", "y" * 5000)]}))


def test_a_large_file_is_refused(tmp_path: Path) -> None:
    refused(write(tmp_path, "# " + "x" * (2 << 20)), "larger than 1048576 bytes")


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert "respike recipes" in str(refused(str(missing), str(missing)).hint)
    (tmp_path / "folder.yaml").mkdir()
    refused(str(tmp_path / "folder.yaml"), "folder.yaml")
    refused(str(tmp_path))


def test_a_file_without_the_suffix_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    assert load_recipe(str(path)).name == "mine"


# ---- overrides -------------------------------------------------------------------------------


def test_overrides_change_values_anywhere() -> None:
    changes = (
        "window_tokens=128",
        "layers.0.at.evenly=12",
        "layers.-1.window_tokens=64",
        "softmax_groups.3=[0, 2]",
        "about=a = b",
        "retie=true",
    )
    recipe = load_recipe("even", changes)
    assert recipe.window_tokens == 128
    assert recipe.layers[0].model_dump()["at"] == {"evenly": 12}
    assert recipe.layers[-1].window_tokens == 64
    assert recipe.softmax_groups == {3: (0, 2)}
    assert recipe.about == "a = b"
    assert recipe.retie is True
    assert load_recipe("even").window_tokens == 256


def test_the_last_override_of_a_key_counts() -> None:
    assert load_recipe("even", ("window_tokens=1", "window_tokens=2")).window_tokens == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("window_tokens", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("", "expected KEY=VALUE"),
        ("window_tokens=", "window_tokens"),
        ("window_tokens=-1", "window_tokens"),
        ("window_tokens=[1", "--set 'window_tokens=[1'"),
        ("about=2024-13-45", "--set 'about=2024-13-45'"),
        ("about=!!python/object:os.system {}", "--set"),
        ("window_token=3", "window_token: unknown key"),
        ("layers.9.mixer=full", "--set 'layers.9.mixer=full'"),
        ("layers.first.mixer=full", "--set 'layers.first.mixer=full'"),
        ("layers.²=3", "--set 'layers.²=3'"),
        ("layers.--1=3", "--set 'layers.--1=3'"),
        ("name.first=x", "--set 'name.first=x'"),
        ("window_tokens.x=1", "--set 'window_tokens.x=1'"),
        ("a.b.c=1", "a: unknown key"),
        (".=1", "unknown key"),
    ],
)
def test_a_wrong_override_is_refused(override: str, words: str) -> None:
    refused("even", words, overrides=(override,))


# ---- writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_built_in_recipe_survives_being_written(name: str, tmp_path: Path) -> None:
    survives(load_recipe(name), tmp_path)


def survives(recipe: Recipe, folder: Path) -> None:
    text = dump_recipe(recipe, {"respike": "0.1.0"})
    again = load_recipe(write(folder, text))
    assert again == recipe
    assert dump_recipe(again, {"respike": "0.1.0"}) == text
    assert text.startswith("# respike: 0.1.0\n")


places = (
    st.sampled_from(["all", "rest", "even", "odd"])
    | st.builds(lambda n: {"evenly": n}, st.integers(1, 99))
    | st.lists(st.integers(-9, 9), max_size=4)
)
windows = {"window_tokens": st.integers(1, 999), "sink_tokens": st.integers(0, 99)}
rule_memories = {"memory": st.sampled_from(sorted(OF_DEFAULTS))}
rules = (
    st.fixed_dictionaries({"at": places, "mixer": st.sampled_from(["keep", "full"])})
    | st.fixed_dictionaries({"at": places, "mixer": st.just("linear")}, optional=rule_memories)
    | st.fixed_dictionaries(
        {"at": places, "mixer": st.just("window")}, optional=windows | rule_memories
    )
)


@pytest.mark.parametrize(
    ("mixer", "words"),
    [("keep", "memory means nothing to mixer keep"), ("full", "nothing is far from full softmax")],
)
def test_a_memory_where_there_can_be_none_is_refused(mixer: str, words: str) -> None:
    refused("identity", words,
            overrides=(f"layers=[{{at: all, mixer: {mixer}, memory: far}}]",))  # fmt: skip


@pytest.mark.parametrize("mixer", ["keep", "full", "linear"])
@pytest.mark.parametrize("name", ["window_tokens", "sink_tokens"])
def test_a_window_where_there_is_none_is_refused(mixer: str, name: str) -> None:
    refused("identity", f"{name} means nothing to mixer {mixer}",
            overrides=(f"layers=[{{at: all, mixer: {mixer}, {name}: 7}}]",))  # fmt: skip


@given(
    layers=st.lists(rules, max_size=4),
    about=st.text(),
    name=st.text(min_size=1, max_size=100),
    groups=st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 9)), max_size=3),
    reach=st.just("trained") | st.integers(1, 9999),
)
@settings(max_examples=60, deadline=None)
def test_any_recipe_survives_being_written(
    tmp_path_factory: pytest.TempPathFactory,
    layers: list[dict[str, Any]],
    about: str,
    name: str,
    groups: dict[int, list[int]],
    reach: int | str,
) -> None:
    written = recipe(
        *layers, about=about, name=name, softmax_groups=groups, sink_reach_tokens=reach
    )
    survives(written, tmp_path_factory.mktemp("recipe"))


def test_a_written_recipe_spells_out_every_default() -> None:
    text = dump_recipe(Recipe.model_validate(MINIMAL))
    absent = {"source", "moe"}  # None: any model, no experts
    assert set(yaml.safe_load(text)) == set(Recipe.model_fields) - absent


def test_notes_cannot_become_part_of_the_recipe(tmp_path: Path) -> None:
    written = Recipe.model_validate(MINIMAL)
    text = dump_recipe(written, {"source": "a folder\nmore: true", "b\nstill_more": "true"})
    assert load_recipe(write(tmp_path, text)) == written


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe("even").window_tokens = 3  # type: ignore[misc]
