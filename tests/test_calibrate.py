"""Fitting far memories without training: what is fitted fits, and what does not help stays shut."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from respike.config import FarMemory, RopeConfig
from respike.conversion import convert, plan
from respike.conversion.calibrate import calibrate, with_recall
from respike.errors import CheckpointError, UsageError
from respike.layers.far import FarSoftmax
from respike.loading import load
from respike.models.decoder import Decoder
from respike.recipe import load_recipe
from tiny import K, V, full, model_config, random_decoder, save_tiny, window

WINDOW, SINKS, T = 9, 2, 200
TOKENS = list(range(5, 17))
"""Few enough that every key is one of twelve: as many prototypes can hold them exactly."""
STILL = RopeConfig(theta=10_000.0, kind="factors", factors=(1e9,) * (K // 2))
"""Rotary embedding that hardly turns."""


def far_config(layers: int = 1, features: int = 48, **changes: object):  # type: ignore[no-untyped-def]
    far = window(0, 1, 2, tokens=WINDOW, sinks=SINKS)
    far = far.model_copy(update={"memory": FarMemory(features=features)})
    return model_config(((far,),) * layers, **changes)


def original(layers: int = 1, **changes: object) -> Decoder:
    decoder = random_decoder(model_config(((full(0, 1, 2),),) * layers, **changes))
    for layer in decoder.layers:  # keys far apart, so that which prototype is whose is clear
        layer.self_attn.k_proj.weight.data *= 6
    return decoder


def texts(count: int, seed: int = 0) -> Tensor:
    r = torch.Generator().manual_seed(seed)
    return torch.tensor(TOKENS)[torch.randint(len(TOKENS), (count, T), generator=r)]


def head_errors(decoder: Decoder, fitted: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of each head of layer 0 against the original's, and the output's square."""
    config = far_config(rope=decoder.config.rope)
    attention = decoder.layers[0].self_attn
    mixer = FarSoftmax(
        random_decoder(model_config(((window(0, 1, 2, tokens=WINDOW, sinks=SINKS),),)))
        .layers[0].self_attn.arrangement()[0][1],  # type: ignore[arg-type]
        num_heads=config.num_attention_heads, num_groups=3, head_dim=K, features=48,
    )  # fmt: skip
    prefix = "model.layers.0.self_attn.mixers.0."
    mixer.load_state_dict({n.removeprefix(prefix): x for n, x in fitted.items()})
    error, power = torch.zeros(6), torch.zeros(6)
    with torch.no_grad():
        for row in rows:
            x = decoder.layers[0].input_layernorm(decoder.model.embed_tokens(row[None]))
            span = decoder.span(decoder.init_state(), T)
            want, _ = attention.mix(x, attention.project(x), span, attention.init_state(1, x))
            got, _ = mixer(x, *attention.project(x), span, mixer.init_state(1, 3, K, x))
            error += (got - want).square().sum((0, 1, 3))
            power += want.square().sum((0, 1, 3))
    return error, power


def test_keys_that_are_few_are_remembered_all_but_exactly() -> None:
    decoder = original(rope=STILL)
    rows = texts(6)
    fitted, fits = calibrate(decoder, far_config(rope=STILL), rows[:3], rows[3:], 1e9)
    assert [f.head for f in fits] == list(range(6))
    for fit in fits:
        assert fit.error_shut > 0.01
        assert fit.error < 0.05 * fit.error_shut, fit
        assert fit.beta > -math.inf
        assert 0 < fit.share < 1
    error, power = head_errors(decoder, fitted, rows[3:])
    assert torch.tensor([f.error for f in fits]).allclose(error / power, rtol=1e-3, atol=1e-6)


def test_what_is_fitted_is_never_worse_than_shut_where_it_was_not_searched() -> None:
    decoder, rows = random_decoder(model_config(((full(0, 1, 2),),) * 2)), texts(4)
    _, fits = calibrate(decoder, far_config(2, features=3), rows[:2], rows[2:], 1e4)
    assert len(fits) == 12
    assert all(f.error <= f.error_shut for f in fits)
    assert all(f.error < f.error_shut for f in fits if f.beta > -math.inf)


def test_a_head_that_needs_no_memory_stays_shut() -> None:
    """The original itself sees window and sinks only, so whatever a memory adds is wrong."""
    near = window(0, 1, 2, tokens=WINDOW, sinks=SINKS)
    decoder, rows = random_decoder(model_config(((near,),))), texts(4)
    fitted, fits = calibrate(decoder, far_config(), rows[:2], rows[2:], 1e4)
    # Not an error of zero: the far share at the smallest beta tried may be lost to rounding.
    assert all(f.error <= f.error_shut for f in fits)
    assert (fitted["model.layers.0.self_attn.mixers.0.beta"] <= -12).all()


def test_the_half_life_is_the_one_asked_for() -> None:
    rows = texts(2)
    fitted, _ = calibrate(original(), far_config(), rows[:1], rows[1:], 4096.0)
    assert (fitted["model.layers.0.self_attn.mixers.0.log2_half_life"] == 12).all()


