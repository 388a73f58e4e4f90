"""Speed for silence: KL against tokens a second and against bytes a token, beside the peers.

    python benchmarks/spike_frontier.py models/SmolLM2-135M-Instruct.gguf \
        --vs llama.cpp transformers -o benchmarks/results/spikes_frontier-smollm2.json

Decoding of one sequence, on one thread and on two. Ours: dense with each kind of weights, and by
events at several silences (folders of `respike spikes`, kept in --work), and folders trained
towards silence (--trained); llama.cpp with each of its weights, transformers in bfloat16. Speed and
KL of a row are of the same files, each measurement in a process of its own, the contenders taking
turns. KL is to the file as it is dequantised, in float32, on the built-in text, with a 95 %
interval over contexts. Bytes a token are those of weights that are read: by events what the census
counted on the same text.
"""

import argparse
import sys
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy
import torch
from matplotlib import pyplot
from resultfile import write
from torch import Tensor

from respike.bench.contenders import Subject, field_of
from respike.bench.machine import provenance
from respike.bench.peer_llama_cpp import FILE_TYPES
from respike.bench.process import run_child
from respike.checkpoint import fingerprint, open_checkpoint
from respike.checkpoint.folder import read_json
from respike.evaluation import mean_interval
from respike.loading import load_tokenizer
from respike.spiking import Goal, Measure, spike
from respike.text import contexts

CONTEXT_TOKENS, PROMPT_TOKENS = 512, 256
PEER_SETTING = "flash on, f16 cache"


@dataclass(frozen=True)
class Contender:
    """One row.

    Attributes:
        kind: dense, events or the peer's name.
        weights: What its layers are stored in.
        module: For `run_child`.
        job: But for what is asked.
        python: The interpreter.
        spikes: The census of its folder; None if it does not spike.
        files: The artefact.
    """

    name: str
    kind: str
    weights: str
    module: str
    job: dict[str, Any]
    python: str
    spikes: dict[str, Any] | None
    files: Sequence[Path]


def ours(model: Path, options: argparse.Namespace) -> list[Contender]:
    """Dense, then by events; missing folders are made."""

    def one(name: str, kind: str, path: Path, weights: str, head: str) -> Contender:
        spec = {"path": str(path), "dtype": options.dtype, "weights": head}
        report = path / "report.json"
        spikes = read_json(report).get("spikes") if kind == "events" else None
        files = open_checkpoint(path).files
        return Contender(
            name, kind, weights, "ours", {"model": spec}, sys.executable, spikes, files
        )

    found = [one(f"dense {w}", "dense", model, w, w) for w in ("stored", "int8", "int4")]
    for weights in options.weights:
        for silent in options.silent:
            folder = options.work / f"{model.stem}-{weights}-{silent:g}-{options.budget}"
            if not folder.exists():
                print(f"making {folder}", flush=True)
                goal = Goal(weights=weights, silent_frac=silent, budget=options.budget)
                if not silent:
                    goal = Goal("absmax", weights=weights)
                measure = Measure(held_out_tokens=options.tokens, dtype=options.dtype)
                spike(model, folder, goal, measure, rasters=False)
            name = f"events {weights}, {silent:.0%} aimed at"
            found.append(one(name, "events", folder, weights, "int8"))
    for folder in options.trained:
        weights = read_json(folder / "config.json")["spikes"]["weights"]
        found.append(one(f"events {weights}, {folder.name}", "events", folder, weights, "int8"))
    return found


def peers(model: Path, options: argparse.Namespace) -> list[Contender]:
    """llama.cpp with each of its weights at one good setting, and transformers."""
    if not options.vs:
        return []
    field = field_of(
        Subject(path=model), options.vs, dtype=None, weights=None, threads=1,
        peer_python=options.python, cache_folder=options.work,
        peer_weights=("as is", *FILE_TYPES),
    )  # fmt: skip
    found = []
    for c in field.contenders:
        name, weights = c.name.split(",")[0], "bf16"
        if c.group.startswith("llama.cpp"):
            if not c.name.endswith(PEER_SETTING):
                continue
            weights = name.removeprefix("llama.cpp ")
        elif c.group != "transformers":
            continue
        kind, files = c.group.split()[0], [Path(c.job["path"])]
        found.append(Contender(name, kind, weights, c.module, dict(c.job), c.python, None, files))
    return found


def logits(contender: Contender, tokens: Tensor, threads: int, folder: Path) -> Tensor:
    """(T, V) of one context, float32."""
    prompt, out = folder / "prompt", folder / "logits"
    prompt.write_bytes(array("i", tokens.tolist()).tobytes())
    job = contender.job | {
        "task": "logits", "tokens_file": str(prompt), "logits_file": str(out),
        "threads": threads,
    }  # fmt: skip
    outcome = run_child(contender.module, job, python=contender.python, threads=threads)
    found = numpy.fromfile(out, numpy.float32).reshape(-1, outcome.result["vocab_size"])
    return torch.from_numpy(found)


