"""What the demo does, one small function a step; each fills a part of `Run.results`.

To add a step: write the function and put it in `STEPS`; `stage.py` holds what all steps
share. To show it: a section in `report.py`.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from committed import as_context
from firing import SENTENCE, show_spikes, spike_commands
from stage import Run, Step, bar, indented, parse_task
from worth import TRIALS, memory_commands, memory_worth

from respike.account import (
    REPORT_LENGTHS,
    growth_bytes_per_token,
    num_parameters,
    state_bytes,
    state_parts,
)
from respike.bench.contenders import Subject
from respike.bench.run import Run as Engines
from respike.bench.run import bench
from respike.bench.session import Settings
from respike.checkpoint import open_checkpoint
from respike.cli.bench_text import bench_text
from respike.cli.show import human_bytes, table
from respike.config import ModelConfig
from respike.conversion import convert, plan
from respike.conversion.plan import layer_table
from respike.device import set_threads
from respike.evaluation import (
    Reference,
    Score,
    Task,
    Vocabulary,
    mean_interval,
    position_buckets,
    recall,
)
from respike.evaluation.recall import make_trials
from respike.generation import stream
from respike.healing import Request, apply
from respike.loading import load
from respike.recipe import load_recipe
from respike.text import builtin_text, contexts

ROLES = ("original", "converted", "window")
CONTEXT_TOKENS, MAX_TOKENS = 2048, 8192
RECALL = ("copy:512", "passkey:1024:0.25", "passkey:1024:0.9")
STATE_LENGTHS = tuple(1 << n for n in range(8, 21))
LIVE_LENGTHS = (1024, 2048, 8192)
"""Two short ones tell whether the long one can be afforded."""
LIVE_REPEATS = 2
LIVE_MAX_MINUTES = 1.0
"""A timed run expected to take longer, loading included, is skipped, so that slow machines finish
too."""
LIVE_DECODE = 16
FACT = SENTENCE
QUESTION = "Where is the key to the archive kept?"
ANSWER_TOKENS = 48


# ---- inspect and convert ---------------------------------------------------------------------


def inspect_original(run: Run) -> None:
    source = open_checkpoint(run.model)
    config = source.config
    facts = {
        "name": source.path.name,
        "family": config.family,
        "license": source.license,
        "parameters": num_parameters(config),
        "file_bytes": sum(f.stat().st_size for f in source.files),
        "layers": config.num_hidden_layers,
        "groups_per_layer": config.num_key_value_heads,
        "heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "trained_tokens": config.max_position_embeddings,
        "growth_bytes_per_token": growth_bytes_per_token(config),
    }
    run.results["original"] = facts
    print(
        f"  {facts['name']}: {facts['family']}, {facts['parameters']:,} parameters, "
        f"{facts['layers']} layers x {facts['groups_per_layer']} KV groups\n"
        f"  each token adds {facts['growth_bytes_per_token']:,} bytes of keys and values; "
        f"trained for {facts['trained_tokens']:,} tokens"
    )


def window_settings(run: Run) -> list[str]:
    """The recipe's window and sinks, as overrides of the built-in `window`."""
    recipe = load_recipe(run.recipe)
    return [f"window_tokens={recipe.window_tokens}", f"sink_tokens={recipe.sink_tokens}"]


def convert_both(run: Run) -> None:
    jobs = {
        "converted": load_recipe(run.recipe),
        "window": load_recipe("window", window_settings(run)),
    }
    done: dict[str, Any] = {}
    configs = {"original": open_checkpoint(run.model).config}
    for role, recipe in jobs.items():
        made = plan(run.model, recipe)
        verb = "calibrating and converting" if made.calibrates else "converting"
        folder = run.unhealed if role == "converted" else run.paths[role]
        with bar(f"{verb}: {recipe.name}") as step:
            report = convert(made, folder, force=True, progress=step)
        configs[role] = made.config
        done[role] = {
            "folder": str(folder),
            "recipe": recipe.name,
            "window_tokens": recipe.window_tokens,
            "sink_tokens": recipe.sink_tokens,
            "fingerprint": report["fingerprint"],
            "softmax_groups": report["softmax_groups"],
            "kv_groups": report["kv_groups"],
            "growth_bytes_per_token": growth_bytes_per_token(made.config),
            "calibration": {k: v for k, v in report.get("calibration", {}).items() if k != "each"},
        }
        groups = f"{report['softmax_groups']} of {report['kv_groups']} KV groups keep softmax"
        print(f"  wrote {folder}: {groups}")
    converted = configs["converted"]
    done["about"] = jobs["converted"].about
    done["layers"] = layer_table(converted)
    done["keeps_softmax"] = softmax_grid(converted)
    run.results["convert"] = done
    run.results["state"] = {
        "tokens": list(STATE_LENGTHS),
        "bytes": {r: [state_bytes(c, n) for n in STATE_LENGTHS] for r, c in configs.items()},
        "parts": {str(n): state_parts(converted, n) for n in REPORT_LENGTHS},
    }


