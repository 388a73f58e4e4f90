"""Verbs about speed: bench, plan."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from respike.cli.bench_text import bench_text, cold_text, plan_text
from respike.cli.show import (
    echo_json,
    json_option,
    need_matplotlib,
    number_option,
    progress,
    refuse_existing,
    threads_option,
    weights_option,
)
from respike.errors import UsageError

WEIGHTS = ("bf16", "int8", "int4")


def cache_folder() -> Path:
    """Where what costs time to make is kept, as other programs do it."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "respike"


def bench_options(command: Any) -> Any:
    """Of bench, in the order of its help."""
    lengths = "1k,2k,4k,8k"
    for option in reversed(
        (
            click.option(
                "--vs", "peers", multiple=True, metavar="PEER",
                help="original, transformers, llama.cpp, or rwkv7 (in llama.cpp, random weights); "
                "repeatable.",
            ),
            click.option(
                "--lengths", default=lengths, show_default=True, metavar="N,N...",
                help="Tokens read, such as 512, 64k, 1M.",
            ),
            number_option("--decode", 32, "Decoding steps timed after each."),
            number_option("--repeats", 3, "Of each point; above 10 minutes, once."),
            click.option(
                "--time-limit", default=10.0, show_default=True, metavar="MINUTES",
                type=click.FloatRange(0, min_open=True),
                help="Of a point; what takes longer is fitted.",
            ),
            threads_option,
            click.option(
                "--dtype", metavar="NAME", help="f32, bf16 or f16.  [default: the checkpoint's]"
            ),
            weights_option,
            click.option(
                "--original", type=click.Path(), metavar="PATH",
                help="What MODEL was converted from.  [default: looked for beside it]",
            ),
            click.option(
                "--shape", metavar="NAME",
                help="Instead of MODEL: smollm2-135m, qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-7b or "
                "qwen3-4b with random weights.",
            ),
            click.option(
                "--recipe", metavar="RECIPE", help="Of --shape.  [default: constant]"
            ),
            click.option(
                "--quality/--no-quality", default=True, show_default=True,
                help="KL and recall of the same folder, at the same lengths.",
            ),
            number_option("--quality-cap", 2048, "Longest length for --quality.", least=64),
            click.option("--cold-start", is_flag=True, help="Start to first token, by step."),
            click.option(
                "--peer-python", default=sys.executable, metavar="PYTHON", show_default="this one",
                help="Interpreter that has the peers' packages.",
            ),
            click.option(
                "--peer-setting", "peer_settings", multiple=True, metavar="TEXT",
                help="Of a peer's settings only those that have TEXT in their name, such as "
                "'q8_0, flash on, f16'; repeatable.  [default: all]",
            ),
            click.option(
                "-o", "out", type=click.Path(), metavar="OUT.json",
                help="Results, point by point; the same call goes on where it was.",
            ),
            click.option("--plot", type=click.Path(), metavar="FILE.png", help="Draw it."),
            click.option("--force", is_flag=True, help="Replace the file of --plot."),
            json_option,
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.command("bench")
@click.argument("model", required=False)
@bench_options
def bench_command(model: str | None, **options: Any) -> None:
    """Time to first token, prefill, decoding and memory of MODEL against length.

    Every point has a process of its own, and contenders take turns. No speed is printed if a kernel
    differs from its definition, or our engine on the original weights from a peer.
    """
    subject = _subject(model, options)
    settings, run = _settings(options)
    plot = _plot_path(options)
    from respike.bench.contenders import check_peers
    from respike.bench.run import bench, cold_start

    check_peers(options["peers"], subject)
    out = Path(options["out"]) if options["out"] else None
    if out is not None:
        refuse_existing([out], force=True)
    with progress("bench") as step:
        if options["cold_start"]:
            found = cold_start(subject, settings, run, step)
        else:
            found = bench(
                subject, options["peers"], settings, run,
                quality_cap=options["quality_cap"] if options["quality"] else None,
                out=out, report=step,
            )  # fmt: skip
    if plot is not None:
        _draw(found, plot)
    if options["as_json"]:
        echo_json(found)
    else:
        click.echo(cold_text(found) if options["cold_start"] else bench_text(found))
    if not options["cold_start"] and not found["rows"]:
        click.echo("error: nothing could be measured; see the reasons above", err=True)
        sys.exit(1)


def _subject(model: str | None, options: dict[str, Any]) -> Any:
    from respike.bench.contenders import Subject
    from respike.bench.shapes import shape_config
    from respike.recipe import load_recipe

    if (model is None) == (options["shape"] is None):
        raise UsageError("give either MODEL or --shape NAME")
    if model is not None and options["recipe"] is not None:
        raise UsageError("--recipe belongs to --shape; MODEL is what it is")
    if options["shape"] is not None:
        if options["original"] is not None:
            raise UsageError("--original means nothing to --shape")
        shape_config(options["shape"])
        load_recipe(options["recipe"] or "constant")
        return Subject(shape=options["shape"], recipe=options["recipe"] or "constant")
    assert model is not None
    original = Path(options["original"]) if options["original"] else None
    return Subject(path=Path(model), original=original)


def _settings(options: dict[str, Any]) -> tuple[Any, Any]:
    from respike.bench.run import Run
    from respike.bench.session import Settings, parse_lengths
    from respike.device import get_dtype, set_threads

    if options["dtype"] is not None:
        get_dtype(options["dtype"])
    settings = Settings(
        lengths=parse_lengths(options["lengths"]),
        repeats=options["repeats"],
        decode_tokens=options["decode"],
        threads=set_threads(options["threads"]),
        max_seconds=60 * options["time_limit"],
    )
    run = Run(
        options["dtype"], options["weights"], options["peer_python"], cache_folder(),
        options["peer_settings"],
    )  # fmt: skip
    return settings, run


def _plot_path(options: dict[str, Any]) -> Path | None:
    if options["plot"] is None:
        if options["force"]:
            raise UsageError("--force means nothing without --plot")
        return None
    path = Path(options["plot"])
    if path.suffix != ".png":
        raise UsageError(f"--plot {path}: expected a name that ends in .png")
    if options["cold_start"]:
        raise UsageError("--plot means nothing to --cold-start")
    refuse_existing([path], options["force"])
    need_matplotlib("--plot", "leave it out")
    return path


def _draw(found: dict[str, Any], path: Path) -> None:
    from respike.bench.plot import draw
    from respike.bench.run import quoted

    if found["rows"]:
        draw(found["rows"], found["fitted"], quoted(found), path)
        click.echo(f"wrote {path}", err=True)


@click.command("plan")
@click.argument("recipe")
@click.option(
    "--target",
    required=True,
    metavar="NAME-or-MODEL",
    help="smollm2-135m, qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-7b, qwen3-4b, or a model on disk.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the recipe, such as beside.projections=shared; repeatable.",
)
@click.option(
    "--length",
    "lengths",
    default="8k,64k,1M",
    show_default=True,
    metavar="N,N...",
    help="Tokens to read.",
)
@click.option(
    "--weights",
    default="bf16",
    show_default=True,
    type=click.Choice(WEIGHTS),
    help="How weights are stored.",
)
@threads_option
@click.option(
    "--ranks",
    default="1,8,64",
    show_default=True,
    metavar="N,N...",
    help="Numbers of devices that share the model (FSDP2).",
)
@click.option("--plot", metavar="FILE", help="Draw state, work and traffic against length (.png).")
@click.option("--force", is_flag=True, help="Replace the plot.")
@click.option("--no-time", is_flag=True, help="Count only: measure nothing on this machine.")
@click.option("--fresh", is_flag=True, help="Measure this machine again.")
@json_option
def plan_command(recipe: str, target: str, **options: Any) -> None:
    """What a conversion by RECIPE would need: parameters, bytes, FLOPs, minutes on this machine.

    Nothing is read but a config. Minutes come from a few seconds' measurement of some layers with
    random weights, kept for an hour.
    """  # fmt: skip
    from respike.bench.plan import plan
    from respike.bench.session import parse_lengths
    from respike.device import set_threads

    plot = options["plot"]
    if plot is not None:
        if not plot.endswith(".png"):
            raise UsageError(f"--plot {plot}: expected a name that ends in .png")
        need_matplotlib("the plot", "leave out --plot")
        refuse_existing([Path(plot)], options["force"])
    found = plan(
        recipe,
        target,
        parse_lengths(options["lengths"]),
        weights=options["weights"],
        threads=set_threads(options["threads"]),
        cache_folder=None if options["no_time"] else cache_folder(),
        overrides=options["overrides"],
        ranks=_ranks(options["ranks"]),
        fresh=options["fresh"],
    )
    if plot is not None:
        from respike.bench.plan_plot import draw

        draw(found, Path(plot))
        click.echo(f"wrote {plot}", err=True)
    if options["as_json"]:
        echo_json(found)
    else:
        click.echo(plan_text(found))


def _ranks(text: str) -> list[int]:
    counts = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    if not all(0 < count <= 1 << 20 for count in counts):
        raise UsageError(f"--ranks {text!r}: expected numbers of devices, such as 1,8,64")
    return counts
