r"""Recall by length: models beside the original, inside its trained length and beyond.

    python benchmarks/recall_length.py MODEL healed=FOLDER -o recall_length_X.json
    python benchmarks/recall_length.py MODEL healed=FOLDER -o recall_length_X.json \
        --lengths 16384:5,32768:5,65536:5,131072:5 --original-max-tokens 32768

Passkeys stand at five depths, as many trials at each; the other families ask several questions of
every text. A family in which the original scores under 80 % at 1,024 tokens is no evidence and is
marked so. Losses are paired by trial. A second call measures only what the file does not hold yet;
an original that is too slow to read the longest texts can be left out there.
"""

import argparse
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from resultfile import Parts, counts, named_folder, unique
from tables import recall_table

from respike.checkpoint import fingerprint, open_checkpoint
from respike.device import set_threads
from respike.evaluation import Score, Task, paired_interval, recall
from respike.evaluation.columns import EVIDENCE_FRAC
from respike.loading import Model, load
from respike.material import Vocabulary
from respike.tasks import FAMILIES

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
JUDGED_TOKENS = 1024
"""Where the original has to do well."""
FAMILY_NAMES = ("passkey", "multi-needle", "questions")


def tasks_of(family: str, length: int, trials: int) -> list[tuple[Task, int]]:
    """Settings of one length, and how many trials of each."""
    if FAMILIES[family].third != "depth":
        return [(Task(family, length), trials)]
    each, more = divmod(trials, len(DEPTHS))
    counted = [(depth, each + (number < more)) for number, depth in enumerate(DEPTHS)]
    return [(Task(family, length, depth), count) for depth, count in counted if count]


def measure(model: Model, family: str, length: int, trials: int, seed: int) -> dict[str, Any]:
    """All settings of a family at one length, as one score."""
    vocabulary = Vocabulary(model.tokenizer)
    began = time.perf_counter()
    scores = []
    for task, count in tasks_of(family, length, trials):
        scores.append(recall(model.decoder, vocabulary, task, trials=count, seed=seed))
    per_trial = torch.cat([score.per_trial for score in scores])
    nats = sum(s.answer_nats * len(s.per_trial) for s in scores) / len(per_trial)
    whole = Score(scores[0].task, per_trial, nats, scores[0].chance_frac).as_dict()
    del whole["task"]
    seconds = round(time.perf_counter() - began, 1)
    return {**whole, "per_trial": per_trial.tolist(), "seconds": seconds}


def part_name(family: str, length: int, trials: int, seed: int) -> str:
    return f"{family} {length} x {trials}" + (f" seed {seed}" if seed else "")


def compare(rows: list[dict[str, Any]]) -> None:
    """What each row lost against the original, paired; and which families are evidence."""
    original = rows[0]["parts"]
    for row in rows:
        for part, found in row["parts"].items():
            there = original.get(part)
            if there is None:
                continue
            lost = torch.tensor(there["per_trial"]) - torch.tensor(found["per_trial"])
            found |= {"lost_frac": float(lost.mean()), "lost_95": paired_interval(lost)}


def evidence(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """By family measured at 1,024 tokens: does the original do it there?"""
    found = {}
    for part, score in rows[0]["parts"].items():
        family, length = part.split()[:2]
        if int(length) == JUDGED_TOKENS:
            found[family] = score["accuracy_frac"] >= EVIDENCE_FRAC
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("model", type=Path, help="the original")
    made.add_argument("folders", nargs="*", type=named_folder, metavar="NAME=FOLDER")
    made.add_argument("-o", "--output", type=Path, required=True)
    made.add_argument("--families", default=",".join(FAMILY_NAMES))
    made.add_argument(
        "--lengths", type=counts, default=counts("1024:200,2048:50,4096:50,8192:20"),
        metavar="TOKENS:TRIALS,...",
    )  # fmt: skip
    made.add_argument("--original-max-tokens", type=int, default=1 << 20)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--dtype", default="bf16")
    made.add_argument("--threads", type=int)
    return made


def main() -> None:
    options = parser().parse_intermixed_args()
    set_threads(options.threads)
    families = options.families.split(",")
    for family in families:
        if FAMILIES.get(family) is None or FAMILIES[family].unit != "length":
            raise SystemExit(f"error: no family {family!r} that comes in lengths")
    runs = [("original", options.model), *options.folders]
    unique([name for name, _ in runs])

    @lru_cache(maxsize=1)
    def loaded(path: Path) -> Model:
        return load(path, dtype=options.dtype)

    source = open_checkpoint(options.model)
    asked = {"original": fingerprint(source.config, source.files), "dtype": options.dtype}
    head: dict[str, Any] = {"benchmark": "recall_length", "model": options.model.name}
    head |= {"asked": asked, "trained_tokens": source.config.max_position_embeddings}
    parts = Parts(options.output, head)
    for name, path in runs:
        source = open_checkpoint(path)
        row = parts.row(name, fingerprint(source.config, source.files))
        for length, trials in sorted(options.lengths.items()):
            if name == "original" and length > options.original_max_tokens:
                continue
            for family in families:
                part = part_name(family, length, trials, options.seed)
                if part in row["parts"]:
                    print(f"{name:20} {part}: kept", flush=True)
                    continue
                found = measure(loaded(path), family, length, trials, options.seed)
                parts.keep(row, part, found)
                print(
                    f"{name:20} {part}: {100 * found['accuracy_frac']:.0f} %, {found['seconds']} s",
                    flush=True,
                )
    compare(parts.rows)
    head["evidence"] = evidence(parts.rows)
    parts.write()
    print(recall_table(parts.report()))


if __name__ == "__main__":
    main()
