"""The step that says what the memory is worth: the same folder with its memory on and cut."""

from typing import Any

from stage import Run, bar, indented, parse_task

from respike.cli.show import table
from respike.config import ModelConfig
from respike.evaluation import Distances, Score, Vocabulary, mean_interval, memory_shares
from respike.evaluation.columns import Column
from respike.models.ablation import without

TASKS = ("passkey:1024:0.25", "copy:512")
"""Tasks of the step before in which a memory may matter."""

TRIALS = 4
"""Of every recall task."""

Row = dict[str, Any]


def memory_worth(run: Run) -> None:
    model, on = run.models["converted"], run.converted_distances
    cut = Column("memory cut", model.decoder, off="memory")
    if cut.missing:
        run.results["memory"] = None
        print(f"  nothing to measure: {cut.missing}")
        return
    assert run.reference is not None
    assert on is not None
    with bar("predictions, memory cut") as step, without(model.decoder, "memory"):
        distances = run.reference.compare(model.decoder, step)
    window = run.results["convert"]["converted"]["window_tokens"]
    rows = [kl_row(on, distances, window, run.reference.contexts.shape[1])]
    vocabulary = Vocabulary(model.tokenizer)
    for setting in TASKS:
        kept = run.converted_scores[setting]
        with bar(f"{kept.task.name}, memory cut") as step:
            score = cut.score(
                vocabulary, parse_task(setting), trials=len(kept.per_trial), progress=step
            )
        rows.append(found_row(kept, score))
    found = memory_facts(model.config) | {"rows": rows, "share": share_facts(run, 2 * window)}
    run.results["memory"] = found
    lines = [
        (row["measure"], *(f"{row[k]:.{row['digits']}f}" for k in ("on", "cut"))) for row in rows
    ]
    print(indented(table(("converted model", "memory on", "memory cut"), lines)))
    print(f"  {share_line(found['share'])}")


def kl_row(on: Distances, cut: Distances, beyond: int, total: int) -> Row:
    """KL from the original beyond the window; what the memory is worth is paired by context."""
    a, b = (x.bucket(beyond, total) for x in (on, cut))
    worth = (cut.kl - on.kl)[:, beyond - 1 :].mean(1)
    return {
        "measure": "KL beyond the window", "digits": 4,
        "on": a["kl_nats"], "on_95": a["kl_nats_95"],
        "cut": b["kl_nats"], "cut_95": b["kl_nats_95"],
        "worth": float(worth.mean()), "worth_95": mean_interval(worth),
    }  # fmt: skip


def found_row(on: Score, cut: Score) -> Row:
    """Share found of one task, on the same trials."""
    a, b, worth = on.as_dict(), cut.as_dict(), on.per_trial - cut.per_trial
    return {
        "measure": on.task.name, "digits": 2,
        "on": a["accuracy_frac"], "on_95": a["accuracy_95"],
        "cut": b["accuracy_frac"], "cut_95": b["accuracy_95"],
        "worth": float(worth.mean()), "worth_95": mean_interval(worth),
    }  # fmt: skip


def memory_facts(config: ModelConfig) -> Row:
    """Which memories there are: kinds, KV groups that have one, prototypes of far ones."""
    mixers = ((part, getattr(part, "memory", None)) for _, part in config.mixers())
    held = [(part, memory) for part, memory in mixers if memory is not None]
    return {
        "kinds": sorted({memory.kind for _, memory in held}),
        "groups": sum(len(part.groups) for part, _ in held),
        "features": sorted({memory.features for _, memory in held if memory.kind == "far"}),
    }


def share_facts(run: Run, from_tokens: int) -> Row | None:
    """The memory's share of attention by layer, on one context; None where it has no share."""
    assert run.reference is not None
    tokens = run.reference.contexts[:1]
    by_layer: dict[int, list[float]] = {}
    for part in memory_shares(run.models["converted"].decoder, tokens, from_tokens):
        by_layer.setdefault(part.layer, []).extend(part.head_fracs)
    heads = [x for fracs in by_layer.values() for x in fracs]
    if not heads:
        return None
    return {
        "from_tokens": from_tokens,
        "context_tokens": tokens.shape[1],
        "layers": {str(layer): sum(x) / len(x) for layer, x in by_layer.items()},
        "heads": len(heads),
        "mean_frac": sum(heads) / len(heads),
        "largest_frac": max(heads),
    }


def share_line(share: Row | None) -> str:
    """The share in one line."""
    if share is None:
        return "the memory stands beside attention and has no share of it"
    layer, most = max(share["layers"].items(), key=lambda item: item[1])
    return (
        f"the memory's share of attention: mean {share['mean_frac']:.3f}, "
        f"most in layer {layer}: {most:.3f}"
    )


def memory_commands(run: Run) -> list[str]:
    tasks = " ".join(f"--recall {setting}" for setting in TASKS)
    return [
        f"respike eval {run.paths['converted']} --task recall --vs {run.model} --columns {tasks} "
        f"--trials {TRIALS}",
        '# the rest from Python: respike.models.ablation.without(decoder, "memory")',
    ]