def heal_converted(run: Run) -> None:
    """Put in what a committed course of healing changed; the course itself takes over an hour."""
    if run.difference is None:
        print("  no difference for this recipe in healed/: the weights stay the original's")
        run.results["healing"] = None
        return
    apply(Request(run.unhealed, run.paths["converted"], force=True), run.difference)
    course = json.loads(run.difference.with_suffix(".json").read_text(encoding="utf-8"))
    run.results["healing"] = course
    start, best = course["start"], course["best"]
    print(
        f"  wrote {run.paths['converted']}: {course['tokens']:,} tokens of distillation took the "
        f"KL on held-out documents from {start['kl_nats']:.4f} to {best['kl_nats']:.4f} nats"
    )


def heal_commands(run: Run) -> list[str]:
    if run.difference is None:
        return []
    healed = near_here(run.difference)
    return [f"respike heal {run.unhealed} {run.paths['converted']} --apply {healed} --force"]


def near_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def softmax_grid(config: ModelConfig) -> list[list[bool]]:
    """For each layer, for each KV group: does its cache grow?"""
    kept = set(config.softmax_groups())
    groups = range(config.num_key_value_heads)
    return [[(i, g) in kept for g in groups] for i in range(config.num_hidden_layers)]


# ---- quality ---------------------------------------------------------------------------------


def load_models(run: Run) -> None:
    set_threads(run.threads)
    for role, path in run.paths.items():
        with bar(f"loading {path.name}") as step:
            run.models[role] = load(path, dtype=run.dtype, progress=step)
    run.results["fingerprints"] = {r: m.fingerprint for r, m in run.models.items()}


def compare_predictions(run: Run) -> None:
    load_models(run)
    original = run.models["original"]
    text = contexts([], original.tokenizer, context_tokens=CONTEXT_TOKENS, max_tokens=MAX_TOKENS)
    with bar("predictions, original") as step:
        reference = run.reference = Reference(original.decoder, text, step)
    beyond = run.results["convert"]["converted"]["window_tokens"]
    rows: dict[str, Any] = {}
    for role in ROLES[1:]:
        with bar(f"predictions, {role}") as step:
            distances = reference.compare(run.models[role].decoder, step)
        if role == "converted":
            run.converted_distances = distances
        rows[role] = {
            "buckets": [distances.bucket(*e) for e in position_buckets(text.shape[1])],
            "beyond": distances.bucket(beyond, text.shape[1]),
        }
    run.results["check"] = {
        "text": "Python's language reference, which comes with every Python",
        "contexts": len(text), "context_tokens": text.shape[1], "models": rows,
    }  # fmt: skip
    header = ("context tokens", "nats a token, original", *(f"KL, {r}" for r in rows))
    lines = []
    for parts in zip(*(rows[role]["buckets"] for role in rows), strict=True):
        span = f"{parts[0]['from_tokens']}-{parts[0]['to_tokens'] - 1}"
        kl = [f"{part['kl_nats']:.4f}" for part in parts]
        lines.append((span, f"{parts[0]['nats_reference']:.3f}", *kl))
    print(indented(table(header, lines)))


def compare_recall(run: Run) -> None:
    vocabulary = Vocabulary(run.models["original"].tokenizer)
    rows = []
    for setting in RECALL:
        task = parse_task(setting)
        scores: dict[str, Score] = {}
        for role, model in run.models.items():
            with bar(f"{task.name}, {role}") as step:
                scores[role] = recall(model.decoder, vocabulary, task, trials=TRIALS, progress=step)
        run.converted_scores[setting] = scores["converted"]
        rows.append(recall_row(task, scores, reach_tokens(task, vocabulary)))
    run.results["recall"] = rows
    lines = [
        (row["task"], *(f"{row['scores'][role]['accuracy_frac']:.2f}" for role in ROLES))
        for row in rows
    ]
    print(indented(table(("share found", *ROLES), lines)))


def reach_tokens(task: Task, vocabulary: Vocabulary) -> int:
    """How far back the answer lies, about; a task within the window is a control."""
    if task.family == "copy":
        return task.size
    if task.family == "passkey":
        return round((1 - task.depth_frac) * task.size)
    return len(make_trials(vocabulary, task, 1)[0].tokens)