def test_contexts_in_which_nothing_is_far_are_refused() -> None:
    short = texts(2)[:, : 2 * (WINDOW + SINKS) - 1]
    with pytest.raises(UsageError, match="at least 22 tokens, got 21"):
        calibrate(original(), far_config(), short[:1], short[1:], 1e4)


def test_both_halves_get_something_to_copy() -> None:
    text = torch.arange(7 * 10).view(7, 10) + 1000
    searched, checked = with_recall(text, [1, 2, 3, 4, 5])
    assert torch.equal(searched[:4], text[:4])
    assert torch.equal(checked[:3], text[4:])
    assert (len(searched), len(checked)) == (5, 4)
    for copy in (searched[4], checked[3]):
        assert set(copy.tolist()) <= {1, 2, 3, 4, 5}
        assert torch.equal(copy[:5], copy[5:])
    assert not torch.equal(searched[4], checked[3])
    again = with_recall(text, [1, 2, 3, 4, 5])
    assert torch.equal(again[0], searched)


# ---- through convert -------------------------------------------------------------------------

SETTINGS = ("window_tokens=9", "sink_tokens=2", "far.features=5", "far.calibration_tokens=600")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text(" ".join(f"word{i % 7} and {i % 11}" for i in range(3000)), encoding="utf-8")
    return path


def test_convert_calibrates_the_same_twice_and_says_on_what(
    source: Path, text: Path, tmp_path: Path
) -> None:
    todo = plan(source, load_recipe("constant", SETTINGS))
    reports = [convert(todo, tmp_path / name, data=[text]) for name in ("a", "b")]
    assert reports[0]["fingerprint"] == reports[1]["fingerprint"]
    fit = reports[0]["calibration"]
    assert fit["text"] == ["some.txt"]
    assert fit["heads"] == len(fit["each"]) > 0
    assert fit["error_frac"] <= fit["error_shut_frac"]
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert f"fitted to {fit['text_tokens']:,} tokens of text" in card
    out, _ = load(tmp_path / "a").decoder(torch.randint(0, V, (1, 60)))
    assert out.isfinite().all()


def test_text_for_a_recipe_that_calibrates_nothing_is_refused(
    source: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="calibrates nothing"):
        convert(plan(source, load_recipe("window")), tmp_path / "out", data=[text])
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("word " * 100, encoding="utf-8")
    with pytest.raises(UsageError, match="two contexts of"):
        convert(plan(source, load_recipe("constant", SETTINGS)), tmp_path / "out", data=[short])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["short.txt"]


def test_memories_that_are_kept_are_not_fitted_again(
    source: Path, text: Path, tmp_path: Path
) -> None:
    convert(plan(source, load_recipe("constant", SETTINGS)), tmp_path / "first", data=[text])
    first = load_file(tmp_path / "first" / "model.safetensors")
    name = "model.layers.{}.self_attn.mixers.0.beta"
    for layer in (0, 1):
        first[name.format(layer)].fill_(7.0)
    save_file(first, tmp_path / "first" / "model.safetensors", metadata={"format": "pt"})
    window = "{at: [0], mixer: window, memory: far, window_tokens: 5}"
    rules = f"layers=[{window}, {{at: rest, mixer: keep}}]"
    todo = plan(tmp_path / "first", load_recipe("constant", (*SETTINGS, rules)))
    assert {t.name: t.action for t in todo.tensors}[name.format(1)] == "copy"
    convert(todo, tmp_path / "second", data=[text])
    second = load_file(tmp_path / "second" / "model.safetensors")
    assert torch.equal(second[name.format(1)], first[name.format(1)])
    assert not torch.equal(second[name.format(0)], first[name.format(0)])


@pytest.mark.parametrize("pruned", ["q_proj", "v_proj"])
def test_heads_that_were_pruned_stay_shut(
    source: Path, text: Path, tmp_path: Path, pruned: str
) -> None:
    shutil.copytree(source, tmp_path / "pruned")
    file = tmp_path / "pruned" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.0.self_attn.{pruned}.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    report = convert(
        plan(tmp_path / "pruned", load_recipe("constant", SETTINGS)), tmp_path / "out", data=[text]
    )
    assert all(math.isfinite(value) for head in report["calibration"]["each"] for value in head)
    out, _ = load(tmp_path / "out").decoder(torch.randint(0, V, (1, 60)))
    assert out.isfinite().all()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_if_the_text_has_them(
    source: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "more")
    tokenizer.add_tokens([f"added{i}" for i in range(40)])
    tokenizer.save_pretrained(tmp_path / "more")
    todo = plan(tmp_path / "more", load_recipe("constant", SETTINGS))
    convert(todo, tmp_path / "out", data=[text])
    text.write_text("added39 " + text.read_text(), encoding="utf-8")
    with pytest.raises(CheckpointError, match="its embedding"):
        convert(todo, tmp_path / "again", data=[text])
