"""The recall half of eval: its options, what is measured in which order, and its tables."""

from pathlib import Path
from typing import Any

import click

from respike.cli.show import need_matplotlib, number_option, progress, refuse_existing, table
from respike.errors import UsageError

SHORT = {"memory_off": "mem off", "window_off": "win off"}
"""Headers of the columns that have no interval; the truncated original's names its window."""


def recall_options(command: Any) -> Any:
    """Which tasks, on how many trials, in which columns."""
    for option in (
        click.option("--force", is_flag=True, help="Replace the file of --plot."),
        click.option(
            "--plot",
            type=click.Path(),
            metavar="FILE.png",
            help="Draw the recall tasks: maps by depth and length, curves.",
        ),
        click.option(
            "--columns",
            "five",
            is_flag=True,
            help="Recall with --vs: also with memory off, with window off, and the original "
            "truncated to the window.",
        ),
        click.option(
            "--max-length",
            type=click.IntRange(2),
            metavar="TOKENS",
            help="Leave out recall tasks that are longer.",
        ),
        click.option(
            "--seed",
            default=0,
            show_default=True,
            type=int,
            metavar="N",
            help="Of the recall tasks.",
        ),
        number_option("--trials", 20, "Repetitions of each recall task."),
        click.option(
            "--recall",
            "settings",
            multiple=True,
            default=("quick",),
            show_default=True,
            metavar="SUITE|TASK",
            help="quick, complete, or one task: copy:LAG, passkey:LENGTH[:DEPTH], "
            "needles:LENGTH[:DEPTH], multi-needle:LENGTH, questions:LENGTH, "
            "variables:LENGTH[:HOPS], multi-query:PAIRS; repeatable.",
        ),
    ):
        command = option(command)
    return command


def check_recall_options(original: str | None, options: dict[str, Any]) -> None:
    """What can be refused before any model is loaded."""
    from respike.evaluation.columns import WINDOW_TOKENS
    from respike.evaluation.suites import tasks_of

    if options["five"] and original is None:
        raise UsageError("--columns needs --vs ORIGINAL to compare with")
    if options["force"] and options["plot"] is None:
        raise UsageError("--force means nothing without --plot")
    tasks_of(options["settings"], WINDOW_TOKENS)
    if options["plot"] is not None:
        path = Path(options["plot"])
        if path.suffix != ".png":
            raise UsageError(f"--plot {path}: expected a name that ends in .png")
        refuse_existing([path], options["force"])
        need_matplotlib("--plot", "leave it out")


def measure_recall(loaded: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Every task in every column.

    Args:
        loaded: ``model`` and, where there is one, ``original``.
        options: Of the command.
    """
    from respike.evaluation import Vocabulary
    from respike.evaluation.columns import Column, five_columns, row, window_tokens
    from respike.tasks import make_trials

    window = window_tokens(loaded["model"].config)
    vocabulary = Vocabulary(loaded["model"].tokenizer)
    tasks, dropped = _tasks(vocabulary, window, options)
    for task in tasks:
        make_trials(vocabulary, task, 1)  # one that cannot be asked: refuse it now, not in an hour
    columns = [Column(name, model.decoder) for name, model in loaded.items()]
    if options["five"]:
        columns = five_columns(loaded["original"].decoder, loaded["model"].decoder, window)
    missing = {column.name: column.missing for column in columns if column.missing}
    rows = []
    for task in tasks:
        scores = {}
        for column in columns:
            if column.name in missing:
                continue
            with progress(f"{task.name}, {column.name}") as step:
                scores[column.name] = column.score(
                    vocabulary,
                    task,
                    trials=options["trials"],
                    seed=options["seed"],
                    progress=step,
                )
        rows.append(row(task, scores))
    if options["plot"] is not None:
        from respike.evaluation.recall_plot import draw

        draw(rows, Path(options["plot"]))
        click.echo(f"wrote {options['plot']}", err=True)
    return {
        "seed": options["seed"],
        "window_tokens": window,
        "dropped": [task.name for task in dropped],
        "missing": missing,
        "rows": rows,
    }


def _tasks(vocabulary: Any, window: int, options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    from respike.evaluation.suites import split_by_length, tasks_of

    tasks, limit = tasks_of(options["settings"], window), options["max_length"]
    if limit is None:
        return tasks, []
    tasks, dropped = split_by_length(vocabulary, tasks, limit)
    if not tasks:
        raise UsageError(f"--max-length {limit}: all {len(dropped)} recall tasks are longer")
    if dropped:
        names = ", ".join(task.setting for task in dropped)
        click.echo(f"left out {len(dropped)} tasks longer than {limit} tokens: {names}", err=True)
    return tasks, dropped


def recall_text(report: dict[str, Any], five: bool) -> str:
    """The table, and what has to be known to read it."""
    rows = report["rows"]
    lines = [_five_table(report) if five else _plain_table(rows)]
    notes = [f"{name.replace('_', ' ')}: {why}" for name, why in report["missing"].items()]
    if five:
        notes.insert(0, f"accuracy in %, {rows[0]['trials']} trials a task, (95 % intervals)")
    if not all(row.get("evidence", True) for row in rows):
        notes.append("* no evidence: the original itself scores under 80 %")
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _plain_table(rows: list[dict[str, Any]]) -> str:
    header = ["task", "trials", "chance", "accuracy", "95 % interval", "nats"]
    versus = "original_accuracy_frac" in rows[0]
    if versus:
        header += ["original", "95 % interval", "lost", "95 % interval"]
    cells = []
    for r in rows:
        cells.append([_marked(r, "task"), r["trials"], f"{r['chance_frac']:.2g}"])
        cells[-1] += [f"{r['model_accuracy_frac']:.3f}", _interval(r["model_accuracy_95"])]
        cells[-1] += [f"{r['model_answer_nats']:.3f}"]
        if versus:
            cells[-1] += [f"{r['original_accuracy_frac']:.3f}"]
            cells[-1] += [_interval(r["original_accuracy_95"])]
            cells[-1] += [f"{r['lost_frac']:.3f}", _interval(r["lost_95"])]
    return table(header, cells)


def _marked(row: dict[str, Any], name: str) -> str:
    return f"{row[name]}{'' if row.get('evidence', True) else ' *'}"


def _interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def _five_table(report: dict[str, Any]) -> str:
    last = f"last {report['window_tokens']}"
    header = ["task", "chance", "original", "converted", *SHORT.values(), last, "lost"]
    cells = [
        [
            _marked(r, "setting"),
            f"{100 * r['chance_frac']:.2g}",
            *(
                _percent(r[f"{n}_accuracy_frac"], r[f"{n}_accuracy_95"])
                for n in ("original", "model")
            ),
            *(_percent(r.get(f"{name}_accuracy_frac")) for name in (*SHORT, "truncated")),
            _percent(r["lost_frac"], r["lost_95"]),
        ]
        for r in report["rows"]
    ]
    return table(header, cells)


def _percent(value: float | None, ends: tuple[float, float] | None = None) -> str:
    if value is None:
        return "-"
    # A dash is shortest, but not between numbers that may be negative.
    between = ".." if ends and ends[0] < 0 else "-"
    interval = f" ({100 * ends[0]:.0f}{between}{100 * ends[1]:.0f})" if ends else ""
    return f"{100 * value:.0f}{interval}"
