"""The verb that trains: heal."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from respike.cli.show import (
    echo_json,
    human_bytes,
    json_option,
    need_matplotlib,
    pairs,
    progress,
    table,
    threads_option,
)


@click.command("heal")
@click.argument("model")
@click.argument("out")
@click.option(
    "--config",
    metavar="NAME|FILE",
    help="Built-in course (default, quick, spikes, ...) or YAML file.",
)
@click.option(
    "--data",
    multiple=True,
    type=click.Path(),
    help="Text to train on: files, folders, patterns; repeatable. See docs/corpus.md.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the course, such as stages.1.tokens=300000; repeatable.",
)
@click.option("--original", metavar="MODEL", help="Learn from this model.  [default: the source]")
@click.option(
    "--apply",
    "difference",
    type=click.Path(),
    help="Train nothing: put in a difference.safetensors that a course left.",
)
@click.option(
    "--leg-minutes",
    type=click.FloatRange(min=0),
    metavar="N",
    help="Stop after about N minutes of training; the same command goes on.",
)
@click.option("--dry-run", is_flag=True, help="Print the course and train nothing.")
@click.option("--plot/--no-plot", default=True, help="Draw the course, OUT/healing.png.")
@click.option("--force", is_flag=True, help="Replace OUT if respike wrote it.")
@threads_option
@json_option
def heal_command(model: str, out: str, **options: Any) -> None:
    """Train the converted MODEL to do what its original does; write the healed folder OUT.

    The original is the source that MODEL was converted from, or what --original names where that
    source is not in MODEL; of a MODEL that spikes, the same without its neurons. The course runs on
    all cores, in bf16 where this machine multiplies it and else in f32, and can be interrupted at
    any moment: OUT.healing holds where it stands, and the same command goes on from there.
    `torchrun --nproc-per-node N -m respike heal ...` shares the work.
    """
    from respike.device import set_threads
    from respike.healing import Request, apply, heal, load_healing, summary

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = set_threads(options["threads"])
    if options["threads"] is None:
        set_threads(max(1, threads // processes))
    quiet = os.environ.get("RANK", "0") != "0"
    request = Request(
        Path(model), Path(out), options["data"], options["original"], options["force"]
    )
    if options["difference"] is not None:
        _refuse_course_options(request.model, options)
        report = apply(request, Path(options["difference"]))
    else:
        if options["config"] is None:
            raise click.UsageError("--config is needed\nhint: try --config default")
        healing = load_healing(options["config"], options["overrides"])
        if options["dry_run"]:
            report = summary(request, healing)
        else:
            if options["plot"]:
                need_matplotlib("the plot of a course", "add --no-plot")
            with progress("healing") as step:
                report = heal(
                    request,
                    healing,
                    leg_minutes=options["leg_minutes"],
                    plot=options["plot"],
                    progress=step,
                )
    if quiet:  # the first of several processes talks
        return
    if options["as_json"]:
        echo_json(report)
    else:
        click.echo(_text(report))
    if options["dry_run"]:
        click.echo("nothing written (--dry-run)", err=True)
    elif report.get("done", True):
        click.echo(f"wrote {out}", err=True)
    else:
        click.echo("the leg is over; the same command goes on", err=True)


def _refuse_course_options(model: Path, options: Mapping[str, Any]) -> None:
    """What --apply would not look at."""
    from respike.healing.models import converted_folder

    given = {
        "--config": options["config"], "--data": options["data"], "--set": options["overrides"],
        "--leg-minutes": options["leg_minutes"] is not None, "--dry-run": options["dry_run"],
    }  # fmt: skip
    useless = [name for name, value in given.items() if value]
    if not useless and options["original"] and not converted_folder(model).config.spikes:
        useless = ["--original"]  # with spikes, it is what their silence is counted beside
    if useless:
        raise click.UsageError(
            f"--apply trains nothing, so {', '.join(useless)} would mean nothing: leave it out"
        )


def _text(report: dict[str, Any]) -> str:
    if "stages" in report:
        return _course(report)
    facts = [("course", report["name"])]
    if "steps" in report:
        facts += [
            ("steps", f"{report['steps']:,} of {report['all_steps']:,}"),
            ("tokens", f"{report['tokens']:,}{_share(report)}"),
            ("computes in", report["compute"]),
            ("minutes", f"{report['seconds'] / 60:.1f}"),
            ("tokens a second", f"{report['tokens_per_second']:.0f}"),
        ]
        judged, asked = report["judged_contexts"], report["asked_contexts"]
        if judged < asked:
            facts.append(("judged on", f"{judged} of {asked} contexts: no more held-out text"))
    if "difference_bytes" in report:
        facts.append(("difference", human_bytes(report["difference_bytes"])))
    verdicts = {name: v for name in ("start", "best") if (v := report.get(name)) is not None}
    header = ["weights", "KL, nats", "nats added", "recall", "nats an answer token"]
    rows = [
        [
            name,
            f"{v['kl_nats']:.4f}",
            f"{v['nats_added']:+.4f}",
            f"{100 * v['recall_frac']:.1f} %",
            f"{v['answer_nats']:.3f}",
        ]
        for name, v in verdicts.items()
    ]
    if any(v["skipped_frac"] is not None for v in verdicts.values()):
        header.append("skipped")
        for row, v in zip(rows, verdicts.values(), strict=True):
            row.append(f"{100 * v['skipped_frac']:.1f} %")
    return pairs(facts) + (f"\n\n{table(header, rows)}" if rows else "")


def _share(report: dict[str, Any]) -> str:
    share = report.get("pretraining_frac")
    return "" if share is None else f" ({100 * share:.2g} % of the original's pre-training)"


def _course(report: dict[str, Any]) -> str:
    rows = [
        (
            n,
            stage["kind"],
            f"{stage['tokens']:,}",
            stage["steps"],
            f"{stage['rows']} x {stage['context_tokens']}",
            ", ".join(f"{k} {v}" for k, v in stage["train"].items()) or "memories",
        )
        for n, stage in enumerate(report["stages"], start=1)
    ]
    header = ("stage", "kind", "tokens", "steps", "a step", "trains, beside memories")
    facts = pairs([("course", report["name"]), ("computes in", report["compute"])])
    return f"{facts}\n\n{table(header, rows)}"
