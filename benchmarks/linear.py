"""Packed linear layers against torch's, and against the speed of memory.

    python benchmarks/linear.py -o benchmarks/results/linear_MACHINE.json

For 1 and 4 rows of x (decoding) every call reads other weights, so that they come from memory and
not from a cache; the figure is bytes of weights per second. For 512 rows (prefill) it is arithmetic
per second. "int8 x int8 g64" rounds activations too, in scale groups of 64 inputs; its error is
that of the rounding: the RMS of what it adds, over that of the exact outputs, for normal random x.
Contenders take turns; median and range of the rounds. Random weights: only the speed is measured.
One thread unless --threads says otherwise.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from resultfile import write
from torch import Tensor
from torch.nn.functional import linear

from respike.bench.machine import provenance
from respike.device import set_threads
from respike.ops import backends
from respike.ops.linear import ACTIVATIONS, packed_linear
from respike.ops.packed import GROUP_SIZES, PackedWeight, pack
from respike.ops.placing import place_together

SHAPES = ((576, 576), (576, 1536), (1536, 576), (896, 4864), (4864, 896), (576, 49152))
"""(inputs, outputs): layers and head of SmolLM2-135M, layers of Qwen2.5-0.5B."""
FROM_MEMORY_BYTES = 256 << 20
BY_BF16 = ("avx512bf16", "amx")
"""Levels with kernels of their own for many rows of bfloat16 only, and for int8."""


@dataclass(frozen=True)
class Contender:
    """Something that multiplies by the same matrix."""

    name: str
    level: str | None
    nbytes: int
    call: Callable[[Tensor], Tensor]
    """Multiplies by the next copy of the weight."""
    dtype: torch.dtype
    rounding_rms: float | None = None


def use_level(level: str) -> None:
    os.environ["RESPIKE_CPU"] = level
    backends.kernels.cache_clear()


def torch_contender(weight: Tensor, dtype: torch.dtype, copies: int) -> Contender:
    turn = cycle([weight.to(dtype).clone() for _ in range(copies)])
    name = "torch bf16" if dtype == torch.bfloat16 else "torch f32"
    nbytes = weight.numel() * dtype.itemsize
    return Contender(name, None, nbytes, lambda x: linear(x, next(turn)), dtype)


def our_contenders(
    packed: PackedWeight, rows: int, levels: list[str], activations: str = "exact"
) -> list[Contender]:
    kind = packed.kind
    copies = 1 if rows > 4 else -(-FROM_MEMORY_BYTES // packed.nbytes)
    turn = cycle(place_together([packed] * copies))
    dtype = torch.float32 if kind == "f32" else torch.bfloat16
    name, error = kind, None
    if activations == "int8":
        name, error = f"{kind} x int8 g{packed.group_size}", rounding_error(packed)

    def call(x: Tensor) -> Tensor:
        return packed_linear(x, next(turn), None, activations)

    return [Contender(name, level, packed.nbytes, call, dtype, error) for level in levels]


def rounding_error(packed: PackedWeight) -> float:
    x = torch.randn(64, packed.in_features)
    exact, rounded = (packed_linear(x, packed, None, how) for how in ACTIVATIONS)
    return float((rounded - exact).norm() / exact.norm())


def seconds_per_call(contender: Contender, x: Tensor, calls: int) -> float:
    if contender.level is not None:
        use_level(contender.level)
    x = x.to(contender.dtype)
    contender.call(x)
    start = time.perf_counter()
    for _ in range(calls):
        contender.call(x)
    return (time.perf_counter() - start) / calls


def measure(rows: int, inputs: int, outputs: int, rounds: int) -> list[dict[str, Any]]:
    """All contenders in turn, ``rounds`` times."""
    weight, x = 0.02 * torch.randn(outputs, inputs), torch.randn(rows, inputs)
    top = backends.LEVELS[: backends.LEVELS.index(highest_level()) + 1][1:]
    few = rows <= 4
    levels = [level for level in top if not (few and level in BY_BF16)]
    contenders = []
    for dtype in (torch.bfloat16, torch.float32):
        nbytes = weight.numel() * dtype.itemsize
        copies = -(-FROM_MEMORY_BYTES // nbytes) if few else 1
        contenders.append(torch_contender(weight, dtype, copies))
    for kind in ("bf16", "int8", "int4", "f32"):
        able = [level for level in levels if kind != "f32" or level not in BY_BF16]
        contenders += our_contenders(pack(weight, kind, search=False), rows, able)
    for kind, group_size in product(("int8", "int4"), GROUP_SIZES):
        packed = pack(weight, kind, group_size, search=False)
        contenders += our_contenders(packed, rows, top, "int8")
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, found in zip(contenders, times, strict=True):
            calls = -(-FROM_MEMORY_BYTES // contender.nbytes) if few else 2
            found.append(seconds_per_call(contender, x, calls))
    return [
        row_of(contender, found, rows, inputs, outputs)
        for contender, found in zip(contenders, times, strict=True)
    ]


def row_of(
    contender: Contender, found: list[float], rows: int, inputs: int, outputs: int
) -> dict[str, Any]:
    middle = median(found)
    row: dict[str, Any] = {
        "rows": rows,
        "inputs": inputs,
        "outputs": outputs,
        "contender": contender.name,
        "level": contender.level,
        "us": round(1e6 * middle, 1),
        "us_range": [round(1e6 * t, 1) for t in (min(found), max(found))],
        "weight_bytes": contender.nbytes,
    }
    if contender.rounding_rms is not None:
        row["rounding_rms"] = round(contender.rounding_rms, 5)
    if rows <= 4:
        row["GB_per_s"] = round(contender.nbytes / middle / 1e9, 2)
    else:
        row["GFLOP_per_s"] = round(2 * rows * inputs * outputs / middle / 1e9, 1)
    print(json.dumps(row), flush=True)
    return row


def highest_level() -> str:
    os.environ.pop("RESPIKE_CPU", None)
    backends.kernels.cache_clear()
    ready = backends.kernels()
    if ready is None:
        raise SystemExit("this measures the native kernels, and there are none here")
    return backends.LEVELS[ready.level]


def read_bandwidth(rounds: int) -> dict[str, Any]:
    """Bytes per second of reading memory in order, by one thread; huge pages if there are any."""
    (block,) = place_together([pack(torch.ones(64 * 1024, 1024), "f32")])
    ready = backends.kernels()
    assert ready is not None
    speeds = []
    for _ in range(rounds):
        start = time.perf_counter()
        ready.module.read_all(block.data.data_ptr(), block.nbytes // 8)
        speeds.append(block.nbytes / (time.perf_counter() - start) / 1e9)
    found = [round(speed, 2) for speed in (median(speeds), min(speeds), max(speeds))]
    return {"GB_per_s": found[0], "range": found[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 512])
    options = parser.parse_args()
    set_threads(options.threads)
    highest_level()
    report: dict[str, Any] = {**provenance(), "rounds": options.rounds}
    report["read_before"] = read_bandwidth(options.rounds)
    report["rows"] = [
        row
        for inputs, outputs in SHAPES
        for rows in options.rows
        for row in measure(rows, inputs, outputs, options.rounds)
    ]
    highest_level()
    report["read_after"] = read_bandwidth(options.rounds)
    write(options.output, report)


if __name__ == "__main__":
    main()
