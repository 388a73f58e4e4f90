"""How things look: tables, progress bars, JSON, and the options that many verbs share."""

import json
import os
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from respike.errors import BackendError, UsageError

Command = TypeVar("Command", bound=Callable[..., Any])


threads_option = click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="Processor threads.  [default: all]"
)


BUILTIN = "Python's language reference (built in)"


def data_option(purpose: str) -> Callable[[Command], Command]:
    """Which text: files, or the built-in one."""
    return click.option(
        "--data",
        multiple=True,
        type=click.Path(),
        help=f"{purpose}; repeatable.  [default: {BUILTIN}]",
    )


weights_option = click.option(
    "--weights",
    type=click.Choice(["stored", "int8", "int4"]),
    default="stored",
    show_default=True,
    help="Round the model's linear layers; int4 keeps the head at int8.",
)


device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="cpu, auto, or a device that `respike doctor` lists.",
)


def device_options(command: Command) -> Command:
    """How a model is run, whatever it is: threads, dtype, device."""
    for option in (
        threads_option,
        click.option(
            "--dtype", metavar="NAME", help="f32, bf16 or f16.  [default: the checkpoint's]"
        ),
        device_option,
    ):
        command = option(command)
    return command


def run_options(command: Command) -> Command:
    """Options of every verb that runs a model as fast as it can: how, never what."""
    return device_options(weights_option(command))


def number_option(
    name: str, default: int, help: str, *, least: int = 1
) -> Callable[[Command], Command]:
    """An option that takes a count of at least ``least``."""
    kind = click.IntRange(least)
    return click.option(name, default=default, show_default=True, type=kind, metavar="N", help=help)


def given(name: str) -> bool:
    """Whether the running command's option was typed, and is not its default."""
    context = click.get_current_context()
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def refuse_unused(names: Container[str], why: str) -> None:
    """Refuse an option of the running command that was typed and means nothing; ``why`` says."""
    for option in click.get_current_context().command.params:
        if option.name in names and given(option.name):
            raise UsageError(f"{option.opts[0]} means nothing {why}")


def load_options(options: dict[str, Any]) -> dict[str, Any]:
    """What `run_options` says to `respike.load`."""
    return {name: options[name] for name in ("device", "dtype", "weights")}


def text_of(model: Any, options: dict[str, Any]) -> Any:
    """The text that ``--data`` and its lengths name, as contexts of a model's tokens (N, T)."""
    from respike.text import contexts

    return contexts(
        options["data"],
        model.tokenizer,
        context_tokens=options["context_tokens"],
        max_tokens=options["max_tokens"],
    )


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def echo_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain table: columns as wide as needed, numbers to the right."""
    cells = [list(header), *[[str(c) for c in row] for row in rows]]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(c[:1].isdigit() or c[:1] in "-+" for c in column[1:]) for column in columns]
    lines = [
        "  ".join(
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
        )
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def pairs(rows: Sequence[tuple[str, object]]) -> str:
    """Names and values, aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def human_bytes(count: int) -> str:
    """Such as 256.5 MiB."""
    size: float = count
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} B" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


@contextmanager
def progress(label: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr while the block runs; silent when stderr is not a terminal.

    Call what it yields with (done, total), and with what runs if that changes.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label, total=None)

        def step(done: int, total: int, what: str = label) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield step


def refuse_existing(paths: Sequence[Path], force: bool) -> None:
    """Before minutes of measuring, not after."""
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path}: is a folder, expected a file to write")
        if path.exists() and not force:
            raise UsageError(f"{path}: already exists", hint="add --force to replace it")
        if not path.parent.is_dir():
            raise UsageError(f"{path}: its folder does not exist")
        if not os.access(path.parent, os.W_OK):
            raise UsageError(f"{path}: its folder is not writable")


def need_matplotlib(what: str, otherwise: str) -> None:
    """Likewise: say now that ``what`` cannot be drawn, and what to do ``otherwise``."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise BackendError(
            f"{what} needs matplotlib, which is not installed",
            hint=f"run `pip install 'respike[plot]'`, or {otherwise}",
        )
