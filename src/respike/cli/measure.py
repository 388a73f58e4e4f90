"""Verbs that measure: check, eval."""

import platform
import sys
from typing import Any

import click

from respike.cli.continuation import (
    compare_continuations,
    continuation_text,
    generation_options,
    refuse_generation_options,
)
from respike.cli.recall import (
    check_recall_options,
    measure_recall,
    recall_options,
    recall_text,
)
from respike.cli.show import (
    BUILTIN,
    data_option,
    echo_json,
    json_option,
    load_options,
    number_option,
    progress,
    refuse_unused,
    run_options,
    table,
    text_of,
)
from respike.errors import DataError

AS_STORED = {"weights": "stored"}
"""--weights is about the model that is measured, never about what it is compared with."""


def text_options(command: Any) -> Any:
    """Which text, and how much of it."""
    for option in (
        number_option("--max-tokens", 8192, "Tokens of text in all.", least=2),
        number_option("--context-tokens", 2048, "Length of a piece of text.", least=2),
        data_option("Text file"),
    ):
        command = option(command)
    return command


def _load(path: str, options: dict[str, Any]) -> Any:
    from respike.loading import load

    with progress(f"loading {path}") as step:
        return load(path, **load_options(options), progress=step)


def _text_facts(text: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": list(options["data"]) or [f"{BUILTIN}, {platform.python_version()}"],
        "contexts": len(text),
        "context_tokens": text.shape[1],
    }


def _refuse_other_vocabulary(a: Any, b: Any) -> None:
    probe = "The quick brown fox, naive cafe 12345."
    same = a.config.vocab_size == b.config.vocab_size
    if not same or a.tokenizer.encode(probe) != b.tokenizer.encode(probe):
        raise DataError(
            f"{a.path} and {b.path} have different vocabularies "
            f"({a.config.vocab_size} and {b.config.vocab_size} tokens): nothing to compare"
        )


def _facts(model: Any) -> dict[str, str]:
    from respike.device import dtype_name

    return {
        "path": str(model.path),
        "fingerprint": model.fingerprint,
        "dtype": dtype_name(model.decoder.embedding.dtype),
        "weights": model.weights,
        "engine": model.engine,
    }


@click.command("check")
@click.argument("a")
@click.argument("b")
@text_options
@generation_options
@click.option(
    "--max-kl", type=click.FloatRange(0), metavar="NATS", help="Exit 1 if the mean KL is larger."
)
@run_options
@json_option
def check_command(a: str, b: str, **options: Any) -> None:
    """How far model B's predictions are from model A's, on the same text.

    KL is KL(A || B) in nats per token; top-1 agreement is the share of tokens that both rank first.
    With --generate, also how long both write the same, and how often they repeat themselves.
    """
    from respike.device import set_threads
    from respike.evaluation import Reference, position_buckets

    refuse_generation_options(options)
    set_threads(options["threads"])
    first, second = _load(a, options | AS_STORED), _load(b, options)
    _refuse_other_vocabulary(first, second)
    text = text_of(first, options)
    with progress("reference") as step:
        reference = Reference(first.decoder, text, step)
    with progress("comparing") as step:
        distances = reference.compare(second.decoder, step)
    total = distances.bucket(0, text.shape[1])
    met = options["max_kl"] is None or total["kl_nats"] <= options["max_kl"]
    report = {
        "a": _facts(first),
        "b": _facts(second),
        **_text_facts(text, options),
        "max_logit_difference": distances.max_logit_difference,
        "max_kl_nats": options["max_kl"],
        "met": met,
        "all": total,
        "buckets": [distances.bucket(*edges) for edges in position_buckets(text.shape[1])],
    }
    if options["new_tokens"]:
        report["generation"] = compare_continuations(first, second, options)
    if options["as_json"]:
        echo_json(report)
    else:
        click.echo(_distance_table([*report["buckets"], total]))
        click.echo(f"\nlargest logit difference  {distances.max_logit_difference:.6g}")
        if options["new_tokens"]:
            click.echo(f"\n{continuation_text(report['generation'])}")
    if not met:
        click.echo(
            f"error: KL {total['kl_nats']:.4g} is above --max-kl {options['max_kl']:g}", err=True
        )
        sys.exit(1)


