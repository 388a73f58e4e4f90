"""A model folder larger than the memory that made it: conversion shard by shard, with its peak.

    python benchmarks/shards.py --shape qwen2.5-1.5b --recipe spikingbrain-76b --set moe.experts=4 \
        --tokenizer models/SmolLM2-135M-Instruct.gguf --work DIR --shard-mib 256

Writes a source folder of that shape with random weights, converts it in a process of its own, and
prints the sizes of both folders beside the largest resident memory of that process: torch itself,
and what the conversion needed on top. Exits with 1 if that was more than three shards.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from respike.bench.machine import provenance
from respike.bench.shapes import RandomCheckpoint, shape_config
from respike.checkpoint import open_checkpoint
from respike.checkpoint.families import expected_tensors
from respike.conversion import convert, plan
from respike.conversion.export import FORMS
from respike.conversion.shards import write_json, write_shards
from respike.loading import load_tokenizer
from respike.recipe import load_recipe

MIB = 1 << 20


def peak_bytes() -> int:
    """Largest resident memory of this process so far.

    Not from getrusage, which on Linux remembers the parent's.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def make_source(folder: Path, shape: str, tokenizer: str, shard_bytes: int) -> None:
    """A Hugging Face folder of the shape; no more than a shard of it is ever in memory."""
    folder.mkdir(parents=True)
    config = shape_config(shape)
    random = RandomCheckpoint(config, load_recipe("identity"))
    shapes = dict(expected_tensors(config))
    write_shards(folder, shapes, random.read, torch.bfloat16, shard_bytes)
    raw = FORMS["full softmax"].config(config)
    write_json(folder / "config.json", raw | {"bos_token_id": 0, "eos_token_id": 0})
    load_tokenizer(open_checkpoint(tokenizer)).save(folder)


def measured(source: Path, out: Path, recipe: str, overrides: list[str], shard: int) -> None:
    """What the child does: convert, and say how much memory that took."""
    made = plan(source, load_recipe(recipe, overrides))
    before = peak_bytes()
    report = convert(made, out, shard_bytes=shard)
    print(json.dumps({
        "parameters": report["parameters"], "weight_bytes": report["weight_bytes"],
        "peak_before_bytes": before, "peak_bytes": peak_bytes(),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-1.5b")
    parser.add_argument("--recipe", default="spikingbrain-76b")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--tokenizer", help="A model whose tokenizer the source gets.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shard-mib", type=int, default=256)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    source, out, shard = args.work / "source", args.work / "out", args.shard_mib * MIB
    if args.child:
        measured(source, out, args.recipe, args.overrides, shard)
        return
    if not source.exists():
        make_source(source, args.shape, args.tokenizer, shard)
    words = [sys.executable, *sys.argv, "--child"]
    ran = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(ran.stdout)
    found |= {
        "shape": args.shape, "recipe": args.recipe, "overrides": args.overrides,
        "shard_bytes": shard, **provenance(),
    }  # fmt: skip
    for name in ("weight_bytes", "peak_before_bytes", "peak_bytes", "shard_bytes"):
        print(f"{name.removesuffix('_bytes'):>12}  {found[name] / MIB:,.0f} MiB")
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(found["peak_bytes"] - found["peak_before_bytes"] > 3 * shard)


if __name__ == "__main__":
    main()