def distances(expected: Tensor, got: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Mean over a context's tokens of KL, and of the nats that the text itself costs more."""
    far, added = 0.0, 0.0
    pieces = (expected[:-1].split(64), got[:-1].split(64), tokens[1:].split(64))
    for a, b, following in zip(*pieces, strict=True):
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        far += float((log_p.exp() * (log_p - log_q)).sum())
        added += float((log_p - log_q).gather(1, following[:, None]).sum())
    return far / (len(expected) - 1), added / (len(expected) - 1)


@dataclass
class Timed:
    """What processes said of one contender."""

    per_second: dict[str, list[float]]
    """Tokens, by number of threads, once a round."""
    weight_bytes: float = 0.0


def speeds(
    rows: list[Contender], prompt: Tensor, options: argparse.Namespace, folder: Path
) -> dict[str, Timed]:
    """Decoding, the contenders taking turns."""
    found = {c.name: Timed({str(t): [] for t in options.threads}) for c in rows}
    file = folder / "prompt"
    file.write_bytes(array("i", prompt.tolist()).tobytes())
    for turn in range(options.rounds):
        for threads in options.threads:
            for c in rows[turn % len(rows) :] + rows[: turn % len(rows)]:
                job = c.job | {
                    "task": "measure", "tokens_file": str(file), "threads": threads,
                    "decode_tokens": options.decode,
                }  # fmt: skip
                outcome = run_child(c.module, job, python=c.python, threads=threads)
                speed = options.decode / outcome.result["decode_seconds"]
                found[c.name].per_second[str(threads)].append(speed)
                facts = outcome.facts
                found[c.name].weight_bytes = facts.get("step_weight_bytes", facts["weight_bytes"])
                print(f"{c.name:40} {threads} threads {speed:8.1f} tokens/s", flush=True)
    return found


def token_bytes(contender: Contender, timed: Timed) -> float:
    """Of weights, read for one token."""
    if contender.spikes is None:
        return timed.weight_bytes
    total = contender.spikes["total"]
    return timed.weight_bytes - float(total["weight_bytes"] - total["weight_bytes_touched"])


def rows_of(
    model: Path, contenders: list[Contender], options: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """Everything measured of each contender."""
    tokenizer = load_tokenizer(open_checkpoint(model))
    text = contexts((), tokenizer, context_tokens=CONTEXT_TOKENS, max_tokens=options.tokens)
    exact = {"model": {"path": str(model), "dtype": "f32", "weights": "stored"}}
    original = Contender("original", "dense", "f32", "ours", exact, sys.executable, None, [])
    far: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    most = max(options.threads)
    for tokens in text:
        expected = logits(original, tokens, most, folder)
        for c in contenders:
            far[c.name].append(distances(expected, logits(c, tokens, most, folder), tokens))
    timed = speeds(contenders, text[0, :PROMPT_TOKENS], options, folder)
    rows = []
    for c in contenders:
        path = Path(c.job["path"] if "path" in c.job else c.job["model"]["path"])
        kl, added = torch.tensor(far[c.name]).unbind(1)
        spoken = timed[c.name].per_second
        rows.append({
            "name": c.name, "kind": c.kind, "weights": c.weights,
            "skipped_frac": c.spikes["total"]["skipped_frac"] if c.spikes else 0.0,
            "kl_nats": float(kl.mean()), "kl_nats_95": list(mean_interval(kl)),
            "nats_added": float(added.mean()), "nats_added_95": list(mean_interval(added)),
            "token_bytes": token_bytes(c, timed[c.name]),
            "tokens_per_second": {
                threads: {"median": median(s), "min": min(s), "max": max(s), "n": len(s)}
                for threads, s in spoken.items()
            },
            "fingerprint": fingerprint(open_checkpoint(path).config, list(c.files)),
        })  # fmt: skip
    return rows


def draw(rows: list[dict[str, Any]], threads: str, path: Path) -> None:
    """KL against tokens a second; what spikes is joined by a line for each kind of weights."""
    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    marks = {"dense": "o", "events": "D", "llama.cpp": "^", "transformers": "s"}
    for kind, mark in marks.items():
        mine = [r for r in rows if r["kind"] == kind]
        for number, weights in enumerate(dict.fromkeys(r["weights"] for r in mine)):
            some = sorted((r for r in mine if r["weights"] == weights), key=lambda r: r["kl_nats"])
            x = [r["tokens_per_second"][threads]["median"] for r in some]
            y = [max(r["kl_nats"], 1e-4) for r in some]
            line = mark + (":" if kind == "events" else "")
            color = {"dense": "C0", "events": f"C{1 + number}"}.get(kind, "gray")
            label = f"events {weights}" if kind == "events" else kind if number == 0 else None
            axis.plot(x, y, line, color=color, label=label)
            if kind != "events":
                axis.annotate(f" {weights}", (x[0], y[0]), size=8)
    axis.set(yscale="log", ylabel="KL to the original, nats a token")
    axis.set_xlabel(f"tokens decoded a second, {threads} thread{'s' * (threads != '1')}")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/data/spikes"))
    parser.add_argument("--silent", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7])
    parser.add_argument("--weights", nargs="+", default=["int8", "int4"])
    parser.add_argument(
        "--trained", type=Path, nargs="*", default=[], help="folders of `respike heal` that spike"
    )
    parser.add_argument("--budget", default="sensitivity")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--vs", nargs="*", default=[], help="llama.cpp, transformers")
    parser.add_argument("--python", default=sys.executable, help="has the peers")
    options = parser.parse_args()
    contenders = ours(options.model, options) + peers(options.model, options)
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(options.model, contenders, options, Path(folder))
    report = {
        **provenance(),
        "model": options.model.name,
        "text": f"{options.tokens} tokens of the built-in text in contexts of {CONTEXT_TOKENS}",
        "settings": f"after {PROMPT_TOKENS} tokens, {options.decode} tokens a round, "
        f"{options.rounds} rounds, computing in {options.dtype}; llama.cpp: {PEER_SETTING}",
        "rows": rows,
    }
    write(options.output, report)
    for threads in rows[0]["tokens_per_second"]:
        draw(rows, threads, options.output.with_name(f"{options.output.stem}-{threads}.png"))


if __name__ == "__main__":
    main()
