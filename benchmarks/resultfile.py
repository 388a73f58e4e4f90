"""What the benchmarks share: result files that are written whole, and go on where they stopped."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from respike.bench.machine import provenance
from respike.files import replace_text


def write(path: Path, report: Mapping[str, Any]) -> None:
    """One JSON document, in place of an older one; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(report, indent=1) + "\n")


def came_from() -> dict[str, Any]:
    """Commit and date, for a row or part of a file that others joined at other times."""
    return {key: provenance()[key] for key in ("commit", "date")}


def rows_before(path: Path, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same measurement, which goes on.

    Raises:
        SystemExit: What was asked then was something else; the file is left as it is.
    """
    if not path.exists():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    then = before.get("asked", {})
    now: dict[str, Any] = json.loads(json.dumps(asked))
    for key in sorted({*then, *now}):
        if then.get(key) != now.get(key):
            raise SystemExit(
                f"error: {path} holds another measurement: {key} was {then.get(key)!r}, is "
                f"{now.get(key)!r}; choose another -o, or remove that file"
            )
    rows: list[dict[str, Any]] = before["rows"]
    return rows


@dataclass
class Parts:
    """A result file of rows that are made of parts, written whenever a part is measured.

    A part found in the file is kept if it was measured on the same artefact, asked the same.

    Attributes:
        path: The file.
        head: What stands at its top, besides where it comes from.
        rows: In the order of the latest call.
    """

    path: Path
    head: Mapping[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        before = rows_before(self.path, self.head["asked"])
        self._before = {_artefact(row): row for row in before}

    def row(self, name: str, fingerprint: str, **facts: Any) -> dict[str, Any]:
        """A new row, with the parts that were measured before."""
        made: dict[str, Any] = {"name": name, "fingerprint": fingerprint, **facts}
        made["parts"] = self._before.get(_artefact(made), {}).get("parts", {})
        self.rows.append(made)
        return made

    def keep(self, row: dict[str, Any], part: str, found: Mapping[str, Any]) -> None:
        """A part of a row, into the file."""
        row["parts"] = {**row["parts"], part: {**found, **came_from()}}
        self.write()

    def report(self) -> dict[str, Any]:
        """What stands in the file: rows that this call does not ask for stay in it, at the end."""
        mine = {name for row in self.rows for name in (_artefact(row), row["name"])}
        others = [r for r in self._before.values() if not {_artefact(r), r["name"]} & mine]
        return {**provenance(), **self.head, "rows": [*self.rows, *others]}

    def write(self) -> None:
        """The file, as far as it is."""
        write(self.path, self.report())


def _artefact(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a part was measured on: the weights, and how they were run."""
    return row["fingerprint"], row.get("how")


def named_folder(text: str) -> tuple[str, Path]:
    """``NAME=FOLDER``, for argparse."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=FOLDER")
    if not Path(folder).exists():
        raise argparse.ArgumentTypeError(f"{folder} does not exist")
    return name, Path(folder)


def counts(text: str) -> dict[int, int]:
    """``2048:20,8192:6`` as {2048: 20, 8192: 6}, for argparse."""
    try:
        found = {int(a): int(b) for a, _, b in (part.partition(":") for part in text.split(","))}
    except ValueError:
        found = {}
    if not found or min(found) < 1 or min(found.values()) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected LENGTH:COUNT such as 2048:20,8192:6")
    return found


def unique(names: Sequence[str]) -> None:
    """Rows are told apart by their names."""
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise SystemExit(f"error: two rows are called {twice[0]!r}")