def recall_row(task: Task, scores: dict[str, Score], reach: int) -> dict[str, Any]:
    """Every model's score on the same trials, and what was lost against the original."""
    row: dict[str, Any] = {"task": task.name, "trials": len(scores["original"].per_trial)}
    row |= {"chance_frac": scores["original"].chance_frac, "reach_tokens": reach}
    row["scores"] = {}
    for role, score in scores.items():
        lost = scores["original"].per_trial - score.per_trial
        row["scores"][role] = {
            "accuracy_frac": score.as_dict()["accuracy_frac"],
            "accuracy_95": list(score.as_dict()["accuracy_95"]),
            "lost_frac": float(lost.mean()),
            "lost_95": list(mean_interval(lost)),
        }
    return row


def ask_the_same(run: Run) -> None:
    page = builtin_text()[:2500]
    content = f"Here are my notes.\n\n{FACT}\n\n{page}\n\nEnd of the notes. {QUESTION}"
    run.notes.write_text(content, encoding="utf-8")
    answers: dict[str, str] = {}
    for role, model in run.models.items():
        tokens = model.tokenizer.chat([{"role": "user", "content": content}])
        if role == "original":
            print(f"  {len(tokens)} tokens: {FACT!r}, then a page of Python's reference, then")
            print(f"  {QUESTION!r}")
        print(f"  {role}: ", end="", flush=True)
        answer = stream(model, tokens, max_tokens=ANSWER_TOKENS)
        for piece in answer:
            print(piece.replace("\n", "\n    "), end="", flush=True)
        print()
        answers[role] = answer.result.text
    run.results["question"] = {
        "fact": FACT, "question": QUESTION, "prompt_tokens": len(tokens),
        "max_tokens": ANSWER_TOKENS, "answers": answers,
    }  # fmt: skip


# ---- time and memory -------------------------------------------------------------------------


def time_and_memory(run: Run) -> None:
    run.forget()
    settings = Settings(
        LIVE_LENGTHS, LIVE_REPEATS, LIVE_DECODE, set_threads(run.threads), 60 * LIVE_MAX_MINUTES
    )
    with bar("prefill and decode, taking turns (tokens)") as step:
        report = bench(
            Subject(path=run.paths["converted"], original=run.model), ["original"], settings,
            Engines(run.dtype, None, sys.executable, run.out / "cache"),
            quality_cap=None, out=None, report=step,
        )  # fmt: skip
    run.results["context"] = as_context(report)
    print(indented(bench_text(report)))
    at_1m = STATE_LENGTHS.index(1 << 20)
    sizes = {r: human_bytes(b[at_1m]) for r, b in run.results["state"]["bytes"].items()}
    print(
        f"  state at 1,048,576 tokens, computed: {', '.join(f'{r} {s}' for r, s in sizes.items())}"
    )


def context_command(run: Run) -> list[str]:
    converted, original = (shlex.quote(str(run.paths[role])) for role in ("converted", "original"))
    lengths = ",".join(map(str, LIVE_LENGTHS))
    return [
        f"respike bench {converted} --vs original --original {original} --lengths {lengths} "
        f"--repeats {LIVE_REPEATS} --decode {LIVE_DECODE} --time-limit {LIVE_MAX_MINUTES:g} "
        "--no-quality"
    ]


def convert_commands(run: Run) -> list[str]:
    settings = " ".join(f"--set {setting}" for setting in window_settings(run))
    return [
        f"respike convert {run.model} {run.unhealed} --recipe {run.recipe} --force",
        f"respike convert {run.model} {run.paths['window']} --recipe window {settings} --force",
    ]


def check_commands(run: Run) -> list[str]:
    return [
        f"respike check {run.model} {run.paths[role]} --max-tokens {MAX_TOKENS}"
        for role in ROLES[1:]
    ]


def recall_commands(run: Run) -> list[str]:
    tasks = " ".join(f"--recall {setting}" for setting in RECALL)
    return [
        f"respike eval {run.paths[role]} --task recall --vs {run.model} {tasks} --trials {TRIALS}"
        for role in ROLES[1:]
    ]


def ask_commands(run: Run) -> list[str]:
    return [
        f"respike generate {run.paths[role]} - --chat --max-tokens {ANSWER_TOKENS} < {run.notes}"
        for role in ROLES
    ]


STEPS = [
    Step("What the original is", lambda run: [f"respike inspect {run.model}"], inspect_original),
    Step("Convert it, and for comparison with a window alone", convert_commands, convert_both),
    Step("Heal it", heal_commands, heal_converted),
    Step("How far the predictions moved", check_commands, compare_predictions),
    Step("What is still found far back", recall_commands, compare_recall),
    Step("What the memory is worth", memory_commands, memory_worth),
    Step("The same question to each", ask_commands, ask_the_same),
    Step("The same model as spikes", spike_commands, show_spikes),
    Step("Time and memory against context", context_command, time_and_memory),
]
