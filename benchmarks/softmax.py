"""Softmax attention: our kernel beside torch's fused one, prefill and decoding.

    python benchmarks/softmax.py -o benchmarks/results/softmax_MACHINE.json

Only the op is timed: one layer, on ready random queries and caches; no projections, no rotation.
Prefill with a window goes in spans of 512 tokens after the window and its sinks; torch gets the
mask of a window, ready made. Decoding reads another cache every call, so that it comes from memory
and not from a processor's cache, and stands beside the speed at which one thread can read memory.
Contenders give the same outputs, checked before, and take turns; median and range of the rounds.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from chunked import count_of, lengths_of
from linear import read_bandwidth, use_level
from resultfile import write
from torch import Tensor

from respike.bench.machine import provenance
from respike.cli.show import progress, table
from respike.device import dtype_name, get_dtype, set_threads
from respike.ops.attention import attend, attention_bias, visible
from respike.ops.softmax import Keys, quantise_rows, window_softmax

SPAN_TOKENS = 512
FROM_MEMORY_BYTES = 256 << 20
MAX_GAP = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference from torch's output, over its largest magnitude."""


@dataclass(frozen=True)
class Shape:
    """Of one layer."""

    heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype

    def caches(self, tokens: int) -> Keys:
        shape = (1, self.groups, tokens, self.head_dim)
        return Keys(torch.randn(shape).to(self.dtype), torch.randn(shape).to(self.dtype))

    def queries(self, tokens: int) -> Tensor:
        return torch.randn(1, tokens, self.heads, self.head_dim).to(self.dtype)


@dataclass(frozen=True)
class Point:
    """What is measured: contenders by name, and what one call of them is worth."""

    task: str
    tokens: int
    calls: dict[str, Callable[[], Tensor]]
    products: float
    """Floating-point operations that are seen, of one call."""
    nbytes: dict[str, int]
    """Bytes of caches each contender reads."""


def causal(shape: Shape, tokens: int, levels: list[str]) -> Point:
    q, keys = shape.queries(tokens), shape.caches(tokens)
    calls = {"torch": lambda: attend(q, keys.k, keys.v, causal=True)}
    calls |= {level: lambda: window_softmax(q, keys)[0] for level in levels}
    pairs = tokens * (tokens + 1) / 2
    return Point("causal", tokens, calls, 4 * pairs * shape.heads * shape.head_dim, {})


def window(shape: Shape, length: int, sinks: int, levels: list[str]) -> Point:
    """One span far into a sequence."""
    q, keys, first = shape.queries(SPAN_TOKENS), shape.caches(SPAN_TOKENS + length - 1), 10_000
    sink = shape.caches(sinks)
    start = first + length - 1
    positions = torch.cat((torch.arange(sinks), first + torch.arange(keys.k.shape[2])))
    seen = visible(start + torch.arange(SPAN_TOKENS)[None], positions[None], length, sinks)
    bias = attention_bias(seen, shape.dtype)
    k, v = (torch.cat((a, b), 2) for a, b in zip(sink[:2], keys[:2], strict=True))
    where = {"first": first, "start": start, "window_tokens": length}
    calls = {"torch": lambda: attend(q, k, v, bias)}
    calls |= {level: lambda: window_softmax(q, keys, sink, **where)[0] for level in levels}
    pairs = SPAN_TOKENS * (length + sinks)
    return Point(
        f"window {length}", SPAN_TOKENS, calls, 4 * pairs * shape.heads * shape.head_dim, {}
    )


