"""What healing brought back: models beside the original, on text nobody trained on.

    python benchmarks/healing.py MODEL healed=FOLDER control=FOLDER -o healing_X.json

The first NAME=FOLDER is the model in question: it gets all five columns (itself, memory off, window
off, beside the original and the original shown its window only). Others follow as rows of their
own, such as the untrained conversion and an equally trained control without memories. Differences
are paired by context and prompt: the first folder against every other row, or as --difference says.
Texts come from `benchmarks/texts.py`. A second call measures only what the file does not hold yet.
"""

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from resultfile import Parts, counts, named_folder, unique
from tables import healing_table
from torch import Tensor

from respike.checkpoint import fingerprint, open_checkpoint
from respike.device import set_threads
from respike.errors import UsageError
from respike.evaluation import (
    Reference,
    continuation_agreement,
    continuations,
    mean_interval,
    position_buckets,
)
from respike.evaluation.columns import window_tokens
from respike.evaluation.continuation import per_prompt
from respike.loading import Model, load
from respike.models.ablation import without
from respike.models.decoder import PREFILL_CHUNK_TOKENS, Decoder
from respike.text import contexts

BEYOND_TOKENS = 256
"""KL "beyond the window" is over predictions from at least this many tokens, in every row."""
FLOOR_CHUNK_TOKENS = 192
"""The original against itself, worked through in other chunks, so rounded elsewhere."""
TEXTS = {
    "evaluate": "Brown, Factbook and Debian Handbook (benchmarks/texts.py), in no corpus",
    "code": (
        "modules of Python's standard library (benchmarks/texts.py), in no corpus, though 5 to 16 "
        "% of the runs of eight words in some are: docstrings, in Python's documentation"
    ),
}
"""What the folders of `benchmarks/texts.py` hold."""
MEASURES = ("kl_nats", "nats", "top1_agreement_frac")
"""Kept for each context, to be paired; of the first two less is better."""


@dataclass(frozen=True)
class Run:
    """A row: a model, and how it is run.

    Attributes:
        name: Of the row.
        path: The model.
        off: A part that is switched off.
        last_tokens: It is shown no more.
        chunk_tokens: Of its prefill.
    """

    name: str
    path: Path
    off: str | None = None
    last_tokens: int | None = None
    chunk_tokens: int = PREFILL_CHUNK_TOKENS

    @property
    def how(self) -> str | None:
        """What tells two rows of the same weights apart."""
        if self.off:
            return f"{self.off} off"
        if self.last_tokens:
            return f"shown {self.last_tokens} tokens"
        if self.chunk_tokens != PREFILL_CHUNK_TOKENS:
            return f"chunks of {self.chunk_tokens}"
        return None

    @contextmanager
    def running(self, model: Model) -> Iterator[Decoder]:
        """The decoder as this row has it."""
        if self.off is None:
            yield model.decoder
        else:
            with without(model.decoder, self.off):
                yield model.decoder


class Judge:
    """The original, and what it says of every text; read when first needed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.files = sorted(options.data.glob("*.txt"))
        if not self.files:
            raise SystemExit(
                f"error: no texts in {options.data}\n"
                "hint: run `python benchmarks/texts.py benchmarks/data`"
            )
        self.references: dict[int, Reference] = {}

    @cached_property
    def original(self) -> Model:
        return load(self.options.model, dtype=self.options.dtype)

    @property
    def never(self) -> list[int]:
        """Tokens that end a text."""
        return sorted({*self.original.tokenizer.eos_token_ids, *self.original.config.eos_token_ids})

    def text(self, length: int, count: int) -> Tensor:
        return contexts(
            self.files, self.original.tokenizer,
            context_tokens=length, max_tokens=length * count,
        )  # fmt: skip

    def reference(self, length: int) -> Reference:
        if length not in self.references:
            text = self.text(length, self.options.contexts[length])
            self.references[length] = Reference(self.original.decoder, text)
        return self.references[length]

    @cached_property
    def prompts(self) -> Tensor:
        return self.text(self.options.prompt_tokens, self.options.prompts)

    @cached_property
    def written(self) -> Tensor:
        """By the original."""
        decoder = self.original.decoder
        return continuations(decoder, self.prompts, self.options.generate, never=self.never)

    def on_text(self, run: Run, decoder: Decoder, length: int) -> dict[str, Any]:
        """Distances by position, and beyond the window for each context."""
        distances = self.reference(length).compare(
            decoder, chunk_tokens=run.chunk_tokens, last_tokens=run.last_tokens
        )
        each = distances.per_context(BEYOND_TOKENS, length)
        return {
            "contexts": len(distances.kl),
            "all": distances.bucket(0, length),
            "beyond": distances.bucket(BEYOND_TOKENS, length),
            "buckets": [distances.bucket(*edges) for edges in position_buckets(length)],
            "per_context": {name: each[name].tolist() for name in MEASURES},
        }

    def on_prompts(self, run: Run, decoder: Decoder) -> dict[str, Any]:
        """What it writes, beside what the original writes."""
        made = continuations(
            decoder, self.prompts, self.options.generate, never=self.never,
            last_tokens=run.last_tokens, chunk_tokens=run.chunk_tokens,
        )  # fmt: skip
        found = continuation_agreement(self.written, made)
        each = per_prompt(self.written, made)
        kept = {name: each[name].tolist() for name in ("agreement_frac", "repetition_added_frac")}
        return {**found, "per_prompt": kept}


def runs_of(options: argparse.Namespace, window: int) -> list[Run]:
    """Every row that was asked for, the five columns of the first folder first."""
    (name, folder), *others = options.folders
    runs = [
        Run("original", options.model),
        Run("original, other chunks", options.model, chunk_tokens=FLOOR_CHUNK_TOKENS),
        Run(f"original, last {window} tokens", options.model, last_tokens=window),
        Run(name, folder),
        Run(f"{name}, memory off", folder, off="memory"),
        Run(f"{name}, window off", folder, off="window"),
        *(Run(other, path) for other, path in others),
    ]
    return [run for run in runs if not run.name.endswith(tuple(options.skip))]


def measure(judge: Judge, run: Run, model: Callable[[], Model], parts: Parts) -> None:
    """The row's parts that the file does not hold yet."""
    options = judge.options
    source = open_checkpoint(run.path)
    row = parts.row(run.name, fingerprint(source.config, source.files), how=run.how)
    wanted: dict[str, Callable[[Decoder], dict[str, Any]]] = {
        f"text {length} x {count}": (lambda d, n=length: judge.on_text(run, d, n))
        for length, count in options.contexts.items()
    }
    prompts = f"{options.prompts} x {options.prompt_tokens}"
    wanted[f"write {options.generate} after {prompts}"] = lambda d: judge.on_prompts(run, d)
    row["asked"] = list(wanted)
    for part, work in wanted.items():
        if part in row["parts"]:
            print(f"{run.name:34} {part}: kept", flush=True)
            continue
        _ = judge.original  # not in the seconds below
        try:
            with run.running(model()) as decoder:
                began = time.perf_counter()
                found = work(decoder)
        except UsageError as error:  # it has no such part to switch off
            row["missing"] = str(error)
            print(f"{run.name:34} {part}: {error}", flush=True)
            break
        took = round(time.perf_counter() - began, 1)
        parts.keep(row, part, {**found, "seconds": took})
        print(f"{run.name:34} {part}: {summary(found)}, {took} s", flush=True)


