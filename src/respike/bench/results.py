"""The result file: every point is on disk as soon as it is measured, and a second call goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from respike.errors import DataError, UsageError
from respike.files import replace_text

KIND = "bench"


class Results:
    """Points and findings, in a file or only in memory.

    Args:
        path: The file. One that exists must be of the same call but for lengths and limits.
        key: What must be the same for two calls to belong together.
        head: Provenance and settings; those of the newest call stand in the file.

    Raises:
        UsageError: The file cannot be written, or belongs to another call.
        DataError: It is not a result file.
    """

    def __init__(self, path: Path | None, key: Mapping[str, Any], head: Mapping[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"benchmark": KIND, **head, "key": dict(key), "points": []}
        self.data["found"] = {}
        if path is None:
            return
        if path.exists():
            old = _read(path)
            for name, value in self.data["key"].items():
                if old["key"].get(name) != value:
                    raise UsageError(
                        f"{path}: holds results of another call ({name} was "
                        f"{old['key'].get(name)}, is {value})",
                        hint="choose another file, or the same model and settings to go on",
                    )
            self.data["points"], self.data["found"] = old["points"], old["found"]
        self.write()

    @property
    def points(self) -> list[dict[str, Any]]:
        """Every measurement, in the order made."""
        found: list[dict[str, Any]] = self.data["points"]
        return found

    def add(self, point: Mapping[str, Any]) -> None:
        """Keep a measurement, in place of a failed one of the same name."""
        same = ("contender", "length", "repeat")
        self.data["points"] = [
            p for p in self.points if "error" not in p or any(p[k] != point[k] for k in same)
        ]
        self.points.append(dict(point))
        self.write()

    def find(self, name: str) -> Any:
        """What `keep` kept, or None."""
        return self.data["found"].get(name)

    def keep(self, name: str, value: Any) -> None:
        """Anything that is found once: the gate, the quality at a length."""
        self.data["found"][name] = value
        self.write()

    def write(self) -> None:
        """All of it, atomically.

        Raises:
            UsageError: The file cannot be written.
        """
        if self.path is None:
            return
        try:
            replace_text(self.path, json.dumps(self.data, indent=1) + "\n")
        except DataError as error:
            raise UsageError(str(error)) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a result of `respike bench`: {error}") from error
    parts = ("key", "points", "found")
    good = isinstance(found, dict) and found.get("benchmark") == KIND
    if not good or any(part not in found for part in parts):
        raise DataError(
            f"{path}: not a result of `respike bench`", hint="choose another file for -o"
        )
    return dict(found)
