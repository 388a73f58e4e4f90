"""Verbs about documents: read once, ask many."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from respike.cli.bench import cache_folder
from respike.cli.show import (
    device_option,
    echo_json,
    human_bytes,
    json_option,
    load_options,
    number_option,
    pairs,
    progress,
    refuse_existing,
    run_options,
    threads_option,
)
from respike.cli.talk import sampling_of, sampling_options, stdin_text
from respike.errors import UsageError


@click.command("read")
@click.argument("model")
@click.argument("files", nargs=-1, required=True)
@click.option(
    "-o", "--out", "out", required=True, type=click.Path(path_type=Path), help="The state file."
)
@click.option("--append", is_flag=True, help="Go on from what is in the state file already.")
@click.option("--force", is_flag=True, help="Replace the state file; start anew.")
@click.option("--dry-run", is_flag=True, help="Say what it will need, and stop.")
@click.option(
    "--checkpoint-seconds",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    metavar="S",
    help="Keep what is read at most this often; a killed run goes on from there.",
)
@run_options
@json_option
def read_command(model: str, files: tuple[str, ...], out: Path, **options: Any) -> None:
    """Read FILES into a state file, to ask about them with `respike ask`.

    FILES are text, Markdown, HTML, PDF, JSON Lines, Parquet, folders of these, or - for stdin. The
    same command goes on after it was killed. The state file holds what was read: keep it private.
    """  # fmt: skip
    from respike.device import set_threads
    from respike.documents import Keeper, load_reading, open_sources, read
    from respike.loading import load

    threads = set_threads(options["threads"])
    base_facts = _check_out(out, options)
    sources = open_sources(list(files), sys.stdin.buffer)
    found = _estimate(model, sources, base_facts, threads, out, options)
    if options["dry_run"]:
        if options["as_json"]:
            echo_json({"estimate": found.facts()})
        return
    with progress(f"loading {model}") as step:
        loaded = load(model, **load_options(options), progress=step)
    keeper = Keeper(out, loaded.fingerprint, options["checkpoint_seconds"])
    if options["force"]:
        keeper.partial.unlink(missing_ok=True)
    base = load_reading(out, loaded) if options["append"] else None
    kept = keeper.take_up(loaded)
    if kept is not None:
        click.echo(f"going on after {kept.num_tokens:,} tokens: {keeper.partial}", err=True)
    before = base.num_tokens if base else 0
    began = time.perf_counter()
    with _reading_progress(found.tokens and before + found.tokens) as tell:
        reading = read(loaded, sources, base=base, kept=kept, keep=keeper, step=tell)
    seconds = time.perf_counter() - began
    resumed = kept.num_tokens if kept else before
    keeper.finish(reading)
    facts = reading.facts() | {
        "path": str(out),
        "file_bytes": out.stat().st_size,
        "seconds": seconds,
        "tokens_read": reading.num_tokens - resumed,
        "growth_bytes_per_token": _growth(loaded),
        "estimate": found.facts(),
    }
    if options["as_json"]:
        echo_json(facts)
    else:
        click.echo(_read_text(facts), err=True)


def _check_out(out: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """Facts of the reading to append to, if there is to be one."""
    from respike.documents import read_facts

    if options["append"] and options["force"]:
        raise UsageError("--append goes on from a file, --force replaces it: choose one")
    if options["append"]:
        if not out.is_file():
            raise UsageError(f"{out}: no such file to append to", hint="leave out --append")
        return read_facts(out)
    refuse_existing([out], options["force"])
    return None


def _estimate(
    model: str,
    sources: Any,
    base: dict[str, Any] | None,
    threads: int,
    out: Path,
    options: dict[str, Any],
) -> Any:
    from respike.checkpoint import open_checkpoint
    from respike.device import dtype_name
    from respike.documents.estimate import available_memory, check_disk, count_tokens, estimate
    from respike.loading import load_tokenizer

    source = open_checkpoint(model)
    with progress("measuring this machine"):
        tokens = count_tokens(sources, load_tokenizer(source))
        already = base["tokens"] if base else 0
        how = load_options(options)
        how["dtype"] = how["dtype"] or dtype_name(source.stored_dtype)
        found = estimate(source.config, tokens, already, threads, how, cache_folder())
    click.echo(_estimate_text(found), err=True)
    check_disk(out, found)
    available = available_memory()
    if available and found.memory_bytes and found.memory_bytes > available:
        click.echo(
            f"warning: about {human_bytes(found.memory_bytes)} of memory are needed, "
            f"{human_bytes(available)} are free",
            err=True,
        )
    return found


def _estimate_text(found: Any) -> str:
    if found.tokens is None:
        return "estimate: none, as nobody knows how long stdin is"
    return (
        f"estimate: {found.tokens:,} tokens, {_duration(found.seconds)}, "
        f"{human_bytes(found.memory_bytes)} of memory, {human_bytes(found.disk_bytes)} of disk"
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _growth(model: Any) -> int:
    from respike.account import growth_bytes_per_token

    return growth_bytes_per_token(model.config, model.decoder.embedding.element_size())


def _read_text(facts: dict[str, Any]) -> str:
    speed = facts["tokens_read"] / facts["seconds"] if facts["seconds"] else 0.0
    growth = facts["growth_bytes_per_token"]
    size = human_bytes(facts["state_bytes"])
    state = f"{size}, the same at any length"
    if growth:
        state = f"{size}, growing by {growth:,} bytes a token"
    rows = [
        ("tokens", f"{facts['tokens']:,}, of which {facts['tokens_read']:,} now"),
        ("time", f"{_duration(facts['seconds'])}, {speed:,.0f} tokens/s"),
        ("state", state),
        ("file", f"{facts['path']}, {human_bytes(facts['file_bytes'])}"),
    ]
    return pairs(rows)


@contextmanager
def _reading_progress(total: int | None) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal: tokens, tokens a second, time left, bytes of state."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("reading"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} tokens"),
        TextColumn("{task.fields[speed]:,.0f}/s"),
        TimeRemainingColumn(),
        TextColumn("state {task.fields[state]}"),
    )
    began, first = time.perf_counter(), 0
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total, speed=0.0, state="-")

        def tell(tokens: int, state_bytes: int) -> None:
            nonlocal first, began
            if not first:  # what was read before does not count, nor does the first chunk
                first, began = tokens, time.perf_counter()
            passed = time.perf_counter() - began
            speed = (tokens - first) / passed if tokens > first else 0.0
            left = max(total or 0, tokens) if total else None
            bar.update(
                task, completed=tokens, total=left, speed=speed, state=human_bytes(state_bytes)
            )

        yield tell


def least_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--least-evidence and --least-confidence, for `given_least`."""
    for name, what in (
        ("confidence", "Mean log-probability of a token an answer must have, likewise."),
        ("evidence", "How much likelier a token the document must make an answer, else it was not "
                     "found."),
    ):  # fmt: skip
        command = click.option(f"--least-{name}", type=float, metavar="NATS", help=what)(command)
    return command


