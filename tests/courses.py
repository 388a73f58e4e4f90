"""A tiny course of healing, and what is asked about its outcome."""

import json
from pathlib import Path
from typing import Any

from respike.healing import Healing, Request

SETTINGS = (
    "window_tokens=9", "sink_tokens=2", "far.features=5", "far.calibration_tokens=600",
    "softmax_groups={1: [0]}", "softmax=blocks", "blocks.block_tokens=4",
    "blocks.summary_tokens=4", "blocks.top_blocks=3", "blocks.reach_tokens=24",
)  # fmt: skip
RECALL = {"families": ["copy"], "least_tokens": 16, "first_tokens": 24, "last_tokens": 32}
JUDGE = {
    "every_tokens": 1500, "contexts": 2, "context_tokens": 48, "recall": ["copy:12"], "trials": 3,
    "recall_slack_frac": 1.0,
}  # fmt: skip


TRANSFER = {
    "kind": "transfer", "tokens": 16 * 96, "context_tokens": 48, "rows": 2, "memory_rate": 3e-3,
    "recall": RECALL,
}  # fmt: skip
DISTIL = {
    "kind": "distil", "tokens": 24 * 96, "context_tokens": 48, "rows": 2,
    "train": {"v_proj": "full", "o_proj": 3}, "rate": 3e-3, "memory_rate": 3e-3,
    "recall": RECALL, "window_dropout": {"first_frac": 0.5, "window_tokens": 4},
    "memory_dropout": {"first_frac": 0.6},
}  # fmt: skip


def course(**changes: Any) -> Healing:
    fields = {
        "heal": 1, "name": "tiny", "stages": [TRANSFER, DISTIL], "judge": JUDGE,
        "heldout_frac": 0.3, "compute": "bf16",
    }  # fmt: skip
    return Healing.model_validate(fields | changes)


def request(converted: Path, text: Path, out: Path, **changes: Any) -> Request:
    return Request(converted, out, (str(text),), **changes)


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "healing.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "step"]
