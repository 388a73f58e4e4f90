"""Time per token of the chunked linear memories, beside causal softmax over the same tokens.

    python benchmarks/chunked.py -o benchmarks/results/chunked_smollm2.json

Only the op is timed: one layer, all its heads, on ready random queries, keys and values, from an
empty state; no projections, no gates, no rotation. Keys of the delta rule have length 1. "far" is
given the window's output; as many prototypes as channels. Each memory runs twice, in torch and by
the native kernels (if they are built), softmax in torch. The ops take turns within every repeat, so
that a machine that drifts drifts for all of them. A length of 1 is a step, of 90 groups at once: 30
layers of 3, so that their states come from memory as they do in decoding; its time is that of the
call, one token of the whole model (softmax then sees one key). A point that by the trend of shorter
lengths takes long is measured once, and the table says so.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from resultfile import write
from torch.nn.functional import normalize

from respike.bench.fits import predicted_seconds
from respike.bench.machine import provenance
from respike.cli.show import progress, table
from respike.device import dtype_name, get_dtype, set_threads
from respike.errors import RespikeError
from respike.ops import backends
from respike.ops.attention import attend
from respike.ops.delta import delta
from respike.ops.far import Prototypes, far
from respike.ops.gla import gla

MEMORIES = ("gla", "gla, one decay", "delta", "far")
OPS = (*MEMORIES, *(f"{op}, native" for op in MEMORIES), "softmax")
LENGTHS = [1024 << i for i in range(7)]
WARM_UP_TOKENS = 1024
STEP_LAYERS = 30


class Layer:
    """The shape of one layer, and its ops on random inputs."""

    def __init__(self, heads: int, groups: int, key_dim: int, value_dim: int) -> None:
        if heads % groups:
            raise ValueError(f"{heads} query heads do not divide into {groups} groups")
        self.heads, self.groups = heads, groups
        self.key_dim, self.value_dim = key_dim, value_dim

    def ready(
        self, op: str, tokens: int, dtype: torch.dtype, chunk_tokens: int
    ) -> Callable[[], Any]:
        """The op with its inputs made, to be called without arguments."""
        layers = STEP_LAYERS if tokens == 1 else 1
        H, G, K, V = layers * self.heads, layers * self.groups, self.key_dim, self.value_dim
        op = op.removesuffix(", native")
        torch.manual_seed(0)
        q, k = torch.randn(1, tokens, H, K), torch.randn(1, tokens, G, K)
        if op == "delta":
            q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        q, k, v = q.to(dtype), k.to(dtype), torch.randn(1, tokens, G, V).to(dtype)
        if op == "softmax":
            k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
            return lambda: attend(q, k, v, causal=True)
        if op == "far":
            F = K
            prototypes = Prototypes(
                torch.randn(G, F, K) * K**-0.5, torch.randn(G, F),
                torch.randn(H, F, K) * K**-0.5, torch.randn(H), -0.1 * torch.rand(G),
            )  # fmt: skip
            near = torch.randn(1, tokens, H, V).to(dtype), torch.randn(1, tokens, H)
            real, memory = torch.tensor([[0, tokens]]), torch.zeros(1, G, F, V + 1)
            return lambda: far(q, k, v, real, prototypes, memory, near)
        state = torch.zeros(1, G, K, V)
        log_decay = -0.1 * torch.rand(1, tokens, G, K if op == "gla" else 1)
        if op == "delta":
            beta = torch.rand(1, tokens, G)
            return lambda: delta(q, k, v, beta, log_decay[..., 0], state, chunk_tokens=chunk_tokens)
        return lambda: gla(q, k, v, log_decay, state, chunk_tokens=chunk_tokens)


def seconds(run: Callable[[], Any], backend: str) -> float:
    """One call, by one backend."""
    with patch.dict(os.environ, RESPIKE_BACKEND=backend), torch.inference_mode():
        backends.kernels.cache_clear()
        backends.kernels()
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
    backends.kernels.cache_clear()
    return took


def backend_of(op: str) -> str:
    return "native" if op.endswith(", native") else "torch"


def ops_here() -> tuple[str, ...]:
    """All, or without the native kernels if there are none."""
    built = backends.native_status().available
    return tuple(op for op in OPS if built or backend_of(op) == "torch")


def measure(
    layer: Layer,
    lengths: list[int],
    dtypes: list[torch.dtype],
    chunk_tokens: dict[str, int],
    *,
    repeats: int,
    once_above_seconds: float,
    max_seconds: float,
) -> Iterator[dict[str, Any]]:
    """One row for each op, dtype and length.

    Args:
        layer: Shape.
        lengths: In tokens, ascending.
        dtypes: Of queries, keys and values; states and decays are always float32.
        chunk_tokens: Of torch's gla and delta.
        repeats: Measurements of each point.
        once_above_seconds: A point expected to take more seconds than this is measured once.
        max_seconds: And above this not at all.
    """
    points = [(op, dtype) for dtype in dtypes for op in ops_here()]
    known: dict[tuple[str, torch.dtype], list[tuple[int, float]]] = {p: [] for p in points}
    for op, dtype in points:
        seconds(layer.ready(op, WARM_UP_TOKENS, dtype, chunk_tokens.get(op, 1)), backend_of(op))
    for tokens in lengths:
        expected = {p: predicted_seconds(known[p], tokens) for p in points}
        times: dict[tuple[str, torch.dtype], list[float]] = {p: [] for p in points}
        for repeat in range(repeats):
            turn = repeat % len(points)
            for point in points[turn:] + points[:turn]:
                wanted = 1 if expected[point] > once_above_seconds else repeats
                if repeat < wanted and expected[point] <= max_seconds:
                    run = layer.ready(point[0], tokens, point[1], chunk_tokens.get(point[0], 1))
                    times[point].append(seconds(run, backend_of(point[0])))
        for (op, dtype), took in times.items():
            row = {"op": op, "dtype": dtype_name(dtype), "tokens": tokens, "n": len(took)}
            if not took:
                guess = expected[op, dtype]
                yield row | {"skipped": f"would take about {guess:.0f} s"}
                continue
            if tokens > 1:
                known[op, dtype].append((tokens, statistics.median(took)))
            per_token = [1e6 * t / tokens for t in took]
            spread = {"min": min(per_token), "max": max(per_token)}
            median = statistics.median(per_token)
            yield row | {"microseconds_per_token": {"median": median, **spread}}


def text_table(rows: list[dict[str, Any]]) -> str:
    """Lengths down, ops across, microseconds per token."""
    columns = list(dict.fromkeys((row["op"], row["dtype"]) for row in rows))
    cells = {(row["op"], row["dtype"], row["tokens"]): row for row in rows}

    def cell(row: dict[str, Any]) -> str:
        if "skipped" in row:
            return "skipped"
        part = row["microseconds_per_token"]
        if row["n"] == 1:
            return f"{part['median']:.1f} (n = 1)"
        return f"{part['median']:.1f} [{part['min']:.1f}, {part['max']:.1f}]"

    lines = [
        (f"{tokens:,}", *(cell(cells[*column, tokens]) for column in columns))
        for tokens in dict.fromkeys(row["tokens"] for row in rows)
    ]
    return table(("tokens", *(f"{op} {dtype}" for op, dtype in columns)), lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--heads", type=count_of, default=9, help="query heads (default: SmolLM2's)")
    made.add_argument("--groups", type=count_of, default=3, help="key/value heads")
    made.add_argument("--key-dim", type=count_of, default=64)
    made.add_argument("--value-dim", type=count_of, help="default: as --key-dim")
    made.add_argument("--lengths", type=lengths_of, default=LENGTHS)
    made.add_argument("--dtypes", default="bf16,f32", help="of queries, keys and values")
    made.add_argument("--gla-chunk", type=count_of, default=32, help="tokens of a chunk")
    made.add_argument("--one-decay-chunk", type=count_of, default=32)
    made.add_argument("--delta-chunk", type=count_of, default=32)
    made.add_argument("--repeats", type=count_of, default=5)
    made.add_argument("--threads", type=count_of, help="default: all cores")
    made.add_argument("--once-above", type=float, default=60, help="seconds; then n = 1")
    made.add_argument("--max-seconds", type=float, default=600, help="skipped above")
    made.add_argument("-o", "--output", type=Path, required=True)
    made.add_argument("--force", action="store_true", help="replace the output file")
    return made


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
    options = parser().parse_args()
    if options.output.exists() and not options.force:
        parser().error(f"{options.output} already exists; add --force to replace it")
    set_threads(options.threads)
    value_dim = options.value_dim or options.key_dim
    lengths, names = sorted(set(options.lengths)), options.dtypes.split(",")
    try:
        layer = Layer(options.heads, options.groups, options.key_dim, value_dim)
        dtypes = [get_dtype(name) for name in names]
    except (RespikeError, ValueError) as error:
        parser().error(str(error))
    chunks = (options.gla_chunk, options.one_decay_chunk, options.delta_chunk)
    chunk_tokens = dict(zip(OPS, chunks, strict=False))
    limits = {"repeats": options.repeats, "once_above_seconds": options.once_above}
    limits["max_seconds"] = options.max_seconds
    rows: list[dict[str, Any]] = []
    with progress("points") as step:
        for row in measure(layer, lengths, dtypes, chunk_tokens, **limits):
            rows.append(row)
            step(len(rows), len(lengths) * len(dtypes) * len(ops_here()))
    settings = {**vars(layer), "lengths": lengths, "dtypes": names, "chunk_tokens": chunk_tokens}
    report = {"benchmark": "chunked", **provenance(), "settings": settings | limits, "rows": rows}
    report["machine"] |= {"cores": os.cpu_count()}
    write(options.output, report)
    print(text_table(rows))
    print(f"wrote {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
