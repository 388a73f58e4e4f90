"""What a course refuses before it trains anything, and what it leaves behind when it fails."""

import errno
import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

import respike.healing.models as models
import respike.healing.run as run
from courses import DISTIL, JUDGE, RECALL, SETTINGS, TRANSFER, course, request, steps, weights
from refusal import edit_config, one_line
from respike.cli.main import program
from respike.conversion import convert, plan
from respike.data import prepare
from respike.errors import DataError, RespikeError, UnsupportedError, UsageError
from respike.healing import heal, load_healing
from respike.healing.config import Judging
from respike.healing.judge import heldout_contexts
from respike.healing.log import Log
from respike.healing.parallel import World
from respike.healing.trainer import Trainer
from respike.recipe import load_recipe
from respike.tokenizer import Tokenizer
from tiny import save_documents, save_tiny

HEAL = import_module("respike.healing.heal")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_documents(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(plan(source, load_recipe("constant", SETTINGS)), out)
    return out


def test_an_original_that_is_not_in_the_folder_is_asked_for(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    made = {
        "retied": plan(source, load_recipe("window", ["retie=true"])),
        "converted twice": plan(converted, load_recipe("window")),
    }
    shutil.copytree(converted, tmp_path / "healed")
    report = json.loads((tmp_path / "healed" / "report.json").read_text())
    (tmp_path / "healed" / "report.json").write_text(json.dumps(report | {"healing": {}}))
    made["healed and converted"] = plan(tmp_path / "healed", load_recipe("identity"))
    words = {"retied": "another output matrix", "converted twice": "other mixers"}
    for name, todo in made.items():
        convert(todo, tmp_path / name)
        with pytest.raises(UnsupportedError, match=words.get(name, "healed before")) as caught:
            models.original_of(models.converted_folder(tmp_path / name), None)
        assert "--original" in str(caught.value.hint)
        assert models.original_of(models.converted_folder(tmp_path / name), source)


def test_a_folder_that_only_looks_converted_is_refused(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "looks")
    for report in ("{}", '{"source": {}, "fingerprint": ""}'):
        (tmp_path / "looks" / "report.json").write_text(report)
        with pytest.raises(UsageError, match="not a converted model"):
            models.converted_folder(tmp_path / "looks")


def test_a_dry_run_looks_at_what_it_is_given(converted: Path, text: Path, tmp_path: Path) -> None:
    def dry(model: Path, data: Path) -> BaseException | None:
        words = ["heal", model, tmp_path / "out", "--config", "quick", "--data", data, "--dry-run"]
        return CliRunner().invoke(program, list(map(str, words)), standalone_mode=False).exception

    assert dry(converted, text) is None
    assert "no such folder" in str(dry(tmp_path / "none", text))
    assert "no such file" in str(dry(converted, tmp_path / "none"))
    assert not list(tmp_path.iterdir())


def test_an_original_means_nothing_to_a_difference(converted: Path, tmp_path: Path) -> None:
    words = ["heal", converted, tmp_path / "out", "--apply", "x.safetensors", "--original", "y"]
    error = CliRunner().invoke(program, list(map(str, words)), standalone_mode=False).exception
    assert "so --original would mean nothing" in str(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recall": RECALL | {"families": ["copyy"]}}, "copyy"),
        ({"recall": RECALL | {"first_tokens": 40}}, "growing"),
        ({"least_document_tokens": 100_000}, "no document"),
    ],
    ids=["family", "curriculum", "documents"],
)
def test_a_mistake_in_a_later_stage_is_found_before_the_first_is_trained(
    change: dict[str, Any], words: str, converted: Path, text: Path, tmp_path: Path
) -> None:
    asked = request(converted, text, tmp_path / "model")
    with pytest.raises(RespikeError) as error:
        heal(asked, course(compute="f32", stages=[TRANSFER, DISTIL | change]))
    one_line(error.value, "stages.1", words)
    left = {path.name for path in (tmp_path / "model.healing").iterdir()}
    assert left == {"tokens"}  # the same command, mended, can begin there


def test_a_stage_that_trains_nothing_is_refused(
    converted: Path, text: Path, tmp_path: Path
) -> None:
    asked = request(converted, text, tmp_path / "model")
    with pytest.raises(UnsupportedError) as error:
        heal(asked, course(memory="off", stages=[DISTIL, TRANSFER]))
    one_line(error.value, "stages.1", "trains nothing")


def test_rows_that_processes_cannot_share_are_refused_at_the_beginning(
    converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "join_world", lambda: World(1, 2))
    asked = request(converted, text, tmp_path / "model")
    for rows, micro, expected in ((1, 1, 2), (4, 4, 8)):
        stage = DISTIL | {"rows": rows, "micro_rows": micro}
        with pytest.raises(UsageError) as error:
            heal(asked, course(compute="f32", stages=[TRANSFER, stage]))
        one_line(error.value, f"stages.1.rows {rows}", "2 processes")
        assert error.value.hint == f"--set stages.1.rows={expected}"
    assert not (tmp_path / "model.healing").exists()


def test_another_original_is_another_course(
    source: Path, converted: Path, text: Path, tmp_path: Path
) -> None:
    once = course(compute="f32", stages=[DISTIL | {"tokens": 32 * 96}])
    asked = request(converted, text, tmp_path / "model")
    heal(asked, once, leg_minutes=0.0)
    same = request(converted, text, tmp_path / "model", original=str(source))
    with pytest.raises(UsageError) as error:
        heal(same, once, leg_minutes=0.0)
    one_line(error.value, "another original")
    shallow = save_tiny(tmp_path / "shallow", num_hidden_layers=1)
    other = request(converted, text, tmp_path / "other", original=str(shallow))
    with pytest.raises(UsageError) as error:
        heal(other, course())
    one_line(error.value, "num_hidden_layers 1", "layer with layer")


def test_rows_may_be_as_long_as_the_original_was_trained_for(
    source: Path, converted: Path, text: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(source, short)
    edit_config(short, max_position_embeddings=32)
    asked = request(converted, text, tmp_path / "model", original=str(short))
    with pytest.raises(UnsupportedError) as error:
        heal(asked, course())
    one_line(error.value, "rows of 48 tokens", "trained for 32")


def test_a_gradient_that_is_no_number_stops_a_course_and_its_checkpoint_stays(
    converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(converted, text, tmp_path / "model")
    once = course(compute="f32", stages=[DISTIL | {"tokens": 19 * 96}])
    heal(asked, once, leg_minutes=0.0)
    folder = next((tmp_path / "model.healing" / "checkpoint").glob("step-*"))
    whole = Trainer._gradients

    def poisoned(self: Trainer, *rest: Any) -> float | None:
        loss = whole(self, *rest)
        if self.where.total_steps == 17:
            grads = [t.master.grad for t in self.optimiser.trained]
            next(g for g in grads if g is not None).view(-1)[0] = torch.nan
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_gradients", poisoned)
        with pytest.raises(RespikeError) as error:
            heal(asked, once)
    one_line(error.value, "step 18", "stages.0", "nan")
    assert folder.exists()
    assert heal(asked, once)["done"]
    heal(request(converted, text, tmp_path / "smooth"), once)
    assert weights(tmp_path / "model") == weights(tmp_path / "smooth")


def test_a_full_disk_at_the_end_costs_no_training(
    converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(converted, text, tmp_path / "model")
    once = course(compute="f32", stages=[DISTIL | {"tokens": 4 * 96}])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(HEAL, "convert", full)
        with pytest.raises(OSError, match="No space"):
            heal(asked, once)
    monkeypatch.setattr(Trainer, "step", full)  # nothing is to be trained again
    assert heal(asked, once)["done"]
    assert len(steps(tmp_path / "model")) == 4
    assert not (tmp_path / "model.healing" / "checkpoint").exists()


def test_options_of_a_course_are_refused_beside_a_difference(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["heal", "model", str(out), "--apply", "difference", "--dry-run", "--set", "seed=1"]
    done = CliRunner().invoke(program, words)
    assert done.exit_code == 2
    assert "--set, --dry-run would mean nothing" in done.output
    assert not out.exists()


def test_fewer_contexts_than_asked_are_said(converted: Path, text: Path, tmp_path: Path) -> None:
    few = course(compute="f32", stages=[DISTIL | {"tokens": 96}], judge=JUDGE | {"contexts": 999})
    (tmp_path / "course.yaml").write_text(yaml.safe_dump(few.model_dump(mode="json")))
    words = [
        "heal",
        converted,
        tmp_path / "out",
        "--config",
        tmp_path / "course.yaml",
        "--data",
        text,
    ]
    done = CliRunner().invoke(program, [*map(str, words), "--no-plot"])
    assert done.exit_code == 0
    assert " of 999 contexts" in done.output


def test_a_log_that_cannot_be_written_is_one_line() -> None:
    with pytest.raises(DataError) as error:
        Log(Path("/dev/full")).step({"step": 1})
    one_line(error.value, "/dev/full", "No space left")


def test_steps_of_a_transfer_count_though_no_logits_are_compared(
    converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = lambda batch, *_: torch.zeros(batch.tokens.shape)  # noqa: E731
    monkeypatch.setattr("respike.healing.trainer.weigh_positions", nowhere)
    few = course(compute="f32", stages=[TRANSFER | {"tokens": 3 * 96}])
    heal(request(converted, text, tmp_path / "model"), few)
    assert None not in {line["loss"] for line in steps(tmp_path / "model")}


def test_a_step_about_nothing_leaves_no_gradients(
    converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    whole = Trainer._gradients

    def silent(self: Trainer, *rest: Any) -> float | None:
        assert all(t.master.grad is None for t in self.optimiser.trained)
        seen.append(whole(self, *rest))
        return None

    monkeypatch.setattr(Trainer, "_gradients", silent)
    few = course(compute="f32", stages=[DISTIL | {"tokens": 3 * 96}])
    heal(request(converted, text, tmp_path / "model"), few)
    assert len(seen) == 3


def test_one_document_is_too_little_to_judge_on_and_the_message_says_what_helps(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("the sand and the ring " * 500)
    store = prepare([str(tmp_path / "a.txt")], Tokenizer.from_folder(source), tmp_path / "tokens")
    with pytest.raises(DataError) as error:
        heldout_contexts(store, Judging(context_tokens=48), 0.01)
    one_line(error.value, "no held-out document has 48 tokens")
    assert "more data" in str(error.value.hint)


@pytest.mark.parametrize("text", ["seed: 2000-13-45", "[" * 900], ids=["no date", "deep"])
def test_yaml_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "course.yaml").write_text(text)
    with pytest.raises(UsageError) as error:
        load_healing(str(tmp_path / "course.yaml"))
    one_line(error.value, "course.yaml")