def decode(shape: Shape, tokens: int, levels: list[str]) -> Point:
    q, one = shape.queries(1), shape.caches(tokens)
    nbytes = one.k.nbytes + one.v.nbytes
    copies = range(max(2, FROM_MEMORY_BYTES // nbytes))
    exact = [Keys(one.k.clone(), one.v.clone()) for _ in copies]
    (k, k_scale), (v, v_scale) = quantise_rows(one.k), quantise_rows(one.v)
    int8 = [Keys(k.clone(), v.clone(), k_scale.clone(), v_scale.clone()) for _ in copies]
    turn, turn8 = cycle(exact), cycle(int8)
    last = {"start": tokens - 1}

    def by_torch() -> Tensor:
        keys = next(turn)
        return attend(q, keys.k, keys.v)

    calls = {"torch": by_torch}
    for level in levels:
        calls[level] = lambda: window_softmax(q, next(turn), **last)[0]
        calls[f"{level} int8"] = lambda: window_softmax(q, next(turn8), **last)[0]
    small = k.nbytes + v.nbytes + k_scale.nbytes + v_scale.nbytes
    sizes = {name: small if name.endswith("int8") else nbytes for name in calls}
    return Point("decode", tokens, calls, 4 * tokens * shape.heads * shape.head_dim, sizes)


def check(point: Point, dtype: torch.dtype) -> None:
    """That contenders agree; int8 caches are another function and are left out."""
    expected = point.calls["torch"]().float()
    for name, call in point.calls.items():
        choose(name)
        gap = (call().float() - expected).abs().max() / expected.abs().max()
        if not name.endswith("int8") and not gap <= MAX_GAP[dtype]:
            raise SystemExit(f"{name} is {gap:.3g} off torch: {point.task}, {point.tokens} tokens")


def choose(name: str) -> None:
    if name != "torch":
        use_level(name.split()[0])


def seconds(call: Callable[[], Tensor], least_seconds: float) -> float:
    """Of one call, from as many as take ``least_seconds``."""
    calls, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < least_seconds or calls == 0:
        call()
        calls += 1
    return took / calls


def measure(point: Point, rounds: int, least_seconds: float) -> Iterator[dict[str, Any]]:
    times: dict[str, list[float]] = {name: [] for name in point.calls}
    names = list(point.calls)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            choose(name)
            times[name].append(seconds(point.calls[name], least_seconds))
    for name, took in times.items():
        row = {"task": point.task, "tokens": point.tokens, "contender": name, "n": rounds}
        row["seconds"] = {"median": median(took), "min": min(took), "max": max(took)}
        row["gflops"] = point.products / median(took) / 1e9
        if name in point.nbytes:
            row["gigabytes_per_second"] = point.nbytes[name] / median(took) / 1e9
        yield row


def text_table(rows: list[dict[str, Any]]) -> str:
    head = ("task", "tokens", "by", "ms [min, max]", "GFLOP/s", "GB/s")
    lines = []
    for row in rows:
        ms = {key: 1e3 * value for key, value in row["seconds"].items()}
        rate = row.get("gigabytes_per_second")
        time_ms = f"{ms['median']:.3g} [{ms['min']:.3g}, {ms['max']:.3g}]"
        cells = (row["task"], f"{row['tokens']:,}", row["contender"], time_ms)
        lines.append((*cells, f"{row['gflops']:.0f}", "" if rate is None else f"{rate:.1f}"))
    return table(head, lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--heads", type=count_of, default=9, help="query heads (default: SmolLM2's)")
    made.add_argument("--groups", type=count_of, default=3, help="key/value heads")
    made.add_argument("--head-dim", type=count_of, default=64)
    made.add_argument("--window", type=count_of, default=256)
    made.add_argument("--sinks", type=count_of, default=4)
    made.add_argument("--dtype", default="bf16")
    made.add_argument("--causal", type=lengths_of, default=[1024 << i for i in range(5)])
    made.add_argument("--decode", type=lengths_of, default=[512 << 2 * i for i in range(4)])
    made.add_argument("--levels", default="avx512bf16,avx2")
    made.add_argument("--rounds", type=count_of, default=5)
    made.add_argument("--least-seconds", type=float, default=0.1, help="of each measurement")
    made.add_argument("--threads", type=count_of, default=1)
    made.add_argument("-o", "--output", type=Path, required=True)
    made.add_argument("--force", action="store_true", help="replace the output file")
    return made


def main() -> None:
    options = parser().parse_args()
    if options.output.exists() and not options.force:
        parser().error(f"{options.output} already exists; add --force to replace it")
    set_threads(options.threads)
    torch.manual_seed(0)
    levels = options.levels.split(",")
    dtype = get_dtype(options.dtype)
    shape = Shape(options.heads, options.groups, options.head_dim, dtype)
    points: list[Callable[[], Point]] = [
        lambda: window(shape, options.window, options.sinks, levels)
    ]
    points += [lambda n=n: causal(shape, n, levels) for n in options.causal]  # type: ignore[misc]
    points += [lambda n=n: decode(shape, n, levels) for n in options.decode]  # type: ignore[misc]
    rows: list[dict[str, Any]] = []
    before = read_bandwidth(options.rounds)
    with progress("points") as step, torch.inference_mode():
        for done, make in enumerate(points):
            point = make()
            check(point, dtype)
            rows += measure(point, options.rounds, options.least_seconds)
            step(done + 1, len(points))
    settings = {**vars(options), "output": str(options.output), "dtype": dtype_name(dtype)}
    report = {"benchmark": "softmax", **provenance(), "settings": settings}
    report["machine"] |= {"cores": os.cpu_count()}
    report |= {"read_before": before, "read_after": read_bandwidth(options.rounds)}
    write(options.output, report | {"rows": rows})
    print(text_table(rows))
    print(f"one thread reads memory at {before['GB_per_s']} GB/s")


if __name__ == "__main__":
    main()