def given_least(options: dict[str, Any]) -> Any:
    """What `least_options` say."""
    from respike.documents.judging import Least

    given = {name: options[f"least_{name}"] for name in ("evidence", "confidence")}
    return Least(**{name: value for name, value in given.items() if value is not None})


@click.command("ask")
@click.argument("state", type=click.Path(path_type=Path))
@click.argument("question")
@click.option("--model", metavar="MODEL", help="Where the model is, if it moved.")
@least_options
@click.option("--always-answer", is_flag=True, help="Never say that it was not found.")
@number_option("--passages", 3, "Passages to name that the answer leaned on.", least=0)
@sampling_options
@device_option
@threads_option
@json_option
def ask_command(state: Path, question: str, **options: Any) -> None:
    """Ask about what `respike read` read into STATE, which stays as it is.

    The answer streams to stdout; what it leaned on goes to stderr. QUESTION may be - for stdin.
    """  # fmt: skip
    from respike.device import set_threads
    from respike.documents import load_model_of, load_reading
    from respike.documents.asking import ask

    sampling, least = sampling_of(options), _least(options)
    if question == "-":
        question = stdin_text()
    set_threads(options["threads"])
    with progress(f"loading {state}") as step:
        model = load_model_of(state, options["model"], device=options["device"], progress=step)
        reading = load_reading(state, model)
    asking = ask(
        model,
        reading,
        question,
        max_tokens=options["max_tokens"],
        sampling=sampling,
        stop=options["stop"],
        least=least,
        num_passages=options["passages"],
    )
    for piece in asking:
        if not options["as_json"]:
            click.echo(piece, nl=False)
    if options["as_json"]:
        echo_json({"question": question, "state": str(state), **asking.answer.facts()})
        return
    click.echo()
    if options["passages"]:
        click.echo(_leaned_text(asking.answer, reading.model["recipe"]), err=True)


def _least(options: dict[str, Any]) -> Any:
    if not options["always_answer"]:
        return given_least(options)
    for name in ("confidence", "evidence"):
        if options[f"least_{name}"] is not None:
            raise UsageError(f"--least-{name} means nothing with --always-answer")
    return None


def _leaned_text(answer: Any, recipe: str) -> str:
    """What a person is told of where an answer comes from."""
    if not answer.found:
        return (
            f"evidence {answer.evidence:.2f} (at least {answer.least.evidence:.2f}), confidence "
            f"{answer.confidence:.2f} (at least {answer.least.confidence:.2f}) nats a token; "
            f"it would have said: {answer.withheld}"
        )
    if not answer.retrieval:
        return (
            f"passages: none to name; recipe {recipe!r} has no retrieval groups, so nothing "
            "in the model points back into the document"
        )
    rows = [
        f"{p.share:5.1%}  {p.source}, {p.unit} {p.place} (byte {p.byte}): {p.text[:160]}"
        for p in answer.passages
    ]
    return "\n".join(["leaned on:", *rows])
