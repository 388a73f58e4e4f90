"""Healing of models that spike: towards silence, in legs, and into folders that run as judged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from refusal import one_line
from respike.checkpoint import open_checkpoint
from respike.conversion import convert, plan
from respike.data import TokenStore, prepare
from respike.errors import UnsupportedError, UsageError
from respike.healing import Healing, Request, apply, heal, load_healing
from respike.healing.config import Judging, Silence, Stage
from respike.healing.judge import Judge, Verdict, is_better
from respike.healing.models import converted_folder, models, trainable
from respike.healing.penalties import GOAL_WIDTH, Penalties
from respike.loading import fast_decoder, load, load_decoder, load_tokenizer
from respike.models.silence import SeenFiring, watch_firing
from respike.models.spiking import spike_sites
from respike.recipe import load_recipe
from respike.spiking import Goal, Measure, spike
from tiny import model_config, random_decoder, random_tokens, save_documents, save_tiny
from tolerance import assert_close

SETTINGS = ("window_tokens=9", "sink_tokens=2", "far.features=5", "far.calibration_tokens=600")
RECALL = {"families": ["copy"], "least_tokens": 16, "first_tokens": 24, "last_tokens": 32}
TRAIN = {
    "q_proj": 2, "k_proj": 3, "v_proj": "full", "o_proj": 2, "gate_proj": "full", "up_proj": 4,
    "down_proj": "full", "input_layernorm": "full",
}  # fmt: skip
SILENCE = {
    "silent_frac": 0.5, "first_frac": 0.3, "ramp_frac": 0.4, "price_nats": 5.0, "band_rate": 3e-2,
}  # fmt: skip


def course(**changes: Any) -> Healing:
    stage = {
        "kind": "distil", "tokens": 24 * 96, "context_tokens": 48, "rows": 2, "train": TRAIN,
        "rate": 2e-3, "memory_rate": 2e-3, "recall": RECALL, "silence": SILENCE,
    }  # fmt: skip
    judge = {
        "every_tokens": 900, "contexts": 2, "context_tokens": 48, "recall": ["copy:12"],
        "trials": 2, "recall_slack_frac": 1.0, "silent_frac": 0.42,
    }  # fmt: skip
    fields = {"heal": 1, "name": "tiny", "stages": [stage], "judge": judge, "heldout_frac": 0.3}
    return Healing.model_validate(fields | {"ema_decay": 0.5} | changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_documents(tmp_path_factory.mktemp("data"), plain=True)


def spiked(source: Path, out: Path, data: Path, **changes: Any) -> Path:
    goal = Goal(**({"silent_frac": 0.3, "step": "mean", "k": 8.0} | changes))
    measure = Measure(
        data=(data / "plain.txt",), context_tokens=24, calibration_tokens=240,
        held_out_tokens=240, dtype="f32",
    )  # fmt: skip
    spike(source, out, goal, measure, rasters=False)
    return out


@pytest.fixture(scope="module")
def spiking(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model with memories that spikes."""
    folder = tmp_path_factory.mktemp("spiking")
    source = save_tiny(folder / "source")
    convert(plan(source, load_recipe("constant", SETTINGS)), folder / "converted")
    return spiked(folder / "converted", folder / "model", data)


def request(model: Path, data: Path, out: Path) -> Request:
    return Request(model, out, (str(data / "text.jsonl"),))


