"""What each part of recipe and course is worth: one thing changed, all else alike.

    python benchmarks/ablations.py models/SmolLM2-135M-Instruct.gguf --data out/docs-en \
        --work out/ablations -o benchmarks/results/ablations_smollm2.json

Every arm converts the model by `retrieval-long`, or a variant of it, and heals it by one course of
--tokens tokens at contexts of 2,048. Figures are those of the course's own judge, before and after:
on documents of the corpus that no step sees and on recall trials, the same ones in every arm. An
arm that the file holds already is not run again, and one that was stopped goes on. An arm of
300,000 tokens takes an hour of a core that has no bf16 products, a third of that on one that has.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from resultfile import came_from, rows_before, write
from tables import ablations_table

from respike.bench.machine import provenance

CONTEXT_TOKENS = 2048
JUDGE = {
    "every_tokens": 10**9, "contexts": 8, "context_tokens": CONTEXT_TOKENS, "trials": 24,
    "recall": ["copy:512", "passkey:1024:0.25", "multi-query:32", "needles:1024:0.1"],
    "recall_slack_frac": 1.0,  # an arm that loses recall is a result
}  # fmt: skip
RECALL = {
    "frac": 0.25, "families": ["copy", "passkey", "needles", "multi-query"], "least_tokens": 256,
    "first_tokens": 1024, "last_tokens": CONTEXT_TOKENS,
}  # fmt: skip
EVEN_LAYERS = 6
"""Of three KV groups each: as many groups as the recipe selects."""


@dataclass(frozen=True)
class Arm:
    """One conversion and its training.

    Attributes:
        name: Of the row.
        recipe: What of the recipe is changed.
        recall: Whether there is synthetic recall among the texts.
        transfer: Whether a third of the tokens first goes to each layer's own attention (stage A).
        seed: Of the course.
    """

    name: str
    recipe: tuple[str, ...] = ()
    recall: bool = True
    transfer: bool = False
    seed: int = 0


ARMS = (
    Arm("as it is"),
    Arm("no recall data", recall=False),
    Arm("gated linear memory", ("memory=gla",)),
    Arm("delta rule memory", ("memory=delta",)),
    Arm("even layers", ("even",)),
    Arm("stage A first", transfer=True),
    Arm("no sinks", ("sink_tokens=0",)),
    *(
        Arm(f"{name}, seed {seed}", recall=recall, seed=seed)
        for seed in (1, 2)
        for name, recall in (("as it is", True), ("no recall data", False))
    ),
    Arm("one sink", ("sink_tokens=1",)),
    Arm("no memory", ("memory=none",)),
)


def recipe_of(arm: Arm, work: Path) -> tuple[str, list[str]]:
    """The recipe of an arm, and its settings."""
    if arm.recipe != ("even",):
        return "retrieval-long", list(arm.recipe)
    recipe = yaml.safe_load((files("respike") / "recipes/retrieval-long.yaml").read_text("utf-8"))
    del recipe["softmax_groups"], recipe["measured_on"], recipe["source"]
    layers = [{"at": {"evenly": EVEN_LAYERS}, "mixer": "full"}, {"at": "rest", "mixer": "window"}]
    path = work / "even.yaml"
    path.write_text(yaml.safe_dump({**recipe, "name": "even-long", "layers": layers}), "utf-8")
    return str(path), []


def course_of(arm: Arm, tokens: int, work: Path) -> Path:
    stage = {
        "kind": "distil", "tokens": tokens, "context_tokens": CONTEXT_TOKENS, "rows": 2,
        "least_document_tokens": CONTEXT_TOKENS // 2, "train": {"v_proj": 32, "o_proj": 32},
        "rate": 3e-4, "memory_rate": 5e-4,
    }  # fmt: skip
    stages: list[dict[str, Any]] = [stage | ({"recall": RECALL} if arm.recall else {})]
    if arm.transfer:
        stages = [
            {**stages[0], "kind": "transfer", "tokens": tokens // 3},
            {**stages[0], "tokens": tokens - tokens // 3},
        ]
    course = {"heal": 1, "name": "ablation", "about": arm.name, "seed": arm.seed,
              "ema_decay": 0.8, "judge": JUDGE, "stages": stages}  # fmt: skip
    path = work / f"{slug(arm.name)}.yaml"
    path.write_text(yaml.safe_dump(course, sort_keys=False), "utf-8")
    return path


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def run(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """Converts and heals, unless that is done; what the judge said before and after."""
    work: Path = options.work
    recipe, settings = recipe_of(arm, work)
    converted = work / f"{slug(' '.join(arm.recipe or ('as it is',)))}.converted"
    healed = work / f"{slug(arm.name)}.healed"
    respike = [sys.executable, "-m", "respike"]
    threads = ["--threads", str(options.threads)] if options.threads else []
    if not converted.exists():
        sets = [word for setting in settings for word in ("--set", setting)]
        command = ["convert", str(options.model), str(converted), "--recipe", recipe, *sets]
        subprocess.run([*respike, *command, *threads], check=True)
    if not healed.exists():
        shared = work / "tokens"
        own = healed.with_name(f"{healed.name}.healing")
        own.mkdir(exist_ok=True)
        if shared.exists() and not (own / "tokens").exists():
            (own / "tokens").symlink_to(shared.resolve(), target_is_directory=True)
        course = course_of(arm, options.tokens, work)
        command = ["heal", str(converted), str(healed), "--config", str(course)]
        subprocess.run([*respike, *command, "--data", str(options.data), *threads], check=True)
        if not shared.exists():
            (own / "tokens").rename(shared)
    record = healed.with_name(f"{healed.name}.healing")
    text = (record / "log.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    names = ("tokens", "kl_nats", "kl_95", "nats_added", "recall_frac", "tasks")
    verdicts = [{key: line[key] for key in names} for line in lines if line["kind"] == "verdict"]
    course = json.loads((record / "course.json").read_text(encoding="utf-8"))
    tokens = sum(stage["tokens"] for stage in course["healing"]["stages"])
    if tokens != options.tokens:
        raise SystemExit(
            f"error: {record} holds a course of {tokens:,} tokens, asked for {options.tokens:,}: "
            "choose another --work, or remove it"
        )
    return {
        "name": arm.name, "compute": course["healing"]["compute"],
        "before": verdicts[0], "after": verdicts[-1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the corpus")
    parser.add_argument("--work", type=Path, required=True, help="folder for models")
    parser.add_argument("--tokens", type=int, default=300_000, help="of each arm [300000]")
    names = [arm.name for arm in ARMS]
    parser.add_argument("--arms", nargs="*", choices=names, default=names, metavar="NAME")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    asked = {"model": options.model.name, "tokens": options.tokens, "judge": JUDGE}
    rows = {row["name"]: row for row in rows_before(options.output, asked)}
    for arm in ARMS:
        if arm.name in rows or arm.name not in options.arms:
            continue
        rows[arm.name] = {**run(arm, options), **came_from()}
        inorder = [rows[arm.name] for arm in ARMS if arm.name in rows]
        found = {"benchmark": "ablations", **provenance(), "asked": asked, "rows": inorder}
        write(options.output, found)
        print(ablations_table(found))


if __name__ == "__main__":
    main()
