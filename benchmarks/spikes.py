"""Event-driven products against dense ones, by silence.

    python benchmarks/spikes.py -o benchmarks/results/spikes_MACHINE.json

One row of x, so what a token costs: weights come from memory (every call reads another copy), or,
with --cached, from the cache. Silent inputs are drawn at random, counts are those of 8 bits. The
dense peers: the same event kernel with nothing silent, and the packed linear layer of the same
weights with bfloat16 activations. Random weights: only the speed is measured. Contenders take
turns; median and range of the rounds. One thread unless --threads says otherwise.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from resultfile import write

from respike.bench.machine import provenance
from respike.device import set_threads
from respike.ops import backends
from respike.ops.linear import packed_linear
from respike.ops.packed import PackedWeight, pack
from respike.ops.placing import place_side_by_side, place_together
from respike.ops.spike_linear import spike_linear

SHAPES = ((576, 3072), (1536, 576), (896, 9728), (4864, 896), (4096, 22016))
"""(inputs, outputs), gate and up together: SmolLM2-135M's MLP, Qwen2.5-0.5B's, a 7B model's."""
SILENT = (0.0, 0.3, 0.5, 0.7, 0.9)
FROM_MEMORY_BYTES = 256 << 20


def contenders(
    packed: PackedWeight, copies: int, silent: tuple[float, ...]
) -> dict[str, Callable[[], object]]:
    """Name -> one call on the next copy of the weight."""
    turn = cycle(place_together([packed] * copies))
    rows = cycle([w for (w,) in place_side_by_side([[packed]] * copies)])
    step, calls = torch.ones(1, 1), {}
    x = torch.randn(1, packed.in_features).bfloat16()
    calls["dense, bf16 activations"] = lambda: packed_linear(x, next(turn))
    for share in silent:
        counts = torch.randint(1, 128, (1, packed.in_features), dtype=torch.int32)
        quiet = torch.randperm(packed.in_features)[: round(share * packed.in_features)]
        counts[:, quiet] = 0
        calls[f"events, {share:.0%} silent"] = lambda counts=counts: spike_linear(  # type: ignore[misc]
            counts, step, next(rows), form="events"
        )
    return calls


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def measure(
    inputs: int, outputs: int, kind: str, rounds: int, cached: bool
) -> list[dict[str, Any]]:
    """All contenders in turn, ``rounds`` times."""
    packed = pack(0.02 * torch.randn(outputs, inputs), kind, search=False)
    copies = 1 if cached else max(2, -(-FROM_MEMORY_BYTES // packed.nbytes))
    calls = contenders(packed, copies, SILENT)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds_per_call(call, max(20, copies)))
    dense = median(times["events, 0% silent"])
    rows = []
    for name, found in times.items():
        row = {
            "inputs": inputs,
            "outputs": outputs,
            "weights": kind,
            "weight_bytes": packed.nbytes,
            "from": "cache" if cached else "memory",
            "contender": name,
            "us": round(1e6 * median(found), 1),
            "us_range": [round(1e6 * t, 1) for t in (min(found), max(found))],
            "times_the_speed_at_no_silence": round(dense / median(found), 2),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", nargs="+", default=["int8", "int4"])
    parser.add_argument("--cached", action="store_true")
    options = parser.parse_args()
    set_threads(options.threads)
    ready = backends.kernels()
    if ready is None:
        raise SystemExit("this measures the native kernels, and there are none here")
    report: dict[str, Any] = {
        **provenance(),
        "rounds": options.rounds,
        "level": backends.LEVELS[ready.level],
    }
    report["rows"] = [
        row
        for inputs, outputs in SHAPES
        for kind in options.weights
        for row in measure(inputs, outputs, kind, options.rounds, options.cached)
    ]
    write(options.output, report)


if __name__ == "__main__":
    main()
