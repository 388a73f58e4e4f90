"""A course of healing from a converted folder to a healed one, in legs that can be interrupted.

While it runs, ``OUT.healing`` beside OUT holds the tokenised data, the newest checkpoint and the
log. The same command goes on from there. OUT appears when the course is done.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from respike.checkpoint import Folder, fingerprint, open_checkpoint, read_json
from respike.checkpoint.families import PLAIN
from respike.config import ModelConfig, SpikeConfig, full_layers
from respike.data import TokenStore, prepare
from respike.errors import UnsupportedError, UsageError
from respike.files import replace_text
from respike.healing.checkpoint import load_checkpoint, save_checkpoint
from respike.healing.config import Healing
from respike.healing.judge import Judge, Verdict, is_better
from respike.healing.log import Log
from respike.healing.objectives import Pair
from respike.healing.parallel import World, join_world
from respike.healing.trainable import held_beside
from respike.healing.trainable import prepare as prepare_student
from respike.healing.trainer import Trainer
from respike.healing.weights import fast_copy, merge, plain_weights, trained_spikes
from respike.loading import Weights, fast_decoder, load_decoder, load_tokenizer
from respike.tokenizer import Tokenizer

CHECKPOINT_SECONDS = 300
"""Time after which the next place to stop is written to disk."""

Step = Callable[[int, int, str], None]
"""Called with (steps done, steps, what is going on)."""


@dataclass(frozen=True)
class Request:
    """What to heal, from what, and where to.

    Attributes:
        model: A folder that `respike.convert` wrote.
        out: The healed folder to write.
        data: Files and folders of text.
        original: The model to learn from; None takes the source of ``model``.
        force: Replace ``out`` if respike wrote it.
    """

    model: Path
    out: Path
    data: tuple[str, ...] = ()
    original: str | None = None
    force: bool = False


@dataclass
class Course:
    """Everything a running course consists of."""

    trainer: Trainer
    judge: Judge
    log: Log
    folder: Path
    identity: dict[str, Any]
    spikes: SpikeConfig | None = None
    """The model's neurons as it stores them."""
    start: Verdict | None = None
    best: Verdict | None = None
    best_tensors: dict[str, Tensor] | None = None
    judged_tokens: int = 0


class Reading(Weights):
    """A folder's tensors under another config, which names no others."""

    def __init__(self, folder: Folder, **changes: Any) -> None:
        self._folder = folder
        self._config = folder.config.model_copy(update=changes)

    @property
    def config(self) -> ModelConfig:
        """As changed."""
        return self._config

    @property
    def stored_dtype(self) -> torch.dtype:
        """As stored."""
        return self._folder.stored_dtype

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._folder.read(name)


def original_of(folder: Folder, original: str | Path | None) -> Weights:
    """The model to learn from: the one named, or the one inside a folder.

    Inside a spiking folder it is the same weights and mixers without neurons: what training is to
    give back is what silence took, and nothing else. Inside a converted one it is the source, if
    that had full softmax everywhere: every tensor of it was copied.

    Raises:
        UnsupportedError: None is named, and what the folder was made of cannot be told from it.
    """
    if original is not None:
        return open_checkpoint(original)
    missing = _why_not_inside(folder, read_json(folder.path / "report.json"))
    if missing:
        raise UnsupportedError(
            f"{folder.path}: {missing}", hint="name the model it was made from with --original"
        )
    if folder.config.spikes is not None:
        return Reading(folder, spikes=None)
    layers = full_layers(folder.config.num_hidden_layers, folder.config.num_key_value_heads)
    return Reading(folder, layers=layers, learned_sinks=0)


def _why_not_inside(folder: Folder, report: dict[str, Any]) -> str | None:
    """Why the original is not the folder itself with its source's mixers; None: it is."""
    source, spikes = report["source"], folder.config.spikes is not None
    if "healing" in report:
        return "its weights are not its source's any more"
    if not spikes:
        if "spikes" in report or source["family"] not in PLAIN:
            return "its weights are not its source's any more"
        if source.get("healed"):
            return "its source was healed before, so the original is not in it"
        if source.get("retied"):
            return "its source was given another output matrix, so the original is not in it"
        if not source.get("only_full_softmax", True):
            return "its source had other mixers than full softmax"
    if any(layer.moe for layer in folder.config.layers):
        return "its MLPs have become experts, scaled"
    return None


def trainable(folder: Folder) -> Weights:
    """A folder to be trained: where neurons stand before integers, before floats instead."""
    spikes = folder.config.spikes
    if spikes is None:
        return folder
    return Reading(folder, spikes=spikes.model_copy(update={"weights": "float"}))


