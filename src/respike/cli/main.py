"""The program: one verb a library function, and the one place where errors become messages.

stdout carries data, stderr carries talk. Exit codes: 0 done, 1 failed or a check not met, 2 the
call was wrong, 130 interrupted.
"""

import io
import os
import signal
import sys
import traceback
from importlib import import_module
from typing import Any, NoReturn

import click

from respike.errors import RespikeError, did_you_mean

VERBS = {
    # verb -> (module, what --help says); the module is imported when the verb is used.
    "inspect": ("model", "What a model is: family, mixers, parameters, bytes, state."),
    "select": ("select", "Measure which KV groups carry recall; write a recipe."),
    "convert": ("convert", "Convert a model by a recipe."),
    "spikes": ("spikes", "Make a model spike; count every spike."),
    "corpus": ("corpus", "Build a training corpus from public packages."),
    "heal": ("heal", "Train a converted model to do what its original does."),
    "check": ("measure", "How far two models' predictions are apart."),
    "eval": ("measure", "Perplexity by position, or recall."),
    "generate": ("talk", "Continue a prompt."),
    "chat": ("talk", "Talk with a model."),
    "read": ("document", "Read documents once, into a state file."),
    "ask": ("document", "Ask about what was read."),
    "serve": ("serve", "Answer OpenAI's clients, and show a page."),
    "bench": ("bench", "Speed and memory against length, beside peers."),
    "plan": ("bench", "What a conversion needs: bytes, FLOPs, minutes here."),
    "export": ("export", "Write a model under the names that others read."),
    "recipes": ("model", "List the built-in recipes, or print one."),
    "doctor": ("model", "What can run here, and why the rest cannot."),
}


class Program(click.Group):
    """Loads a verb's module only when that verb runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order a person meets them."""
        del ctx
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, or None."""
        del ctx
        if cmd_name not in VERBS:
            return None
        module = import_module(f"respike.cli.{VERBS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb, or say which one was probably meant."""
        if args[0] not in VERBS and not args[0].startswith("-"):
            hint = did_you_mean(args[0], VERBS) or "run `respike --help` for the verbs"
            raise click.UsageError(f"no verb {args[0]!r}\nhint: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb. A reader of our output that goes away, as `| head` does, is no error."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # What is still buffered goes nowhere, or Python would complain while it shuts down.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, without importing any of them."""
        del ctx
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=False,
    subcommand_metavar="VERB [ARGS]...",
)
@click.version_option(package_name="respike", message="respike %(version)s")
@click.option("--debug", is_flag=True, help="Show a traceback with every error.")
def program(debug: bool) -> None:
    """Turn open-weights Transformers into hybrid linear-time models, and run them on a CPU.

    MODEL is a Hugging Face folder, a folder written by `respike convert`, or a .gguf file.
    """
    del debug  # read in main(), which also catches what fails before this runs


def main() -> NoReturn:
    """Run the command line and exit."""
    words = sys.argv[1:]
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    words = [w for w in options if w != "--debug"] + words[len(options) :]
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # no nohup
        signal.signal(signal.SIGHUP, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show it all shows a ?
    try:
        code = program.main(words or ["--help"], "respike", standalone_mode=False)
    except RespikeError as error:
        if debug:
            traceback.print_exc()
        _complain(str(error), error.hint)
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        if debug:
            traceback.print_exc()
        message, _, hint = error.format_message().partition("\nhint: ")
        verb = (
            error.ctx.command_path
            if isinstance(error, click.UsageError) and error.ctx
            else "respike"
        )
        _complain(message, hint or f"run `{verb} --help`")
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _terminate(number: int, _: object) -> NoReturn:
    """`kill`, `timeout`, a terminal that closes: ends the program as Ctrl-C does, and cleans up."""
    sys.exit(128 + number)


def _complain(message: str, hint: str | None) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
