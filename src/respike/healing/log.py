"""The log of a course: JSON Lines, one line a step or a verdict."""

import json
from pathlib import Path
from typing import Any

from respike.errors import DataError
from respike.files import replace_text
from respike.healing.judge import Verdict


def _unwritten(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be written: {error.strerror}",
        hint="make room there; the same command goes on from the newest checkpoint",
    )


class Log:
    """Appends to a file of JSON Lines.

    Args:
        path: Of the file; made when the first line comes.
        writes: Not so in all processes but one.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def step(self, line: dict[str, Any]) -> None:
        """A step; ``line`` has ``step``, steps so far."""
        self._write({"kind": "step", **line})

    def verdict(self, step: int, tokens: int, verdict: Verdict, kept: bool) -> None:
        """What was measured after a step, and whether those weights are kept."""
        line = {"kind": "verdict", "step": step, "tokens": tokens, "kept": kept}
        self._write(line | verdict.as_dict())

    def _write(self, line: dict[str, Any]) -> None:
        if not self.writes:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise _unwritten(self.path, error) from error

    def cut(self, step: int) -> None:
        """Leave out what came after a step: it will be done again."""
        if not self.writes or not self.path.exists():
            return
        kept = [line for line in self.lines() if step and line["step"] <= step]
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def lines(self) -> list[dict[str, Any]]:
        """Everything written so far; a line that a kill cut short is left out."""
        found = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
        return found
