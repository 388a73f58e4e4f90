"""What every step of the demo works on: the run, its steps, and how they are announced."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from respike.cli.show import progress
from respike.evaluation import Distances, Reference, Score, Task
from respike.loading import Model

HEALED = Path(__file__).resolve().parents[1] / "healed"
"""Differences that courses of healing left, with what they were trained on; committed."""


@dataclass
class Run:
    """One run of the demo: what to do it with, and what came out so far."""

    model: Path
    recipe: str
    out: Path
    threads: int | None = None
    dtype: str | None = None
    results: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    reference: Reference | None = None
    """The original's predictions, for all that is compared with them."""
    converted_distances: Distances | None = None
    converted_scores: dict[str, Score] = field(default_factory=dict)
    """Of the converted model, by task setting."""

    def folder(self, recipe: str) -> Path:
        """Where the conversion by a recipe goes."""
        stem = self.model.stem.lower().removesuffix("-instruct")
        return self.out / f"{stem}-{Path(recipe).stem}"

    def forget(self) -> None:
        """Free what the steps before have loaded."""
        self.models.clear()
        self.reference = self.converted_distances = None

    @property
    def difference(self) -> Path | None:
        """What healing changed in the conversion by this recipe, if the repository has it."""
        file = HEALED / f"{self.folder(self.recipe).name}.safetensors"
        return file if file.exists() else None

    @property
    def unhealed(self) -> Path:
        """The conversion as it comes: what is healed, or already the converted model."""
        if self.difference is None:
            return self.folder(self.recipe)
        return self.folder(f"{Path(self.recipe).stem}-unhealed")

    @property
    def notes(self) -> Path:
        """The question as it is asked."""
        return self.out / "notes.txt"

    @property
    def paths(self) -> dict[str, Path]:
        """Role -> model."""
        converted, window = self.folder(self.recipe), self.folder("window-only")
        return {"original": self.model, "converted": converted, "window": window}


@dataclass(frozen=True)
class Step:
    """A title, the commands that would do the same, and the function that does it."""

    title: str
    commands: Callable[[Run], list[str]]
    act: Callable[[Run], None]


@contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, one plain line elsewhere."""
    if not sys.stderr.isatty():
        print(f"  {label} ...", flush=True)
    with progress(f"  {label}") as step:
        yield step


def indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def parse_task(setting: str) -> Task:
    """Such as passkey:1024:0.5, as `respike eval --recall` takes it."""
    family, size, *depth = setting.split(":")
    return Task(family, int(size), float(depth[0])) if depth else Task(family, int(size))


def perform(run: Run, steps: list[Step], total: int) -> None:
    """Do the steps in order, announcing and timing each."""
    run.results["steps"] = []
    for number, step in enumerate(steps, start=1):
        commands = step.commands(run)
        print(f"\n[{number}/{total}] {step.title}")
        for command in commands:
            print(f"  $ {command}")
        start = time.perf_counter()
        step.act(run)
        seconds = time.perf_counter() - start
        print(f"  {seconds:.1f} s", flush=True)
        run.results["steps"].append({"title": step.title, "commands": commands, "seconds": seconds})
