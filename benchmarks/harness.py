"""Public benchmarks, in small slices: models beside the original, through lm-evaluation-harness.

    pip install -e '.[eval-harness]'
    python scripts/fetch_tasks.py benchmarks/data/harness
    python benchmarks/harness.py MODEL healed=FOLDER -o harness_X.json

To be called from the repository's root, as the tasks in benchmarks/harness_tasks name their data
from there. HumanEval runs what the models write and needs --confirm-run-unsafe-code. A task on
which the original is not above chance by its interval says nothing about a conversion and is marked
so. Slices are small and 0-shot: no figure here can be compared with published ones. A second call
measures only what the file does not hold yet.
"""

import argparse
import os
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

# Data sets are local; nothing may look for them elsewhere.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from resultfile import Parts, named_folder, unique
from tables import harness_table

from respike.checkpoint import fingerprint, open_checkpoint
from respike.evaluation import paired_interval, wilson
from respike.evaluation.harness import HarnessModel

TASKS = {
    # task -> (metric, filter, chance; None: one over the choices)
    "hellaswag": ("acc_norm", "none", 0.25),
    "truthfulqa_mc1": ("acc", "none", None),
    "gsm8k": ("exact_match", "last-number", 0.0),
    "humaneval": ("pass_at_1", "none", 0.0),
}
HERE = Path(__file__).resolve().parent


def measure(model: HarnessModel, task: str, limit: int | None, run_code: bool) -> dict[str, Any]:
    """One value in 0..1 a question, with interval and chance."""
    began = time.perf_counter()
    manager = TaskManager(include_path=str(HERE / "harness_tasks"), include_defaults=False)
    result = simple_evaluate(
        model, tasks=[f"respike_{task}"], task_manager=manager, limit=limit, log_samples=True,
        bootstrap_iters=0, confirm_run_unsafe_code=run_code,
    )  # fmt: skip
    metric, kept, chance = TASKS[task]
    samples = [s for s in result["samples"][f"respike_{task}"] if s["filter"] == kept]
    samples.sort(key=lambda sample: sample["doc_id"])
    values = [float(sample[metric]) for sample in samples]
    if chance is None:
        chance = sum(1 / len(s["doc"]["choices"]) for s in samples) / len(samples)
    return {
        "metric": metric,
        "questions": len(values),
        "accuracy_frac": sum(values) / len(values),
        "accuracy_95": wilson(round(sum(values)), len(values)),
        "chance_frac": chance,
        "per_question": values,
        "seconds": round(time.perf_counter() - began, 1),
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """What each row lost, paired by question; whether the original is above chance."""
    for row in rows:
        for task, found in row["parts"].items():
            there = rows[0]["parts"].get(task)
            if there is None:
                continue
            lost = torch.tensor(there["per_question"]) - torch.tensor(found["per_question"])
            found |= {"lost_frac": float(lost.mean()), "lost_95": paired_interval(lost)}
            found["informative"] = there["accuracy_95"][0] > there["chance_frac"]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("model", type=Path, help="the original")
    made.add_argument("folders", nargs="*", type=named_folder, metavar="NAME=FOLDER")
    made.add_argument("-o", "--output", type=Path, required=True)
    made.add_argument("--tasks", default="hellaswag,truthfulqa_mc1,gsm8k")
    made.add_argument("--limit", type=int, help="questions of each task")
    made.add_argument("--confirm-run-unsafe-code", action="store_true")
    made.add_argument("--dtype", default="bf16")
    made.add_argument("--threads", type=int)
    return made


def main() -> None:
    options = parser().parse_intermixed_args()
    tasks = options.tasks.split(",")
    for task in tasks:
        if task not in TASKS:
            raise SystemExit(f"error: no task {task!r}; there are {', '.join(TASKS)}")
        if not Path(f"benchmarks/data/harness/{task}.jsonl").exists():
            raise SystemExit(
                f"error: no benchmarks/data/harness/{task}.jsonl here\n"
                "hint: run `python scripts/fetch_tasks.py benchmarks/data/harness` at the "
                "repository's root"
            )
    if "humaneval" in tasks and not options.confirm_run_unsafe_code:
        raise SystemExit(
            "error: humaneval runs what the model writes\n"
            "hint: add --confirm-run-unsafe-code (limits: benchmarks/harness_tasks/humaneval.py)"
        )
    runs = [("original", options.model), *options.folders]
    unique([name for name, _ in runs])

    @lru_cache(maxsize=1)
    def loaded(path: Path) -> HarnessModel:
        return HarnessModel(str(path), dtype=options.dtype, threads=options.threads)

    source = open_checkpoint(options.model)
    asked = {"original": fingerprint(source.config, source.files), "dtype": options.dtype}
    asked["limit"] = options.limit
    head: dict[str, Any] = {"benchmark": "harness", "model": options.model.name, "asked": asked}
    parts = Parts(options.output, head)
    for name, path in runs:
        source = open_checkpoint(path)
        row = parts.row(name, fingerprint(source.config, source.files))
        for task in tasks:
            if task in row["parts"]:
                print(f"{name:20} {task}: kept", flush=True)
                continue
            run_code = options.confirm_run_unsafe_code
            found = measure(loaded(path), task, options.limit, run_code)
            parts.keep(row, task, found)
            share = f"{100 * found['accuracy_frac']:.0f} %"
            print(f"{name:20} {task}: {share}, {found['seconds']} s", flush=True)
    compare(parts.rows)
    parts.write()
    print(harness_table(parts.report()))


if __name__ == "__main__":
    main()
