"""Conversion: what is written, that it is the same every time, and that nothing else is touched."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from respike.checkpoint import fingerprint, open_checkpoint
from respike.conversion import convert, execute, plan, shards
from respike.errors import CheckpointError, RecipeError, RespikeError, UnsupportedError, UsageError
from respike.loading import Model, load
from respike.recipe import Recipe, load_recipe
from tiny import random_tokens, save_tiny, write_gguf

SHUT = "far.calibration_tokens=0"
MIXED = ("softmax_groups={1: [2], 3: [0, 1]}", "window_tokens=11", "sink_tokens=2")
FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    "recipe.yaml",
    "report.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 llama with its own output matrix."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def gguf(source: Path) -> Path:
    return write_gguf(source.parent / "tiny.gguf", source)


def identity(*overrides: str) -> Recipe:
    return load_recipe("identity", overrides)


def mixed(*overrides: str) -> Recipe:
    return load_recipe("window", (*MIXED, *overrides))


def logits(model: Model) -> torch.Tensor:
    with torch.inference_mode():
        return model.decoder(random_tokens(2, 37))[0]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def changed_copy(source: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The source with its tensors (in place, as a dict) changed."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tied_copy(source: Path, folder: Path) -> Path:
    """The source with an output matrix that is a copy of the embedding."""

    def tie(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    return changed_copy(source, folder, tie)


# ---- the identity ----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["f32", "bf16", "f16"])
def test_identity_gives_the_same_logits_bit_for_bit(
    source: Path, tmp_path: Path, weights: str
) -> None:
    convert(plan(source, identity(f"weights={weights}")), tmp_path / "out")
    before, after = load(source, dtype=weights), load(tmp_path / "out")
    assert after.decoder.embedding.dtype == before.decoder.embedding.dtype
    assert torch.equal(logits(after), logits(before))


def test_identity_of_a_bf16_folder_copies_every_bit(source: Path, tmp_path: Path) -> None:
    def to_bf16(tensors: dict[str, Any]) -> None:
        tensors.update({name: t.bfloat16() for name, t in tensors.items()})

    made = plan(changed_copy(source, tmp_path / "bf16", to_bf16), identity("weights=bf16"))
    assert {t.action for t in made.tensors} == {"copy"}
    convert(made, tmp_path / "out")
    before = load_file(tmp_path / "bf16" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name].view(torch.int16), tensor.view(torch.int16)), name


def test_identity_of_a_gguf_file_gives_the_logits_of_the_file(gguf: Path, tmp_path: Path) -> None:
    convert(plan(gguf, identity("weights=bf16")), tmp_path / "out")
    before, after = load(gguf), load(tmp_path / "out")
    assert before.decoder.embedding.dtype == torch.bfloat16
    assert torch.equal(logits(after), logits(before))
    text = "the rain and <|im_end|> the sea: über ☃"
    assert after.tokenizer.encode(text) == before.tokenizer.encode(text)
    assert after.tokenizer.eos_token_ids == before.tokenizer.eos_token_ids


def test_a_folder_and_its_gguf_file_convert_to_the_same_weights(
    source: Path, gguf: Path, tmp_path: Path
) -> None:
    convert(plan(source, mixed()), tmp_path / "a")
    convert(plan(gguf, mixed()), tmp_path / "b")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_window_as_long_as_the_text_changes_nothing_and_a_short_one_does(
    source: Path, tmp_path: Path
) -> None:
    before = logits(load(source))
    for tokens, same in ((64, True), (5, False)):
        out = tmp_path / f"window-{tokens}"
        recipe = load_recipe("window", (f"window_tokens={tokens}", "weights=f32"))
        convert(plan(source, recipe), out)
        assert torch.allclose(logits(load(out)), before, rtol=1e-4, atol=1e-4) is same


def test_the_mixers_of_the_recipe_are_those_of_the_loaded_model(
    source: Path, tmp_path: Path
) -> None:
    convert(plan(source, mixed()), tmp_path / "out")
    config = load(tmp_path / "out").config
    assert config.softmax_groups() == ((1, 2), (3, 0), (3, 1))
    windows = [part for _, part in config.mixers() if part.mixer == "window"]
    assert {(w.window_tokens, w.sink_tokens) for w in windows} == {(11, 2)}


# ---- memories --------------------------------------------------------------------------------


def with_memory(name: str, *overrides: str) -> Recipe:
    return mixed(f"memory={name}", "weights=f32", *overrides)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["far", "gla", "tied", "delta"])
def test_what_a_memory_adds_is_planned_as_new_and_nothing_else(source: Path, name: str) -> None:
    made = plan(source, with_memory(name))
    assert {t.action for t in made.tensors if t.name not in made.new} == {"copy"}
    assert set(made.new) | set(open_checkpoint(source).stored_as) == {t.name for t in made.tensors}
    assert all(".self_attn.mixers." in new for new in made.new)
    added = sum(math.prod(shape) for shape in made.new.values())
    assert added == made.summary()["new_parameters"] > 0
    # Layers 0 and 2 are windows of all groups; 1 and 3 have a softmax group first.
    assert {tuple(n.split(".")[2:6:3]) for n in made.new} == {
        ("0", "0"), ("1", "1"), ("2", "0"), ("3", "1"),
    }  # fmt: skip


@pytest.mark.parametrize("weights", ["f32", "bf16"])
def test_a_shut_far_memory_is_the_window_bit_for_bit(
    source: Path, tmp_path: Path, weights: str
) -> None:
    for name in ("far", "none"):
        recipe = mixed(f"memory={name}", f"weights={weights}")
        convert(plan(source, recipe), tmp_path / name)
    assert torch.equal(logits(load(tmp_path / "far")), logits(load(tmp_path / "none")))


@pytest.mark.parametrize("name", ["far", "gla", "tied", "delta"])
def test_a_mixer_that_stays_keeps_its_tensors_and_one_that_changes_does_not(
    source: Path, tmp_path: Path, name: str
) -> None:
    convert(plan(source, with_memory(name)), tmp_path / "first")
    trained = changed_copy(
        tmp_path / "first", tmp_path / "trained",
        lambda t: t.update({n: x + 0.25 for n, x in t.items() if ".mixers." in n}),
    )  # fmt: skip
    before = tensors(trained)
    for recipe in (identity("weights=f32"), with_memory(name)):
        made = plan(trained, recipe)
        assert not made.new
        convert(made, tmp_path / "again", force=True)
        after = tensors(tmp_path / "again")
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n], before[n]) for n in before)
    # Layer 2 alone gets another window, and so begins anew.
    changed = with_memory(
        name, "layers=[{at: [2], mixer: window, window_tokens: 5}, {at: rest, mixer: window}]"
    )
    made = plan(trained, changed)
    convert(made, tmp_path / "other")
    after, fresh = tensors(tmp_path / "other"), tensors(tmp_path / "first")
    assert set(made.new) == {n for n in before if n.startswith("model.layers.2.self_attn.mixers.")}
    for n in before:
        assert torch.equal(after[n], (fresh if n in made.new else before)[n]), n


def test_a_mixer_that_goes_takes_its_tensors_with_it(source: Path, tmp_path: Path) -> None:
    convert(plan(source, with_memory("far")), tmp_path / "far")
    made = plan(tmp_path / "far", with_memory("gla"))
    gone = {t.name for t in made.tensors if t.action == "drop"}
    assert gone == {n for n in tensors(tmp_path / "far") if ".mixers." in n}
    assert {t.reason for t in made.tensors if t.action == "drop"} == {"its mixer is gone"}
    convert(made, tmp_path / "again")
    convert(plan(source, with_memory("gla")), tmp_path / "direct")
    again, direct = tensors(tmp_path / "again"), tensors(tmp_path / "direct")
    assert again.keys() == direct.keys()
    assert all(torch.equal(again[n], direct[n]) for n in again)


@pytest.mark.parametrize("tokens", [0.5, 7.0, 4096.0, 1e6])
def test_the_first_decays_have_the_half_life_asked_for(
    source: Path, tmp_path: Path, tokens: float
) -> None:
    half_lives = f"gla.half_life_tokens={tokens}", f"delta.half_life_tokens={tokens}"
    layers = (
        "layers=[{at: even, mixer: linear, memory: gla}, {at: odd, mixer: linear, memory: delta}]"
    )
    recipe = load_recipe("window", ("weights=f32", "gla.gate_normalizer=9.0", layers, *half_lives))
    convert(plan(source, recipe), tmp_path / "out")
    found = {}
    for name, x in tensors(tmp_path / "out").items():
        found.setdefault(name.split(".mixers.0.")[-1], x.double())
    x = torch.randn(5, found["memory.a_proj.weight"].shape[1], dtype=torch.float64)
    gate = x @ found["memory.gate_down.weight"].T @ found["memory.gate_up.weight"].T
    alpha = (gate + found["memory.gate_up.bias"]).sigmoid() ** (1 / 9)
    step = (x @ found["memory.a_proj.weight"].T + found["memory.dt_bias"]).exp().log1p()
    for decay in (alpha, (-found["memory.A_log"].exp() * step).exp()):
        half = math.log(0.5) / decay.log()
        assert torch.allclose(half, torch.full_like(half, tokens), rtol=1e-5), half
    assert (found["norm.weight"] == 1).all()
    assert found["memory.gate_down.weight"].std() > 0


def test_a_far_memory_begins_shut_and_lasts_as_long_as_its_recipe_says(
    source: Path, tmp_path: Path
) -> None:
    convert(plan(source, with_memory("far")), tmp_path / "out")
    for name, x in tensors(tmp_path / "out").items():
        if name.endswith(".beta"):
            assert (x == -math.inf).all()
        if name.endswith(".log2_half_life"):
            assert (2**x == 8192).all()
    found = tensors(tmp_path / "out")
    keys = {name: x for name, x in found.items() if name.endswith("key_weight")}
    every = torch.cat([x.flatten() for x in keys.values()])
    assert len(every.unique()) == len(every), "layers or groups share prototypes"
    for name, x in keys.items():
        queries = found[name.replace("key_weight", "query_weight")]
        assert torch.equal(queries, x.repeat_interleave(len(queries) // len(x), 0))


@pytest.mark.parametrize("name", ["far", "gla", "tied", "delta"])
def test_a_memory_begins_the_same_every_time(source: Path, tmp_path: Path, name: str) -> None:
    convert(plan(source, with_memory(name)), tmp_path / "first")
    torch.manual_seed(77)
    torch.randn(3)
    convert(plan(source, with_memory(name)), tmp_path / "second")
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "second")


@pytest.mark.parametrize("weights", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("recipe", ["constant", "spikingbrain-7b"])
def test_the_constant_recipes_give_models_that_run(
    source: Path, tmp_path: Path, recipe: str, weights: str
) -> None:
    made = plan(source, load_recipe(recipe, (f"weights={weights}", "window_tokens=9", SHUT)))
    report = convert(made, tmp_path / "out")
    assert report["growth_bytes_per_token_bf16"] == 0
    out = logits(load(tmp_path / "out"))
    assert out.isfinite().all()
    assert out.std() > 0.1


# ---- accounting ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["source", "gguf"])
def test_every_tensor_of_the_source_is_accounted_for(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(kind)
    made = plan(path, mixed())
    stored = open_checkpoint(path).stored_as
    assert sorted(t.name for t in made.tensors) == sorted(stored)
    assert all(bool(t.reason) is (t.action == "drop") for t in made.tensors)
    report = convert(made, tmp_path / "out")
    assert sum(report["tensors"].values()) == len(stored)


def test_what_comes_out_of_a_gguf_file_is_never_called_a_copy(gguf: Path) -> None:
    for weights in ("f32", "bf16"):
        assert {t.action for t in plan(gguf, identity(f"weights={weights}")).tensors} == {"cast"}


def test_the_actions_say_copied_at_equal_dtype_and_cast_otherwise(source: Path) -> None:
    for weights, action in (("f32", "copy"), ("bf16", "cast")):
        made = plan(source, identity(f"weights={weights}"))
        assert {t.action for t in made.tensors} == {action}


def test_what_follows_from_the_config_is_dropped_with_that_reason(
    source: Path, tmp_path: Path
) -> None:
    extra = "model.layers.2.self_attn.rotary_emb.inv_freq"

    def add(tensors: dict[str, Any]) -> None:
        tensors[extra] = torch.ones(4)

    made = plan(changed_copy(source, tmp_path / "old", add), identity())
    report = convert(made, tmp_path / "out")
    assert report["dropped"] == {extra: "follows from the config"}
    assert report["tensors"]["drop"] == 1
    assert extra not in load_file(tmp_path / "out" / "model.safetensors")


def test_retie_drops_the_output_matrix_with_the_reason_and_ties(
    source: Path, tmp_path: Path
) -> None:
    twice = tied_copy(source, tmp_path / "twice")
    report = convert(plan(twice, identity("retie=true", "weights=f32")), tmp_path / "out")
    assert list(report["dropped"]) == ["lm_head.weight"]
    assert "embedding" in report["dropped"]["lm_head.weight"]
    after = load(tmp_path / "out")
    assert after.config.tie_word_embeddings
    assert report["new_parameters"] == -after.decoder.embedding.numel()
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(logits(after), logits(load(twice)))


def test_without_retie_the_output_matrix_stays(source: Path, tmp_path: Path) -> None:
    report = convert(plan(source, identity()), tmp_path / "out")
    assert report["dropped"] == {}
    assert not load(tmp_path / "out").config.tie_word_embeddings


# ---- the same bytes --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["source", "gguf"])
def test_the_same_recipe_and_source_give_the_same_bytes(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(kind)
    convert(plan(path, mixed()), tmp_path / "first")
    convert(plan(path, mixed()), tmp_path / "second")
    convert(plan(path, load_recipe(str(tmp_path / "first" / "recipe.yaml"))), tmp_path / "third")
    first = bytes_of(tmp_path / "first")
    assert set(first) == FILES
    assert bytes_of(tmp_path / "second") == first
    assert bytes_of(tmp_path / "third") == first


def test_another_recipe_gives_another_fingerprint_from_the_same_weights(
    source: Path, tmp_path: Path
) -> None:
    a = convert(plan(source, identity()), tmp_path / "a")
    b = convert(plan(source, mixed()), tmp_path / "b")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert a["fingerprint"] != b["fingerprint"]


def test_the_resolved_recipe_reads_back_equal(source: Path, tmp_path: Path) -> None:
    recipe = mixed("weights=f16", "sink_reach_tokens=99")
    convert(plan(source, recipe), tmp_path / "out")
    assert load_recipe(str(tmp_path / "out" / "recipe.yaml")) == recipe


# ---- what is in the folder -------------------------------------------------------------------


def test_the_report_is_the_file_and_its_fingerprint_is_the_models(
    source: Path, tmp_path: Path
) -> None:
    report = convert(plan(source, mixed()), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(
        json.dumps(report)
    )
    assert report["fingerprint"] == load(tmp_path / "out").fingerprint
    assert report["softmax_groups"] == 3
    assert report["kv_groups"] == 12
    assert report["weight_bytes"] == 2 * report["parameters"]


def test_small_shards_load_like_one_file(source: Path, tmp_path: Path) -> None:
    made = plan(source, mixed())
    one = convert(made, tmp_path / "one")
    report = convert(made, tmp_path / "many", shard_bytes=30_000)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert [s.name for s in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    sizes = [sum(t.nbytes for t in load_file(s).values()) for s in shards]
    largest = max(t.nbytes for s in shards for t in load_file(s).values())
    assert max(sizes) <= max(30_000, largest)
    assert sum(sizes) == index["metadata"]["total_size"] == report["weight_bytes"]
    for name, home in index["weight_map"].items():
        assert name in load_file(tmp_path / "many" / home)
    assert torch.equal(logits(load(tmp_path / "many")), logits(load(tmp_path / "one")))
    assert report["fingerprint"] == load(tmp_path / "many").fingerprint != one["fingerprint"]


def test_a_converted_folder_converts_again(source: Path, tmp_path: Path) -> None:
    convert(plan(source, mixed()), tmp_path / "once")
    convert(plan(tmp_path / "once", identity()), tmp_path / "twice")
    once, twice = load(tmp_path / "once"), load(tmp_path / "twice")
    assert twice.config == once.config
    assert torch.equal(logits(twice), logits(once))


def test_the_weights_are_as_readable_as_the_other_files(source: Path, tmp_path: Path) -> None:
    convert(plan(source, identity()), tmp_path / "out")
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def front_matter(card: Path) -> dict[str, Any]:
    _, front, _ = card.read_text(encoding="utf-8").split("---\n", 2)
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("license", ["apache-2.0", "other: ask # first"])
def test_the_licence_of_a_folder_is_carried_into_the_card(
    source: Path, tmp_path: Path, license: str
) -> None:
    licensed = changed_copy(source, tmp_path / "licensed", lambda _: None)
    front = yaml.safe_dump({"license": license})
    (licensed / "README.md").write_text(f"---\n{front}---\n# A model\n", encoding="utf-8")
    report = convert(plan(licensed, identity()), tmp_path / "out")
    assert report["source"]["license"] == license
    assert front_matter(tmp_path / "out" / "README.md")["license"] == license
    assert open_checkpoint(tmp_path / "out").license == license


def test_the_licence_of_a_gguf_file_is_carried_into_the_card(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(gguf, identity())
    monkeypatch.setitem(made.source.metadata, "general.license", "mit")
    convert(made, tmp_path / "out")
    assert front_matter(tmp_path / "out" / "README.md")["license"] == "mit"


def test_a_source_without_a_licence_says_so(source: Path, tmp_path: Path) -> None:
    report = convert(plan(source, identity()), tmp_path / "out")
    assert report["source"]["license"] == "not stated"


def test_a_relative_path_still_names_the_source(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source)
    assert plan(".", identity()).summary()["source"]["name"] == "tiny"


def test_progress_counts_every_tensor_once(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(plan(source, identity()), tmp_path / "out", progress=lambda *x: seen.append(x))
    assert seen == [(i, 39) for i in range(1, 40)]


# ---- never in the way ------------------------------------------------------------------------


def refuses(make: Callable[[], Any], *words: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        make()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message
    return caught.value


def test_what_exists_is_not_replaced_without_force(source: Path, tmp_path: Path) -> None:
    convert(plan(source, identity()), tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    error = refuses(lambda: convert(plan(source, mixed()), tmp_path / "out"), "already exists")
    assert error.hint is not None
    assert "--force" in error.hint
    assert bytes_of(tmp_path / "out") == before


def test_force_replaces_a_model_folder_completely(source: Path, tmp_path: Path) -> None:
    convert(plan(source, identity()), tmp_path / "out", shard_bytes=30_000)
    report = convert(plan(source, mixed()), tmp_path / "out", force=True)
    assert set(bytes_of(tmp_path / "out")) == FILES
    assert load(tmp_path / "out").fingerprint == report["fingerprint"]
    assert os.listdir(tmp_path) == ["out"]


def test_force_fills_an_empty_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refuses(lambda: convert(plan(source, identity()), tmp_path / "out"), "already exists")
    convert(plan(source, identity()), tmp_path / "out", force=True)
    assert set(bytes_of(tmp_path / "out")) == FILES


@pytest.mark.parametrize("others", [["notes.txt"], ["config.json"], ["config.json", "notes.txt"]])
def test_force_does_not_replace_a_folder_of_other_things(
    source: Path, tmp_path: Path, others: list[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in others:
        (out / name).write_text('{"mine": true}')
    refuses(lambda: convert(plan(source, identity()), out, force=True), str(out), "--force")
    assert sorted(os.listdir(out)) == sorted(others)
    assert os.listdir(tmp_path) == ["out"]


def test_force_does_not_replace_a_converted_folder_that_holds_something_else_too(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(plan(source, identity()), out)
    (out / "thesis.tex").write_text("years of work")
    before = bytes_of(out)
    refuses(lambda: convert(plan(source, mixed()), out, force=True), "thesis.tex")
    assert bytes_of(out) == before


def test_force_does_not_remove_weights_that_are_not_the_models(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(plan(source, identity()), out, shard_bytes=30_000)
    convert(plan(source, identity()), out, force=True)
    (out / "my-adapter.safetensors").write_bytes(b"days of work")
    refuses(lambda: convert(plan(source, mixed()), out, force=True), "my-adapter.safetensors")
    assert (out / "my-adapter.safetensors").exists()


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_conversion_was_replacing_comes_back(source: Path, tmp_path: Path) -> None:
    out, dead, alive = tmp_path / "out", dead_process(), os.getppid()
    convert(plan(source, identity()), out)
    before = bytes_of(out)
    out.rename(tmp_path / f".out.{dead}.old")
    for process, age in ((dead, 7200), (dead_process(), 60), (alive, 7200)):
        left = tmp_path / f".out.{process}.partial"
        left.mkdir()
        os.utime(left, (time.time() - age,) * 2)
    refuses(lambda: convert(plan(source, mixed()), out), "already exists")
    assert bytes_of(out) == before
    assert len(list(tmp_path.glob(".out.*"))) == 2, "a young one, and one of a process that runs"
    assert not (tmp_path / f".out.{dead}.partial").exists()


def test_places_that_cannot_be_looked_at_are_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "circle").symlink_to("circle")
    todo, long = plan(source, identity()), "x" * 250
    for out, words in (("circle", "circle"), (long, "too long"), (long + long, "too long")):
        with pytest.raises(RespikeError, match=words):
            convert(todo, tmp_path / out)
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for out in (".", "..", tmp_path):
        refuses(lambda out=out: convert(todo, out, force=True), "the folder you are in")
    for read in (open_checkpoint, load_recipe):
        with pytest.raises(RespikeError, match="too long"):
            read(long + long)


def test_a_missing_tokenizer_is_noticed_before_weights_are_written(
    source: Path, tmp_path: Path
) -> None:
    bare = changed_copy(source, tmp_path / "bare", lambda _: None)
    (bare / "tokenizer.json").unlink()
    steps: list[tuple[int, int]] = []
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        convert(plan(bare, identity()), tmp_path / "out", progress=lambda *n: steps.append(n))
    assert not steps


def test_a_weight_that_f16_cannot_hold_is_refused(source: Path, tmp_path: Path) -> None:
    def grow(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][3] = 1e5

    large = changed_copy(source, tmp_path / "large", grow)
    with pytest.raises(UnsupportedError, match=r"`model\.norm\.weight` holds 1e\+05"):
        convert(plan(large, identity("weights=f16")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(plan(large, identity("weights=bf16")), tmp_path / "out")


def test_force_does_not_replace_a_model_that_respike_did_not_write(
    source: Path, tmp_path: Path
) -> None:
    theirs = changed_copy(source, tmp_path / "downloaded", lambda _: None)
    before = bytes_of(theirs)
    refuses(lambda: convert(plan(source, identity()), theirs, force=True), "--force")
    assert bytes_of(theirs) == before


def test_a_file_is_not_replaced_even_with_force(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    for force in (False, True):
        refuses(lambda force=force: convert(plan(source, identity()), out, force=force), str(out))
    assert out.read_text() == "a file"


def test_the_source_and_what_holds_it_are_refused(source: Path, gguf: Path) -> None:
    before = bytes_of(source)
    for path, out in (
        (source, source),
        (source, source / ".." / "tiny"),
        (source, source.parent),
        (gguf, gguf),
        (gguf, gguf.parent),
    ):
        refuses(
            lambda path=path, out=out: convert(plan(path, identity()), out, force=True), "source"
        )
    assert bytes_of(source) == before


def test_a_link_to_the_source_is_refused_too(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    refuses(lambda: convert(plan(source, identity()), tmp_path / "link", force=True), "source")


def test_a_plan_reads_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    before = sorted(source.parent.iterdir())
    summary = plan(source, mixed()).summary()
    assert summary["softmax_groups"] == 3
    assert sorted(source.parent.iterdir()) == before
    assert os.listdir(tmp_path) == []


def test_a_recipe_for_another_shape_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="layer 9"):
        plan(source, load_recipe("window", ("softmax_groups={9: [0]}",)))
    assert os.listdir(tmp_path) == []


# ---- interruptions ---------------------------------------------------------------------------


def failing_after(count: int, error: BaseException) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        assert total > count
        if done == count:
            raise error

    return progress


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupted_conversion_leaves_what_was_there(
    source: Path, tmp_path: Path, error: BaseException, existed: bool
) -> None:
    out = tmp_path / "new" / "out"
    if existed:
        convert(plan(source, identity()), out)
        before = bytes_of(out)
    with pytest.raises(type(error)):
        convert(
            plan(source, mixed()), out, force=True, shard_bytes=30_000,
            progress=failing_after(20, error),
        )  # fmt: skip
    if existed:
        assert bytes_of(out) == before
        assert os.listdir(out.parent) == ["out"]
    else:
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [False, True])
def test_an_interruption_at_the_very_end_leaves_what_was_there(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    existed: bool,
) -> None:
    out = tmp_path / "out"
    if existed:
        convert(plan(source, identity()), out)
        before = bytes_of(out)
    rename = Path.rename

    def last_rename_fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", last_rename_fails)
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        convert(plan(source, mixed()), out, force=True)
    assert os.listdir(tmp_path) == (["out"] if existed else [])
    if existed:
        assert bytes_of(out) == before


def fails_with(make: Callable[[], Any], *words: str) -> None:
    with pytest.raises(RespikeError) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("module", "name"),
    [(execute, "write_json"), (shards, "save_file"), (execute, "dump_recipe")],
    ids=["write_json", "save_file", "dump_recipe"],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, name, full)
    out = tmp_path / "out"
    fails_with(lambda: convert(plan(source, identity()), out), str(out), "No space left")
    assert os.listdir(tmp_path) == []


def test_a_weight_file_that_cannot_be_written_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors reports a full disk as an error of its own."""

    def into_nowhere(tensors: Any, _: Any, metadata: Any) -> None:
        save_file(tensors, tmp_path / "no" / "folder" / "x.safetensors", metadata=metadata)

    monkeypatch.setattr(shards, "save_file", into_nowhere)
    out = tmp_path / "out"
    fails_with(lambda: convert(plan(source, identity()), out), str(out), "cannot be written")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_hold_a_folder_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    out = tmp_path / "file" / "out"
    fails_with(lambda: convert(plan(source, identity()), out), str(out), "cannot be written")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_parent_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    out = tmp_path / "locked" / "out"
    fails_with(lambda: convert(plan(source, identity()), out), str(out), "Permission denied")


def test_the_fingerprint_depends_on_config_and_weights_only(source: Path, tmp_path: Path) -> None:
    convert(plan(source, identity()), tmp_path / "out")
    model = load(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("changed")
    again = load(tmp_path / "out")
    assert fingerprint(again.config, again.files) == model.fingerprint
    weights = tmp_path / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert load(tmp_path / "out").fingerprint != model.fingerprint