def models(folder: Folder, original: str | Path | None, healing: Healing) -> Pair:
    """The converted model ready to be trained, and the original in its two forms."""
    source = original_of(folder, original)
    if source.config.vocab_size != folder.config.vocab_size:
        raise UsageError(
            f"the original has {source.config.vocab_size} tokens in its vocabulary, "
            f"{folder.path} has {folder.config.vocab_size}"
        )
    if any(stage.kind == "transfer" for stage in healing.stages):
        _check_shapes(folder, source)
    _check_silence(folder, healing)
    student = load_decoder(trainable(folder), dtype=healing.compute)
    prepare_student(student, healing, source.config.max_position_embeddings)
    layerwise = load_decoder(source, dtype=healing.compute)
    head = layerwise.lm_head
    weight = layerwise.embedding if head is None else head.weight
    assert isinstance(weight, Tensor)
    teacher = fast_decoder(source, dtype=healing.compute)
    return Pair(student, layerwise, teacher, weight)


def _check_shapes(folder: Folder, source: Weights) -> None:
    """Refuse to transfer from layers that are not the same ones."""
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
             "head_dim")  # fmt: skip
    for name in shape:
        theirs, mine = getattr(source.config, name), getattr(folder.config, name)
        if theirs != mine:
            raise UsageError(
                f"the original has {name} {theirs}, {folder.path} has {mine}: a transfer stage "
                "compares layer with layer",
                hint="leave that stage out",
            )


def _check_silence(folder: Folder, healing: Healing) -> None:
    """Refuse a course that asks neurons for what they cannot do."""
    spikes, asks = folder.config.spikes, [s.silence for s in healing.stages if s.silence]
    if spikes is None:
        if asks or healing.judge.silent_frac:
            raise UsageError(
                f"{folder.path}: nothing spikes there, and {healing.name} asks for silence",
                hint="put neurons in first: respike spikes MODEL OUT --silent 0.5",
            )
        return
    if spikes.neuron == "teal":
        raise UnsupportedError(f"{folder.path}: teal has no neurons to train through")
    trains = any(ask.band_rate is not None for ask in asks)
    if trains and (spikes.neuron != "dead-zone" or spikes.by_channel):
        what = "bands by channel" if spikes.by_channel else f"no bands ({spikes.neuron})"
        raise UnsupportedError(
            f"{folder.path}: its neurons have {what}, which a course cannot train",
            hint="leave them with --set stages.0.silence.band_rate=null",
        )


def converted_folder(model: Path) -> Folder:
    """The folder, if `respike.convert` wrote it.

    Raises:
        UsageError: It did not.
    """
    folder = open_checkpoint(model)
    if (
        isinstance(folder, Folder)
        and folder.raw_config.get("model_type") == "respike"
        and all((folder.path / name).is_file() for name in ("report.json", "recipe.yaml"))
        and {"source", "fingerprint"} <= read_json(folder.path / "report.json").keys()
    ):
        return folder
    raise UsageError(
        f"{model}: not a converted model",
        hint="convert it first: respike convert MODEL OUT --recipe retrieval",
    )


def begin(request: Request, healing: Healing, progress: Step | None = None) -> Course:
    """Open a course where it stands: at its beginning, or at its newest checkpoint.

    Args:
        request: Which model, where to, from which data.
        healing: What to do.
        progress: See `Step`.

    Raises:
        UsageError: ``out.healing`` belongs to another course.
        CheckpointError: The model cannot be used.
        DataError: The data, or a checkpoint, cannot be used.
    """
    folder = converted_folder(request.model)
    world = join_world()
    alone = "that spikes" if folder.config.spikes else "with learned sinks"
    if world.size > 1 and (folder.config.spikes or folder.config.learned_sinks):
        raise UnsupportedError(
            f"{request.model}: training a model {alone} in {world.size} processes",
            hint="run it in one, without torchrun",
        )
    _check_rows(healing, world)
    work = request.out.with_name(request.out.name + ".healing")
    tokenizer = load_tokenizer(folder)
    if progress:
        progress(0, 1, "reading the data")
    store = _tokens(request.data, tokenizer, work / "tokens", world)
    identity = {
        "model": fingerprint(folder.config, folder.files),
        "healing": healing.model_dump(mode="json"),
        "data": store.key,
        "processes": world.size,
        "original": None if request.original is None else _fingerprint(request.original),
    }
    begun = work / "course.json"
    _same_course(begun, identity)
    if progress:
        progress(0, 1, "loading the models")
    trainer = Trainer(models(folder, request.original, healing), healing, store, tokenizer, world)
    judge = Judge(trainer.pair.teacher, store, tokenizer, healing.judge, healing.heldout_frac)
    log = Log(work / "log.jsonl", world.first)
    course = Course(trainer, judge, log, work, identity, folder.config.spikes)
    if world.first and not begun.exists():  # not before: what was refused has not begun
        replace_text(begun, json.dumps(identity) + "\n")
    _take_up(course)
    if course.start is None:
        if progress:
            progress(0, trainer.all_steps, "measuring the converted model")
        course.start = judge.measure(fast_decoder(folder, dtype="bf16"))
        course.log.verdict(0, 0, course.start, kept=False)
    return course