@pytest.fixture(scope="module")
def healed(
    spiking: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("healed") / "model"
    return out, heal(request(spiking, data, out), course(), plot=True)


def log(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "healing.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def test_a_course_silences_a_model_step_by_step(healed: tuple[Path, dict[str, Any]]) -> None:
    out, report = healed
    lines = log(out, "step")
    asked = [line["asked_frac"] for line in lines]
    assert asked[0] == pytest.approx(0.3)
    assert asked == sorted(asked)
    assert asked[-1] == 0.5
    assert lines[0]["skipped_frac"] < 0.35
    assert lines[-1]["skipped_frac"] > 0.42
    assert report["start"]["skipped_frac"] < 0.35
    assert report["best"]["skipped_frac"] >= 0.42
    assert (out / "healing.png").exists()
    assert "trained through them" in (out / "README.md").read_text()


def test_the_folder_runs_as_it_was_judged(
    healed: tuple[Path, dict[str, Any]], spiking: Path, data: Path, tmp_path: Path
) -> None:
    """Loaded anew, in the engine, on the judge's own text: the same KL and silence."""
    out, report = healed
    source, asked = converted_folder(spiking), course()
    tokenizer = load_tokenizer(source)
    store: TokenStore = prepare([str(data / "text.jsonl")], tokenizer, tmp_path / "tokens")
    teacher = models(source, None, asked).teacher
    judge = Judge(teacher, store, tokenizer, asked.judge, asked.heldout_frac)
    verdict = judge.measure(fast_decoder(open_checkpoint(out), dtype="bf16"))
    assert verdict.as_dict() == report["best"]
    written = json.loads((out / "report.json").read_text())["spikes"]
    assert written["total"]["skipped_frac"] > 0.4
    assert written["distance"]["kl_nats"] > 0
    before = json.loads((spiking / "config.json").read_text())["spikes"]
    after = json.loads((out / "config.json").read_text())["spikes"]
    assert after["weights"] == before["weights"] == "int8"
    assert after["layers"] != before["layers"]


def test_engine_and_layers_give_the_same_integers(healed: tuple[Path, dict[str, Any]]) -> None:
    """What each layer of the trained folder is given, it turns into the same sums by events."""
    fast = load(healed[0], dtype="f32").decoder
    assert fast.engine is not None
    tokens = random_tokens(1, 12)
    with torch.no_grad(), watch_firing(fast) as seen:
        by_layers, _ = fast(tokens)
    with torch.no_grad():
        by_engine, _ = fast(tokens)
    assert 0.3 < float(seen.touched_frac()) < 0.7
    assert (by_layers - by_engine).abs().max() < 0.05 * by_layers.abs().max()


def test_legs_give_the_bytes_of_a_course_without_a_stop_and_so_does_the_difference(
    healed: tuple[Path, dict[str, Any]], spiking: Path, data: Path, tmp_path: Path
) -> None:
    out, report = healed
    asked = request(spiking, data, tmp_path / "model")
    assert not heal(asked, course(), leg_minutes=0.0)["done"]
    assert heal(asked, course())["done"]
    apply(Request(spiking, tmp_path / "applied"), Path(report["difference"]))
    for folder in (tmp_path / "model", tmp_path / "applied"):
        assert weights(folder) == weights(out)
        assert (folder / "config.json").read_bytes() == (out / "config.json").read_bytes()


def test_before_the_first_step_the_student_spikes_as_the_folder_and_the_teacher_not_at_all(
    spiking: Path,
) -> None:
    folder = converted_folder(spiking)
    pair = models(folder, None, course(compute="f32"))
    tokens = random_tokens(2, 30)
    with torch.no_grad():
        theirs = load_decoder(trainable(folder), dtype="f32")(tokens)[0]
        mine = pair.student(tokens)[0]
        teacher = pair.teacher(tokens)[0]
    assert_close(mine, theirs)
    assert (teacher - theirs).abs().max() > 0.05 * theirs.abs().max()
    assert all(site.neuron is None for site in spike_sites(pair.teacher))
    kinds = {(type(m).__name__, m.neuron is not None) for s in spike_sites(pair.student)
             for m in s.linears}  # fmt: skip
    assert kinds == {("LowRank", True), ("SpikedLinear", True)}


def test_neurons_that_have_no_bands_are_trained_through_all_the_same(
    data: Path, tmp_path: Path
) -> None:
    """A plain model with absmax neurons, by a course that leaves bands alone."""
    source = save_tiny(tmp_path / "source")
    model = spiked(source, tmp_path / "model", data, neuron="absmax", silent_frac=None)
    stage = course().stages[0].model_dump() | {"tokens": 4 * 96, "silence": None}
    calm = course(stages=[stage], judge=course().judge.model_dump() | {"silent_frac": 0.0})
    report = heal(request(model, data, tmp_path / "out"), calm)
    assert report["done"]
    assert "asked_frac" in log(tmp_path / "out", "step")[-1]
    stage["silence"] = SILENCE
    with pytest.raises(UnsupportedError) as error:
        heal(request(model, data, tmp_path / "a"), course(stages=[stage]))
    one_line(error.value, "absmax")


# ---- the parts


def test_silence_is_asked_in_a_straight_line_and_then_evenly() -> None:
    ask = Silence(silent_frac=0.6, first_frac=0.2, ramp_frac=0.5)
    found = [ask.asked_frac(step, 40) for step in (0, 10, 20, 39)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.6])
    assert Silence(silent_frac=0.6, ramp_frac=0.0).asked_frac(0, 40) == 0.6


def test_a_step_adds_up_what_its_micro_batches_touched() -> None:
    class Seen(SeenFiring):
        def __init__(self, touched: float) -> None:
            super().__init__([])
            self.touched = torch.tensor(touched)

        def touched_frac(self) -> torch.Tensor:
            return self.touched

    ask = Silence(silent_frac=0.5, first_frac=0.5, price_nats=4.0)
    stage = Stage(kind="distil", tokens=64, context_tokens=16, rows=4, micro_rows=1, silence=ask)
    step = Penalties(random_decoder(model_config()), stage, 0)
    prices = [float(step.price(Seen(touched), 0.25)) for touched in (0.7, 0.4)]
    assert prices == pytest.approx([0.25 * 4 * (0.2 - GOAL_WIDTH / 2), 0.0])
    assert step.skipped_frac == pytest.approx(0.25 * (0.3 + 0.6))


def test_the_nearest_of_the_silent_is_kept_and_until_one_is_the_most_silent() -> None:
    start, loud, louder, silent, near = (
        Verdict(kl, (0.0, 1.0), 0.0, 0.5, 1.0, {}, skipped)
        for kl, skipped in ((0.1, 0.3), (0.2, 0.45), (0.15, 0.40), (0.4, 0.51), (0.3, 0.50))
    )
    judging = Judging(silent_frac=0.5)
    assert is_better(louder, None, start, judging)
    assert is_better(loud, louder, start, judging)
    assert not is_better(louder, loud, start, judging)
    assert is_better(silent, loud, start, judging)
    assert not is_better(loud, silent, start, judging)
    assert is_better(near, silent, start, judging)
    assert not is_better(silent, near, start, judging)


def test_what_cannot_be_is_refused(
    healed: tuple[Path, dict[str, Any]], spiking: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as usage:
        heal(request(spiking.parent / "converted", data, tmp_path / "a"), course())
    one_line(usage.value, "nothing spikes there")
    with pytest.raises(UnsupportedError) as error:
        heal(request(healed[0], data, tmp_path / "b"), course())
    one_line(error.value, "source's any more")
    teal = spiked(
        spiking.parent / "source", tmp_path / "teal", data, neuron="teal", weights="float"
    )
    with pytest.raises(UnsupportedError) as error:
        heal(request(teal, data, tmp_path / "c"), course())
    one_line(error.value, "teal")
    by_channel = spiked(spiking.parent / "source", tmp_path / "by", data, by_channel=True)
    with pytest.raises(UnsupportedError) as error:
        heal(request(by_channel, data, tmp_path / "d"), course())
    one_line(error.value, "by channel")
    for change, words in (
        ("stages.0.silence.silent_fac=0.5", "silent_fac"),
        ("stages.0.train.input_layernorm=3", "vector"),
    ):
        with pytest.raises(UsageError) as usage:
            load_healing("spikes", (change,))
        one_line(usage.value, words)