def summary(found: dict[str, Any]) -> str:
    """The first figure of a part."""
    if "beyond" in found:
        return f"KL beyond the window {found['beyond']['kl_nats']:.4f}"
    return f"agreement {found['agreement_frac']:.3f}"


def differences(rows: list[dict[str, Any]], pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """How much better row A is than row B, paired: above 0 is better, for every measure."""
    known = {row["name"]: row for row in rows}
    found = []
    for a, b in pairs:
        for part in known[a]["asked"]:
            mine, theirs = (known[name]["parts"].get(part) for name in (a, b))
            if not (mine and theirs):
                continue
            kind = "per_context" if "per_context" in mine else "per_prompt"
            for measure, values in mine[kind].items():
                less = measure in ("kl_nats", "nats", "repetition_added_frac")
                gain = torch.tensor(theirs[kind][measure]) - torch.tensor(values)
                gain = gain if less else -gain
                found.append(
                    {"better": a, "than": b, "part": part, "measure": measure, "n": len(gain),
                     "gain": float(gain.mean()), "gain_95": mean_interval(gain)}
                )  # fmt: skip
    return found


def pairs_of(options: argparse.Namespace, names: list[str]) -> list[tuple[str, str]]:
    """What is held against what."""
    first = options.folders[0][0]
    given = [tuple(pair.split(":", 1)) for pair in options.difference]
    default = [(first, name) for name in names if name not in (first, "original")]
    default = [pair for pair in default if pair[1] != "original, other chunks"]
    pairs = [(a, b) for a, b in given] if given else default
    unknown = sorted({name for pair in pairs for name in pair} - set(names))
    if unknown:
        raise SystemExit(f"error: no row is called {unknown[0]!r}; there are {', '.join(names)}")
    return pairs


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("model", type=Path, help="the original")
    made.add_argument("folders", nargs="+", type=named_folder, metavar="NAME=FOLDER")
    made.add_argument("-o", "--output", type=Path, required=True)
    made.add_argument("--data", type=Path, default=Path("benchmarks/data/evaluate"))
    made.add_argument("--contexts", type=counts, default=counts("2048:20,8192:6"))
    made.add_argument("--generate", type=int, default=128, metavar="TOKENS")
    made.add_argument("--prompts", type=int, default=20)
    made.add_argument("--prompt-tokens", type=int, default=1024)
    made.add_argument("--difference", action="append", default=[], metavar="A:B")
    made.add_argument("--skip", action="append", default=[], help="rows that end so")
    made.add_argument("--dtype", default="bf16")
    made.add_argument("--threads", type=int)
    return made


def main() -> None:
    options = parser().parse_intermixed_args()
    set_threads(options.threads)
    judge = Judge(options)
    source = open_checkpoint(options.model)
    window = window_tokens(open_checkpoint(options.folders[0][1]).config)
    runs = runs_of(options, window)
    names = [run.name for run in runs]
    unique(names)
    pairs = pairs_of(options, names)
    text = hashlib.sha256(b"".join(path.read_bytes() for path in judge.files)).hexdigest()
    asked = {"original": fingerprint(source.config, source.files), "text_sha256": text}
    asked |= {"dtype": options.dtype, "beyond_tokens": BEYOND_TOKENS}
    head: dict[str, Any] = {"benchmark": "healing", "model": options.model.name, "asked": asked}
    head["text"] = TEXTS.get(options.data.name, options.data.name)
    parts = Parts(options.output, head)

    @lru_cache(maxsize=1)
    def loaded(path: Path) -> Model:
        return judge.original if path == options.model else load(path, dtype=options.dtype)

    for run in runs:
        measure(judge, run, lambda run=run: loaded(run.path), parts)
    head["differences"] = differences(parts.rows, pairs)
    parts.write()
    print(healing_table(parts.report()))


if __name__ == "__main__":
    main()
