"""The verb serve."""

from pathlib import Path
from typing import Any

import click

from respike.cli.document import given_least, least_options
from respike.cli.show import human_bytes, load_options, number_option, progress, run_options

MIB = 1 << 20


@click.command("serve")
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535),
              help="0 takes any that is free.")  # fmt: skip
@click.option(
    "--api-key",
    envvar="RESPIKE_API_KEY",
    metavar="KEY",
    help="What clients must send.  [default: $RESPIKE_API_KEY; none]",
)
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Offer what `respike read` has read; repeatable.",
)
@number_option("--max-streams", 32, "Answers that are made at once.")
@number_option("--max-waiting", 64, "Requests that may wait.", least=0)
@number_option("--max-prompt-tokens", 131_072, "Of one request, its document apart.")
@number_option("--max-output-tokens", 16_384, "Of one answer.")
@number_option("--max-state-mib", 4096, "State of all answers at their longest.")
@number_option("--max-document-mib", 64, "Size of an uploaded document.")
@number_option("--max-documents-mib", 4096, "State of all documents.")
@number_option("--prefix-mib", 1024, "State of prompts read before, kept for the next.", least=0)
@least_options
@number_option("--timeout", 600, "Seconds a request may take.")
@run_options
def serve_command(model: str, **options: Any) -> None:
    """Serve MODEL to programs that speak OpenAI's API, and a page to people.

    Only this machine can reach it unless --host says otherwise, which needs an API key. Prompts and
    documents stay in memory: none is logged or written. SIGINT or SIGTERM ends it, running answers
    first.
    """  # fmt: skip
    from respike.server.run import check_extra, check_host, is_loopback, serve

    check_extra()
    host, key = options["host"], options["api_key"] or None
    check_host(host, key)
    from respike.device import set_threads
    from respike.loading import load
    from respike.server.settings import Settings

    # Without a key, a web page must not reach the server by a name of its own.
    hosts = ("localhost", "127.0.0.1", "::1", host) if key is None and is_loopback(host) else ()
    settings = Settings(
        api_key=key,
        hosts=hosts,
        max_streams=options["max_streams"],
        max_waiting=options["max_waiting"],
        max_state_bytes=options["max_state_mib"] * MIB,
        max_prompt_tokens=options["max_prompt_tokens"],
        max_output_tokens=options["max_output_tokens"],
        max_document_bytes=options["max_document_mib"] * MIB,
        max_documents_bytes=options["max_documents_mib"] * MIB,
        prefix_bytes=options["prefix_mib"] * MIB,
        timeout_seconds=options["timeout"],
        least=given_least(options),
    )
    set_threads(options["threads"])
    with progress(f"loading {model}") as step:
        loaded = load(model, **load_options(options), progress=step)

    def ready(address: str, documents: list[Any]) -> None:
        click.echo(f"serving {loaded.path} at {address}", err=True)
        click.echo(f"page    {address}/", err=True)
        click.echo(f"API     {address}/v1  (key: {'required' if key else 'none'})", err=True)
        for document in documents:
            size = human_bytes(document.state_bytes)
            click.echo(f"document {document.id}  {document.name}, {size}", err=True)

    serve(loaded, host, options["port"], settings, states=list(options["states"]), ready=ready)
