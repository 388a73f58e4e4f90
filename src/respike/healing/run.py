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

from respike.checkpoint import fingerprint, open_checkpoint, read_json
from respike.config import SpikeConfig
from respike.data import TokenStore, prepare
from respike.errors import UnsupportedError, UsageError
from respike.files import replace_text
from respike.healing.checkpoint import load_checkpoint, save_checkpoint
from respike.healing.config import Healing
from respike.healing.judge import Judge, Verdict, is_better
from respike.healing.log import Log
from respike.healing.models import converted_folder, models
from respike.healing.parallel import World, join_world
from respike.healing.trainable import held_beside
from respike.healing.trainer import Trainer
from respike.healing.weights import fast_copy, merge, plain_weights, trained_spikes
from respike.loading import fast_decoder, load_tokenizer
from respike.tokenizer import Tokenizer

CHECKPOINT_SECONDS = 300
"""Time after which the next place to stop is written to disk."""
JUDGE_STEPS = 16
"""Steps of a stage between two places at which the judge may be due."""

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
    trainer = course.trainer
    unjudged_tokens = trainer.where.tokens - course.judged_tokens
    due = unjudged_tokens >= trainer.healing.judge.every_tokens
    return due and trainer.where.step % JUDGE_STEPS == 0


def _judge(course: Course, progress: Step | None) -> None:
    """Measure what the average of the weights gives, and keep it if it is the best so far."""
    trainer = course.trainer
    where = trainer.where
    if progress:
        progress(where.total_steps, trainer.all_steps, "measuring")
    student, world = trainer.pair.student, trainer.world
    found = trainer.average.interpolated() | held_beside(student, trainer.healing)
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
