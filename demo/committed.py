"""Result files of earlier runs in benchmarks/results: labelled, never mixed with this run's."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from respike.errors import DataError

CONTEXT_KEYS = ("machine", "date", "commit", "models", "rows", "skipped", "settings")
BENCH_KEYS = ("machine", "date", "commit", "rows", "skipped", "settings", "points", "found")
SPIKES_KEYS = ("machine", "date", "commit", "model", "text", "settings", "rows")
FRONTIER_KEYS = ("machine", "date", "commit", "model", "text", "rows")


@dataclass
class Committed:
    """What was found; each result carries its file name under ``file``."""

    context: dict[str, Any] | None = None
    """The newest context_*.json or bench_*.json of a model on disk."""
    frontiers: list[dict[str, Any]] = field(default_factory=list)
    """The newest frontier_*.json of each model."""
    spikes: list[dict[str, Any]] = field(default_factory=list)
    """The newest spikes_frontier_*.json of each model."""

    def lines(self) -> list[str]:
        """What to tell on the terminal."""
        found = [self.context] if self.context else []
        lines = [f"with {origin(r)}" for r in found + self.frontiers + self.spikes]
        if not self.context:
            lines.append("no committed benchmarks/results/context_*.json: no longer lengths")
        if not self.frontiers:
            lines.append("no committed benchmarks/results/frontier_*.json: no frontier")
        return lines


def origin(result: dict[str, Any]) -> str:
    """File, machine, date and commit of a result, in words."""
    machine = result["machine"]
    name = machine.get("processor", "unknown processor")
    threads = machine.get("threads")
    where = f"{name}, {threads} thread{'s' * (threads != 1)}" if threads else name
    return f"{result['file']} ({where}; {result['date']}; commit {result['commit'] or 'unknown'})"


def read_committed(folder: Path) -> Committed:
    """Everything of use in a results folder, which may be missing.

    Raises:
        DataError: A file is not JSON or lacks what its kind must have.
    """
    contexts = [_read(p, CONTEXT_KEYS) for p in sorted(folder.glob("context_*.json"))]
    benches = [_read(p, BENCH_KEYS) for p in sorted(folder.glob("bench_*.json"))]
    contexts += [as_context(b) | {"file": b["file"]} for b in benches if b["found"]["fingerprints"]]
    frontiers = [_read(p, FRONTIER_KEYS) for p in sorted(folder.glob("frontier_*.json"))]
    spikes = [_read(p, SPIKES_KEYS) for p in sorted(folder.glob("spikes_frontier_*.json"))]
    newest = max(contexts, key=lambda r: r["date"], default=None)
    return Committed(newest, _newest_of_each(frontiers), _newest_of_each(spikes))


def _newest_of_each(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each model."""
    by_model = {result["model"]: result for result in sorted(results, key=lambda r: r["date"])}
    return list(by_model.values())


def as_context(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the report shows of a `respike bench`: the model and its original, by those names."""
    roles = {"ours": "converted", "original": "original"}
    names = {p["contender"]: p["facts"] for p in report["points"] if "facts" in p}
    rows = [row for row in report["rows"] if row["group"] in roles]
    groups = {row["contender"]: row["group"] for row in rows}
    return {
        **{key: report[key] for key in ("machine", "date", "commit")},
        "settings": report["settings"] | {"path": "every point in a process of its own"},
        "models": {
            roles[group]: {
                "fingerprint": report["found"]["fingerprints"].get(group, "random weights"),
                "dtype": names[name]["dtype"],
            }
            for name, group in groups.items()
        },
        "rows": [{**row, "model": roles[row["group"]]} for row in rows],
        "skipped": [
            {"model": gap["contender"], "context_tokens": gap["length"], "reason": gap["reason"]}
            for gap in report["skipped"]
        ],
    }


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable result file: {error}") from error
    missing = [k for k in keys if not isinstance(result, dict) or k not in result]
    if missing:
        raise DataError(f"{path}: not a result of its kind: {', '.join(missing)} missing")
    return {**result, "file": path.name}
