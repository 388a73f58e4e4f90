"""Time and memory against context length, for one or more models side by side.

    python benchmarks/context.py original=models/X.gguf retrieval=OUT -o results.json

Each model lives in a child process of its own. Only one child works at a time, and they take turns
within every repeat, so that a machine that drifts drifts for all of them. What is timed is the
torch path as it is today; kernels for attention and matrix products come later.

Per length: prefill of random tokens up to the first chosen token (the time to first token), then
decode at that depth. One decode step before the timed ones is not counted: it is where the growing
cache makes room, once in a quarter of its length. Memory is the peak of the whole process: weights,
Python and torch included (`base_rss_bytes` is what it holds before the run).
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from respike.bench.machine import provenance
from respike.cli.show import human_bytes, progress, table
from respike.device import dtype_name, set_threads
from respike.errors import BackendError, RespikeError
from respike.loading import load
from respike.ops import backends

PATH_NOTE = "plain PyTorch path; native kernels for attention and matrix products come later"
WARM_UP_TOKENS = 1024
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Runner:
    """A loaded model that measures itself; lives in a child process."""

    def __init__(self, path: str, dtype: str | None, threads: int) -> None:
        set_threads(threads)
        self.model = load(path, dtype=dtype)
        self.memory_by = "peak of the process, reset before each run"
        if not reset_peak():
            self.memory_by = "peak of the process so far; lengths grow"

    def facts(self) -> dict[str, Any]:
        """What the model is."""
        config, decoder = self.model.config, self.model.decoder
        return {
            "path": str(self.model.path),
            "fingerprint": self.model.fingerprint,
            "dtype": dtype_name(decoder.embedding.dtype),
            "weight_bytes": sum(p.nbytes for p in decoder.parameters()),
            "kv_groups": config.num_hidden_layers * config.num_key_value_heads,
            "softmax_groups": len(config.softmax_groups()),
            "trained_tokens": config.max_position_embeddings,
            "memory_by": self.memory_by,
        }

    def run(self, context_tokens: int, decode_tokens: int, seed: int) -> dict[str, float]:
        """One measurement, from an empty state."""
        decoder = self.model.decoder
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.randint(decoder.config.vocab_size, (1, context_tokens), generator=draw)
        base = memory("VmRSS")
        reset_peak()
        with torch.inference_mode():
            start = time.perf_counter()
            logits, state = decoder(tokens, logits="last")
            token = logits[:, 0].argmax(-1, keepdim=True)
            first = time.perf_counter()
            state_bytes = state.nbytes()
            for step in range(decode_tokens + 1):
                if step == 1:
                    start_decode = time.perf_counter()
                logits, state = decoder(token, state, logits="last")
                token = logits[:, 0].argmax(-1, keepdim=True)
            end = time.perf_counter()
        return {
            "ttft_seconds": first - start,
            "prefill_tokens_per_second": context_tokens / (first - start),
            "decode_tokens_per_second": decode_tokens / (end - start_decode),
            "seconds": end - start,
            "state_bytes": state_bytes,
            "base_rss_bytes": base,
            "peak_rss_bytes": memory("VmHWM"),
        }


def reset_peak() -> bool:
    """Make the peak of this process count from here, where the system can do that."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes, or its peak so far where there is no /proc.

    Not getrusage on Linux: a child starts with the peak of the parent it was made from.
    """
    if STATUS.exists():
        lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _serve(pipe: Connection, path: str, dtype: str | None, threads: int) -> None:
    """The child: load, then answer (method, arguments) until the parent hangs up."""
    try:
        runner = Runner(path, dtype, threads)
        pipe.send(runner.facts())
        while True:
            method, arguments = pipe.recv()
            pipe.send(getattr(runner, method)(*arguments))
    except RespikeError as error:
        pipe.send(error)
    except (EOFError, KeyboardInterrupt):
        return


class ChildError(BackendError):
    """A child process ended without an answer."""


class Child:
    """The parent's end of a `Runner`."""

    def __init__(self, path: str, dtype: str | None, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.path = path
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(
            target=_serve, args=(theirs, path, dtype, threads), daemon=True
        )
        self.process.start()
        theirs.close()
        self.facts: dict[str, Any] = self._answer()

    def run(self, *arguments: int) -> dict[str, float]:
        """See `Runner.run`."""
        try:
            self.pipe.send(("run", arguments))
        except OSError as error:
            raise ChildError(f"{self.path}: its process has ended") from error
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise ChildError(
                f"{self.path}: its process ended with code {self.process.exitcode}, "
                "which at -9 means that memory ran out"
            ) from error
        if isinstance(answer, RespikeError):
            raise answer
        return answer


def measure(
    models: Mapping[str, str | Path],
    lengths: Sequence[int],
    *,
    repeats: int = 3,
    decode_tokens: int = 16,
    threads: int | None = None,
    dtype: str | None = None,
    max_seconds: float = 600,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure the models, taking turns.

    Args:
        models: Name -> path for `respike.load`.
        lengths: Context lengths in tokens; taken in ascending order.
        repeats: Measurements of each model at each length.
        decode_tokens: Timed decode steps after each prefill.
        threads: Of each child; None takes all cores.
        dtype: f32, bf16 or f16; None takes each checkpoint's own.
        max_seconds: A measurement that would take longer, by the trend of shorter lengths, is
            skipped and listed.
        progress: Called with (tokens done, tokens), over all models and repeats.

    Returns:
        The results as they are written to the file.
    """
    used = set_threads(threads)
    lengths = sorted(set(lengths))
    total = sum(lengths) * repeats * len(models)
    children: dict[str, Child] = {}
    try:
        for name, path in models.items():
            children[name] = Child(str(path), dtype, used)
            children[name].run(WARM_UP_TOKENS, 2, 0)
        session = Session(children, repeats, decode_tokens, max_seconds)
        for length in lengths:
            session.measure(length, lambda done: progress and progress(done, total))
        facts = {name: child.facts for name, child in children.items()}
    finally:
        for child in children.values():
            child.close()
    settings = {
        "lengths": lengths, "repeats": repeats, "decode_tokens": decode_tokens,
        "max_seconds": max_seconds, "tokens": "random", "path": PATH_NOTE,
    }  # fmt: skip
    report = {"benchmark": "context", **provenance(), "settings": settings, "models": facts}
    report["machine"] |= {"cores": os.cpu_count(), "kernels": _kernels()}
    return {**report, "rows": session.rows, "skipped": session.skipped}


class Session:
    """Rows and skipped points, length by length."""

    def __init__(
        self, children: Mapping[str, Child], repeats: int, decode_tokens: int, max_seconds: float
    ) -> None:
        self.children, self.repeats = children, repeats
        self.decode_tokens, self.max_seconds = decode_tokens, max_seconds
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.seconds: dict[str, list[tuple[int, float]]] = {name: [] for name in children}
        self.dead: dict[str, str] = {}
        self.done_tokens = 0

    def measure(self, length: int, report: Callable[[int], object]) -> None:
        """Every model at one length, ``repeats`` times in turn."""
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in self.children}
        reasons = {name: self._obstacle(name, length) for name in self.children}
        names = list(self.children)
        for repeat in range(self.repeats):
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                if reasons[name] is None:
                    try:
                        run = self.children[name].run(length, self.decode_tokens, repeat)
                        runs[name].append(run)
                    except ChildError as error:
                        reasons[name] = self.dead[name] = str(error)
                self.done_tokens += length
                report(self.done_tokens)
        for name, reason in reasons.items():
            if runs[name]:
                self.rows.append(summary(name, length, runs[name]))
                took = statistics.median(r["seconds"] for r in runs[name])
                self.seconds[name].append((length, took))
            if reason is not None:
                self.skipped.append({"model": name, "context_tokens": length, "reason": reason})

    def _obstacle(self, name: str, length: int) -> str | None:
        if name in self.dead:
            return self.dead[name]
        expected = predicted_seconds(self.seconds[name], length)
        if expected > self.max_seconds:
            return f"would take about {expected:.0f} s, more than {self.max_seconds:g} s"
        return None


def predicted_seconds(known: Sequence[tuple[int, float]], length: int) -> float:
    """Seconds at ``length`` by the power law through the last two (length, seconds); 0 if unknown.

    The power is held between 1 and 2: prefill is linear at best and quadratic at worst.
    """
    if not known:
        return 0.0
    power, (tokens, seconds) = 2.0, known[-1]
    if len(known) > 1:
        before, took = known[-2]
        power = math.log(seconds / took) / math.log(tokens / before)
        power = min(2.0, max(1.0, power))
    return seconds * (length / tokens) ** power


def summary(name: str, length: int, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One row: medians with their spread, and the highest memory."""
    row: dict[str, Any] = {"model": name, "context_tokens": length, "n": len(runs)}
    for key in ("ttft_seconds", "prefill_tokens_per_second", "decode_tokens_per_second"):
        values = [run[key] for run in runs]
        row[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    row["state_bytes"] = runs[0]["state_bytes"]
    row["base_rss_bytes"] = max(run["base_rss_bytes"] for run in runs)
    row["peak_rss_bytes"] = max(run["peak_rss_bytes"] for run in runs)
    return row


def _kernels() -> dict[str, str]:
    """Op -> what runs it here; every op not named is torch."""
    return {c.op: f"{c.backend} {c.level or ''}".strip() for c in backends.table()}


def text_table(report: Mapping[str, Any]) -> str:
    """The rows for a terminal."""

    def spread(row: Mapping[str, Any], key: str, digits: int) -> str:
        part = row[key]
        low, high = f"{part['min']:.{digits}f}", f"{part['max']:.{digits}f}"
        return f"{part['median']:.{digits}f} [{low}, {high}]"

    header = ("tokens", "model", "first token, s", "prefill tok/s", "decode tok/s", "state", "peak")
    rows = [
        (
            f"{row['context_tokens']:,}",
            row["model"],
            spread(row, "ttft_seconds", 2),
            f"{row['prefill_tokens_per_second']['median']:.0f}",
            spread(row, "decode_tokens_per_second", 1),
            human_bytes(row["state_bytes"]),
            human_bytes(row["peak_rss_bytes"]),
        )
        for row in report["rows"]
    ]
    lines = [table(header, rows)]
    for gap in report["skipped"]:
        lines.append(f"skipped: {gap['model']} at {gap['context_tokens']:,}: {gap['reason']}")
    return "\n".join(lines)


def _named_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PATH")
    return name, path


def lengths_of(text: str) -> list[int]:
    try:
        lengths = [int(n) for n in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected counts such as 1024,2048")
    return lengths


def count_of(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a count of at least 1")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=_named_path, metavar="NAME=PATH")
    parser.add_argument("--lengths", type=lengths_of, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--repeats", type=count_of, default=3)
    parser.add_argument("--decode-tokens", type=count_of, default=16)
    parser.add_argument("--threads", type=count_of, help="default: all cores")
    parser.add_argument("--dtype", help="f32, bf16 or f16; default: each checkpoint's own")
    parser.add_argument("--max-seconds", type=float, default=600, help="per measurement")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="replace the output file")
    options = parser.parse_args()
    if options.output.exists() and not options.force:
        parser.error(f"{options.output} already exists; add --force to replace it")
    try:
        with progress("tokens") as step:
            report = measure(
                dict(options.models), options.lengths, repeats=options.repeats,
                decode_tokens=options.decode_tokens, threads=options.threads,
                dtype=options.dtype, max_seconds=options.max_seconds, progress=step,
            )  # fmt: skip
    except RespikeError as error:
        sys.exit(f"error: {error}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(text_table(report))
    print(f"wrote {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
