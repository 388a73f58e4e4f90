"""Verbs that produce text: generate, chat."""

import sys
from typing import Any

import click

from respike.cli.show import (
    echo_json,
    json_option,
    load_options,
    number_option,
    progress,
    run_options,
)
from respike.errors import UnsupportedError, UsageError


def sampling_options(command: Any) -> Any:
    """How the next token is chosen."""
    for option in (
        click.option(
            "--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable."
        ),
        click.option(
            "--seed",
            default=0,
            show_default=True,
            type=int,
            metavar="N",
            help="Equal seeds give equal text.",
        ),
        click.option(
            "--repetition-penalty",
            default=1.0,
            show_default=True,
            type=float,
            metavar="X",
            help="Above 1: words said before are less likely.",
        ),
        click.option(
            "--min-p",
            default=0.0,
            show_default=True,
            type=float,
            metavar="X",
            help="Least probability, as a share of the likeliest's.",
        ),
        click.option(
            "--top-p",
            default=1.0,
            show_default=True,
            type=float,
            metavar="X",
            help="Keep the likeliest tokens that together reach X.",
        ),
        number_option("--top-k", 0, "Keep the N likeliest tokens; 0 keeps all.", least=0),
        click.option(
            "--temperature",
            default=0.0,
            show_default=True,
            type=float,
            metavar="X",
            help="0 takes the likeliest token; 1 samples as the model predicts.",
        ),
        number_option("--max-tokens", 256, "Tokens to generate at most."),
    ):
        command = option(command)
    return command


def sampling_of(options: dict[str, Any]) -> Any:
    """What `sampling_options` say."""
    from respike.generation import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return Sampling(**{name: options[name] for name in names})


def _load(path: str, options: dict[str, Any]) -> Any:
    from respike.device import set_threads
    from respike.loading import load

    set_threads(options["threads"])
    with progress(f"loading {path}") as step:
        return load(path, **load_options(options), progress=step)


@click.command("generate")
@click.argument("model")
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Wrap PROMPT in the model's chat template.")
@sampling_options
@run_options
@json_option
def generate_command(model: str, prompt: str, chat: bool, **options: Any) -> None:
    """Continue PROMPT; `-` reads it from stdin. The text streams to stdout."""
    from respike.generation import stream

    sampling = sampling_of(options)
    if prompt == "-":
        prompt = stdin_text()
    if not prompt:
        raise UsageError("the prompt is empty: there is nothing to continue")
    loaded = _load(model, options)
    if chat:
        tokens = loaded.tokenizer.chat([{"role": "user", "content": prompt}])
    else:
        tokens = loaded.tokenizer.encode(prompt)
    text = stream(
        loaded, tokens, max_tokens=options["max_tokens"], sampling=sampling, stop=options["stop"]
    )
    for piece in text:
        if not options["as_json"]:
            click.echo(piece, nl=False)
    result = text.result
    if options["as_json"]:
        counts = {"prompt_tokens": len(tokens), "completion_tokens": len(result.tokens)}
        echo_json({"text": result.text, "finish_reason": result.finish_reason, **counts})
    else:
        click.echo()


def stdin_text() -> str:
    """All of stdin.

    Raises:
        UsageError: It is not UTF-8.
    """
    return _utf8(sys.stdin.buffer.read())


def _utf8(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text (byte {error.start})") from error


@click.command("chat")
@click.argument("model")
@click.option("--system", help="A system message.")
@sampling_options
@run_options
def chat_command(model: str, system: str | None, **options: Any) -> None:
    """Talk with MODEL. An empty line or Ctrl-D ends it; /new starts over."""
    sampling = sampling_of(options)
    loaded = _load(model, options)
    if loaded.tokenizer.chat_template is None:
        raise UnsupportedError(
            f"{model} has no chat template", hint="use `respike generate` with a plain prompt"
        )
    if sys.stdin.isatty():
        click.echo("An empty line or Ctrl-D ends the chat; /new starts over.", err=True)
    opening = [{"role": "system", "content": system}] if system else []
    messages, state = list(opening), None
    fed: list[int] = []  # what the state has seen
    while line := _ask():
        if line == "/new":
            messages, fed, state = list(opening), [], None
            continue
        messages.append({"role": "user", "content": line})
        tokens = loaded.tokenizer.chat(messages)
        if tokens[: len(fed)] != fed:  # the template rewrote what was said: read it all again
            fed, state = [], None
        result = _say(loaded, tokens[len(fed) :], state, sampling, options)
        state = result.state
        fed = (tokens + result.tokens)[: state.num_tokens]
        messages.append({"role": "assistant", "content": result.text})


def _ask() -> str:
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    return _utf8(sys.stdin.buffer.readline()).strip()


def _say(loaded: Any, tokens: list[int], state: Any, sampling: Any, options: dict[str, Any]) -> Any:
    from respike.generation import stream

    text = stream(
        loaded, tokens, max_tokens=options["max_tokens"], sampling=sampling,
        stop=options["stop"], state=state,
    )  # fmt: skip
    for piece in text:
        click.echo(piece, nl=False)
    click.echo()
    return text.result