def _check_rows(healing: Healing, world: World) -> None:
    """Refuse, before anything is trained, stages whose rows the processes cannot share."""
    for number, stage in enumerate(healing.stages):
        least = world.size * stage.micro_rows
        if stage.rows % least:
            raise UsageError(
                f"stages.{number}.rows {stage.rows}, {stage.micro_rows} at a time, in "
                f"{world.size} processes: expected a multiple of {least}",
                hint=f"--set stages.{number}.rows={-(-stage.rows // least) * least}",
            )


def _fingerprint(model: str) -> str:
    source = open_checkpoint(model)
    return fingerprint(source.config, source.files)


def _tokens(data: Sequence[str], tokenizer: Tokenizer, folder: Path, world: World) -> TokenStore:
    """The tokenised data; one process writes it."""
    if not data:
        raise UsageError("no data to train on", hint="give --data PATH, such as a corpus folder")
    store = prepare(data, tokenizer, folder) if world.first else None
    world.barrier()
    return store or prepare(data, tokenizer, folder)


def _same_course(path: Path, identity: dict[str, Any]) -> None:
    """Refuse to go on with another course than the one that was begun."""
    held = read_json(path) if path.exists() else identity
    for name, mine in identity.items():
        theirs: Any = held.get(name)
        if theirs == mine:
            continue
        hint = "give the same options as before, or remove it to begin again"
        if name == "healing" and theirs | {"compute": mine["compute"]} == mine:
            hint = f"it was begun in {theirs['compute']}: --set compute={theirs['compute']}"
        raise UsageError(f"{path.parent}: holds a course with another {name}", hint=hint)


def _take_up(course: Course) -> None:
    found = load_checkpoint(course.folder / "checkpoint")
    if found is None:
        course.log.cut(0)
        return
    tensors, facts = found
    course.trainer.take_up(tensors, facts["trainer"])
    course.start = Verdict(**facts["start"])
    course.best = None if facts["best"] is None else Verdict(**facts["best"])
    best = {n.removeprefix("best/"): t for n, t in tensors.items() if n.startswith("best/")}
    course.best_tensors = best or None
    course.judged_tokens = facts["judged_tokens"]
    course.log.cut(course.trainer.where.total_steps)


def run_leg(course: Course, minutes: float | None = None, progress: Step | None = None) -> bool:
    """Train until the course is done or the time is up; whether it is done.

    The course stops only where it can go on from with the same bits, which is every
    `Stage.checkpoint_steps` steps; after a kill it goes on from the newest checkpoint on disk.
    """
    trainer, begun = course.trainer, time.monotonic()
    saved = begun
    while not trainer.done:
        line = trainer.step()
        course.log.step(line)
        if progress:
            where, steps = trainer.where, trainer.all_steps
            loss = "reading" if line["loss"] is None else f"{line['loss']:.4f}"
            progress(where.total_steps, steps, f"{line['stage']} {loss}")
        if not trainer.may_stop:
            continue
        trainer.renew_lanes()
        if trainer.done or _due(course):
            _judge(course, progress)
        now = time.monotonic()
        up = _any(trainer.world, minutes is not None and now - begun >= 60 * minutes)
        if trainer.done or up or _any(trainer.world, now - saved >= CHECKPOINT_SECONDS):
            save(course)
            saved = now
        if up:
            break
    return trainer.done


def _any(world: World, condition: bool) -> bool:
    """All processes decide alike."""
    return world.total(float(condition)) > 0


def _due(course: Course) -> bool:
    every = course.trainer.healing.judge.every_tokens
    return course.trainer.where.tokens - course.judged_tokens >= every


def _judge(course: Course, progress: Step | None) -> None:
    """Measure the average of the weights, and keep it if it is the best so far."""
    trainer = course.trainer
    where = trainer.where
    if progress:
        progress(where.total_steps, trainer.all_steps, "measuring")
    student, world = trainer.pair.student, trainer.world
    found = trainer.average.tensors() | held_beside(student, trainer.healing)
    trained = {name: world.full(tensor) for name, tensor in found.items()}
    weights = merge(plain_weights(student, world), trained)
    spikes = trained_spikes(course.spikes, trained)
    config = student.config.model_copy(update={"spikes": spikes})
    verdict = course.judge.measure(fast_copy(config, weights))
    assert course.start is not None
    kept = is_better(verdict, course.best, course.start, trainer.healing.judge)
    if kept:
        course.best = verdict
        course.best_tensors = {n: t.to(torch.bfloat16) for n, t in trained.items()}
    course.judged_tokens = where.tokens
    course.log.verdict(where.total_steps, where.tokens, verdict, kept)


def save(course: Course) -> None:
    """Write a checkpoint."""
    trainer = course.trainer
    tensors = trainer.tensors()
    tensors |= {f"best/{n}": t for n, t in (course.best_tensors or {}).items()}
    if trainer.world.first:
        facts = {
            "trainer": trainer.facts(),
            "start": None if course.start is None else course.start.as_dict(),
            "best": None if course.best is None else course.best.as_dict(),
            "judged_tokens": course.judged_tokens,
        }
        save_checkpoint(course.folder / "checkpoint", trainer.where.total_steps, tensors, facts)
    trainer.world.barrier()
