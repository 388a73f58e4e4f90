"""Verbs that measure: check, eval."""

import sys
from typing import Any

import click

from respike.cli.show import echo_json, json_option, progress, run_options, table
from respike.errors import DataError, UsageError

BUILTIN = "Python's language reference (built in)"
DEFAULT_RECALL = (
    "copy:128",
    "copy:512",
    "passkey:1024:0.1",
    "passkey:1024:0.5",
    "passkey:1024:0.9",
    "multi-query:32",
)


def text_options(command: Any) -> Any:
    """Which text, and how much of it."""
    for option in (
        click.option("--max-tokens", default=8192, show_default=True, type=click.IntRange(2)),
        click.option("--context-tokens", default=2048, show_default=True, type=click.IntRange(2)),
        click.option(
            "--data", multiple=True, type=click.Path(), help=f"Text files.  [default: {BUILTIN}]"
        ),
    ):
        command = option(command)
    return command


def _load(path: str, options: dict[str, Any]) -> Any:
    from respike.loading import load

    with progress(f"loading {path}") as step:
        return load(path, device=options["device"], dtype=options["dtype"], progress=step)


def _contexts(model: Any, options: dict[str, Any]) -> Any:
    from respike.evaluation import contexts

    return contexts(
        options["data"],
        model.tokenizer,
        context_tokens=options["context_tokens"],
        max_tokens=options["max_tokens"],
    )


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
    }


@click.command("check")
@click.argument("a")
@click.argument("b")
@text_options
@click.option("--max-kl", type=float, help="Fail (exit 1) if the mean KL is larger, in nats.")
@run_options
@json_option
def check_command(a: str, b: str, **options: Any) -> None:
    """How far model B's predictions are from model A's, on the same text.

    KL is KL(A || B) in nats per token; top-1 agreement is the share of tokens that both rank first.
    """
    from respike.device import set_threads
    from respike.evaluation import Reference, position_buckets

    set_threads(options["threads"])
    first, second = _load(a, options), _load(b, options)
    _refuse_other_vocabulary(first, second)
    text = _contexts(first, options)
    with progress("reference") as step:
        reference = Reference(first.decoder, text, step)
    with progress("comparing") as step:
        distances = reference.compare(second.decoder, step)
    total = distances.bucket(0, text.shape[1])
    met = options["max_kl"] is None or total["kl_nats"] <= options["max_kl"]
    report = {
        "a": _facts(first),
        "b": _facts(second),
        "text": list(options["data"]) or [BUILTIN],
        "contexts": len(text),
        "context_tokens": text.shape[1],
        "max_logit_difference": distances.max_logit_difference,
        "max_kl_nats": options["max_kl"],
        "met": met,
        "all": total,
        "buckets": [distances.bucket(*edges) for edges in position_buckets(text.shape[1])],
    }
    if options["as_json"]:
        echo_json(report)
    else:
        click.echo(_distance_table([*report["buckets"], total]))
        click.echo(f"\nlargest logit difference  {distances.max_logit_difference:.6g}")
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
        "KL",
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
            f"{r['kl_nats_95'][0]:.5f} to {r['kl_nats_95'][1]:.5f}",
            f"{r['top1_agreement_frac']:.4f}",
        )
        for r in rows
    ]
    return table(header, cells)


@click.command("eval")
@click.argument("model")
@click.option("--task", required=True, type=click.Choice(["perplexity", "recall"]))
@click.option("--vs", "original", help="The original, measured on the very same trials.")
@text_options
@click.option(
    "--recall", "settings", multiple=True, default=DEFAULT_RECALL, show_default=True,
    metavar="FAMILY:SIZE[:DEPTH]", help="copy:LAG, passkey:LENGTH:DEPTH or multi-query:PAIRS.",
)  # fmt: skip
@click.option("--trials", default=20, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=int)
@run_options
@json_option
def eval_command(model: str, task: str, original: str | None, **options: Any) -> None:
    """Measure MODEL.

    perplexity: nats per token by how much context the prediction had. recall: does it find what it
    has read, far back? Each with a chance level, the number of trials and a 95 % interval.
    """
    from respike.device import set_threads

    set_threads(options["threads"])
    tasks = [_parse_task(s) for s in options["settings"]] if task == "recall" else []
    loaded = {"model": _load(model, options)}
    if original:
        loaded["original"] = _load(original, options)
        _refuse_other_vocabulary(loaded["original"], loaded["model"])
    measure = _perplexity if task == "perplexity" else _recall
    rows = measure(loaded, tasks, options)
    report = {"task": task, **{name: _facts(m) for name, m in loaded.items()}, "rows": rows}
    if options["as_json"]:
        echo_json(report)
    else:
        click.echo(_rows_table(rows))


def _parse_task(setting: str) -> Any:
    from respike.evaluation import TASKS, Task

    family, *numbers = setting.split(":")
    try:
        if family not in TASKS or not 1 <= len(numbers) <= (2 if family == "passkey" else 1):
            raise ValueError
        size, depth = int(numbers[0]), float(numbers[1]) if len(numbers) == 2 else 0.5
        if size < 2 or not 0 <= depth <= 1:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"--recall {setting!r}: expected copy:LAG, passkey:LENGTH:DEPTH (0 to 1) or "
            "multi-query:PAIRS, with a size of at least 2"
        ) from None
    return Task(family, size, depth)


def _perplexity(
    loaded: dict[str, Any], tasks: list[Any], options: dict[str, Any]
) -> list[dict[str, Any]]:
    from respike.evaluation import mean_interval, negative_log_likelihood, position_buckets

    del tasks
    text = _contexts(loaded["model"], options)
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


def _recall(
    loaded: dict[str, Any], tasks: list[Any], options: dict[str, Any]
) -> list[dict[str, Any]]:
    from respike.evaluation import Vocabulary, mean_interval, recall

    vocabulary = Vocabulary(loaded["model"].tokenizer)
    rows = []
    for task in tasks:
        scores = {}
        for name, model in loaded.items():
            with progress(f"{task.name}, {name}") as step:
                scores[name] = recall(
                    model.decoder, vocabulary, task,
                    trials=options["trials"], seed=options["seed"], progress=step,
                )  # fmt: skip
        row: dict[str, Any] = {"task": task.name, "trials": options["trials"]}
        row["chance_frac"] = scores["model"].chance_frac
        for name, score in scores.items():
            result = score.as_dict()
            row |= {
                f"{name}_accuracy_frac": result["accuracy_frac"],
                f"{name}_accuracy_95": result["accuracy_95"],
                f"{name}_answer_nats": result["answer_nats"],
            }
        if "original" in scores:
            lost = scores["original"].per_trial - scores["model"].per_trial
            row |= {"lost_frac": float(lost.mean()), "lost_95": mean_interval(lost)}
        rows.append(row)
    return rows


def _rows_table(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, tuple):
            return f"[{value[0]:.3f}, {value[1]:.3f}]"
        if isinstance(value, float):
            return f"{value:.2g}" if abs(value) < 0.001 else f"{value:.4f}"
        return str(value)

    header = [k.replace("_frac", "").replace("_95", " 95 %").replace("_", " ") for k in rows[0]]
    return table(header, [[cell(v) for v in row.values()] for row in rows])