def _distance_table(rows: list[dict[str, Any]]) -> str:
    header = (
        "context",
        "predictions",
        "nats A",
        "nats B",
        "KL, nats",
        "95 % interval",
        "top-1 agreement",
    )
    cells = [
        (
            f"{r['from_tokens']}-{r['to_tokens'] - 1}",
            r["predictions"],
            f"{r['nats_reference']:.4f}",
            f"{r['nats']:.4f}",
            f"{r['kl_nats']:.5f}",
            _interval(r["kl_nats_95"], 5),
            f"{r['top1_agreement_frac']:.4f}",
        )
        for r in _without_repeat(rows)
    ]
    return table(header, cells)


def _interval(ends: tuple[float, float], digits: int) -> str:
    return f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f}"


def _without_repeat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A text of one bucket needs no row for the whole."""
    return rows[:1] if len(rows) == 2 else rows


@click.command("eval")
@click.argument("model")
@click.option("--task", required=True, type=click.Choice(["perplexity", "recall"]))
@click.option(
    "--vs", "original", metavar="ORIGINAL", help="Another model to measure on the very same text."
)
@text_options
@recall_options
@run_options
@json_option
def eval_command(model: str, task: str, original: str | None, **options: Any) -> None:
    """Measure MODEL.

    perplexity: nats per token by how much context the prediction had. recall: does it find what it
    has read, far back? With the chance level and the number of trials. Both with 95 % intervals.
    """
    from respike.device import set_threads

    refuse_unused(UNUSED[task], f"to --task {task}")
    if task == "recall":
        check_recall_options(original, options)
    set_threads(options["threads"])
    loaded = {"model": _load(model, options)}
    if original:
        loaded["original"] = _load(original, options | AS_STORED)
        _refuse_other_vocabulary(loaded["original"], loaded["model"])
    report: dict[str, Any] = {"task": task, **{name: _facts(m) for name, m in loaded.items()}}
    if task == "perplexity":
        text = text_of(loaded["model"], options)
        report |= {**_text_facts(text, options), "rows": _perplexity(loaded, text)}
        shown = _perplexity_table(report["rows"])
    else:
        report |= measure_recall(loaded, options)
        shown = recall_text(report, options["five"])
    if options["as_json"]:
        echo_json(report)
    else:
        click.echo(shown)


UNUSED = {
    "perplexity": ("settings", "trials", "seed", "max_length", "five", "plot", "force"),
    "recall": ("data", "context_tokens", "max_tokens"),
}
"""Options that a task has no use for."""


def _perplexity(loaded: dict[str, Any], text: Any) -> list[dict[str, Any]]:
    from respike.evaluation import mean_interval, negative_log_likelihood, position_buckets

    nats = {}
    for name, model in loaded.items():
        with progress(name) as step:
            nats[name] = negative_log_likelihood(model.decoder, text, step)
    total = text.shape[1]
    rows = []
    for low, high in [*position_buckets(total), (0, total)]:
        part = slice(max(low, 1) - 1, high - 1)
        row: dict[str, Any] = {
            "context": f"{low}-{high - 1}",
            "predictions": nats["model"][:, part].numel(),
        }
        for name, values in nats.items():
            each = values[:, part].mean(1)
            row |= {f"{name}_nats": float(each.mean()), f"{name}_nats_95": mean_interval(each)}
            row[f"{name}_perplexity"] = float(each.mean().exp())
        if "original" in nats:
            added = (nats["model"] - nats["original"])[:, part].mean(1)
            row |= {"added_nats": float(added.mean()), "added_nats_95": mean_interval(added)}
        rows.append(row)
    return rows


def _perplexity_table(rows: list[dict[str, Any]]) -> str:
    header = ["context", "predictions", "nats", "95 % interval", "perplexity"]
    versus = "original_nats" in rows[0]
    if versus:
        header += ["original nats", "perplexity", "added nats", "95 % interval"]
    cells = []
    for r in _without_repeat(rows):
        cells.append([r["context"], r["predictions"], f"{r['model_nats']:.4f}"])
        cells[-1] += [_interval(r["model_nats_95"], 3), f"{r['model_perplexity']:.2f}"]
        if versus:
            cells[-1] += [f"{r['original_nats']:.4f}", f"{r['original_perplexity']:.2f}"]
            cells[-1] += [f"{r['added_nats']:.4f}", _interval(r["added_nats_95"], 4)]
    return table(header, cells)
