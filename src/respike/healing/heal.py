"""Healing from end to end: train in legs, then write the healed folder; or put a difference in."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from respike.checkpoint import read_json
from respike.conversion.execute import check_out, convert
from respike.conversion.plan import plan_as_it_is
from respike.data.documents import find_files
from respike.errors import UsageError
from respike.healing.config import Healing
from respike.healing.models import converted_folder, original_of
from respike.healing.run import (
    Course,
    Request,
    Step,
    begin,
    run_leg,
)
from respike.healing.weights import (
    fast_copy,
    load_difference,
    merge,
    save_difference,
    source_fingerprint,
    trained_spikes,
)
from respike.loading import fast_decoder, load_tokenizer
from respike.spiking import recount

DIFFERENCE = "difference.safetensors"


def summary(request: Request, healing: Healing) -> dict[str, Any]:
    """What a course would do, for ``--dry-run``; headers and names are all that is read.

    Raises:
        UsageError: ``model`` is not a converted folder.
        DataError: Data is named that is not there.
    """
    converted_folder(request.model)
    if request.data:
        find_files(request.data)
    stages = [{**stage.model_dump(mode="json"), "steps": stage.steps} for stage in healing.stages]
    return {
        "name": healing.name,
        "compute": healing.compute,
        "tokens": healing.tokens,
        "stages": stages,
    }


def heal(
    request: Request,
    healing: Healing,
    *,
    leg_minutes: float | None = None,
    plot: bool = False,
    progress: Step | None = None,
) -> dict[str, Any]:
    """Train a converted model to do what its original does; see `respike.healing.run`.

    Args:
        request: Which model, where to, from which data.
        healing: What to do.
        leg_minutes: Stop after this time; the same call goes on.
        plot: Draw the course (needs matplotlib).
        progress: See `respike.healing.run.Step`.

    Returns:
        Where the course stands; ``done`` says whether ``out`` was written.

    Raises:
        UsageError: ``out`` may not be written, ``out.healing`` belongs to another course, or
            ``model`` is not a converted folder.
        DataError: The data, or a checkpoint, cannot be used.
    """
    check_out(request.out, request.model, request.force)
    course = begin(request, healing, progress)
    done = run_leg(course, leg_minutes, progress)
    report = _report(course) | {"done": done}
    if plot and course.trainer.world.first:
        from respike.healing.plot import draw

        draw(course.log.lines(), course.folder / "healing.png")
    if done and course.trainer.world.first:
        report |= _write(request, course, report)
    course.trainer.world.barrier()
    return report


def _report(course: Course) -> dict[str, Any]:
    trainer, healing = course.trainer, course.trainer.healing
    where = trainer.where
    report: dict[str, Any] = {
        "name": healing.name,
        "seed": healing.seed,
        "compute": healing.compute,
        "steps": where.total_steps,
        "all_steps": trainer.all_steps,
        "tokens": where.tokens,
        "seconds": where.seconds,
        "tokens_per_second": where.tokens / max(where.seconds, 1e-9),
        "processes": trainer.world.size,
        "trained_parameters": sum(t.master.numel() for t in trainer.trained),
        "ledger": where.ledger,
        "judged_contexts": len(course.judge.contexts),
        "asked_contexts": healing.judge.contexts,
        "start": None if course.start is None else course.start.as_dict(),
        "best": None if course.best is None else course.best.as_dict(),
    }
    if healing.pretraining_tokens:
        report["pretraining_frac"] = where.tokens / healing.pretraining_tokens
    return report


def _write(request: Request, course: Course, report: dict[str, Any]) -> dict[str, Any]:
    """The healed folder, from the best weights; the work folder keeps difference and log."""
    if course.best_tensors is None:
        raise UsageError(
            f"{course.folder}: no weights were kept: recall fell at every measurement",
            hint="see log.jsonl there; train with more recall data, or a lower rate",
        )
    file = course.folder / DIFFERENCE
    save_difference(file, course.best_tensors, source_fingerprint(converted_folder(request.model)))

    def also(folder: Path) -> None:
        shutil.copy(course.log.path, folder / "healing.jsonl")
        if (course.folder / "healing.png").exists():
            shutil.copy(course.folder / "healing.png", folder)
        settings = course.trainer.healing.model_dump(mode="json")
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        (folder / "healing.yaml").write_text(text, encoding="utf-8")

    facts = {k: v for k, v in report.items() if k != "done"}
    _healed_folder(request, course.best_tensors, facts, also)
    shutil.rmtree(course.folder / "checkpoint", ignore_errors=True)
    return {"difference": str(file), "difference_bytes": file.stat().st_size}


def apply(request: Request, difference: Path) -> dict[str, Any]:
    """Heal without training: put the difference that a course left into its converted model.

    Args:
        request: Which converted folder, and where to; without data.
        difference: From a course, ``OUT.healing/difference.safetensors``. The weights are bit for
            bit those of the course; half-lives of far memories are not trained, so they are
            the converted folder's.

    Raises:
        DataError: The difference belongs to another model.
        UsageError: The folder may not be written.
    """
    check_out(request.out, request.model, request.force)
    source = converted_folder(request.model)
    trained = load_difference(difference, source_fingerprint(source))
    facts: dict[str, Any] = {"name": f"difference {difference.name}", "applied": True}
    _healed_folder(request, trained, facts, lambda _: None)
    return facts | {"difference_bytes": difference.stat().st_size}


def _healed_folder(
    request: Request,
    trained: Mapping[str, Tensor],
    facts: dict[str, Any],
    also: Callable[[Path], None],
) -> None:
    """The converted folder with other weights, and a report that says so."""
    source = converted_folder(request.model)
    before = read_json(source.path / "report.json")
    weights = merge({name: source.read(name) for name in source.stored_as}, trained)
    plan = plan_as_it_is(source, trained_spikes(source.config.spikes, trained))

    def finish(folder: Path) -> dict[str, Any]:
        also(folder)
        names = ("source", "source_sha256", "calibration")
        kept: dict[str, Any] = {name: before[name] for name in names if name in before}
        if plan.config.spikes is not None:
            original = fast_decoder(original_of(source, request.original), dtype="bf16")
            decoder = fast_copy(plan.config, weights)
            kept["spikes"] = recount(decoder, original, load_tokenizer(source))
        return kept | {"converted_fingerprint": before["fingerprint"], "healing": facts}

    convert(plan, request.out, force=request.force, healed=weights, also=finish)
