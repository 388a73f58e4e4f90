"""What each memory is worth without training: quality with it, without it, and its bytes.

    python benchmarks/memory.py MODEL --work DIR -o benchmarks/results/memory_X.json

Every row is one folder that `respike convert` wrote with its default calibration text, named by its
fingerprint. Texts come from `benchmarks/texts.py`. "Cut" is the very same folder with its memory
switched off. State bytes are computed for all lengths and measured up to --measure-tokens, as the
bytes of all tensors of the state after that many tokens.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from resultfile import write

from respike.account import REPORT_LENGTHS, num_parameters, state_bytes
from respike.bench.machine import provenance
from respike.conversion import convert, plan
from respike.device import dtype_name, set_threads
from respike.errors import UsageError
from respike.evaluation import (
    Reference,
    Task,
    Vocabulary,
    memory_shares,
    position_buckets,
    recall,
)
from respike.loading import Model, load
from respike.models.ablation import without
from respike.models.decoder import Decoder
from respike.recipe import load_recipe
from respike.text import contexts

CONTEXT_TOKENS = 2048
BEYOND_TOKENS = 256
SHUT = "far.calibration_tokens=0"
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "window": ("window", ()),
    "constant, shut": ("constant", (SHUT,)),
    "constant": ("constant", ()),
    "retrieval, shut": ("retrieval", (SHUT,)),
    "retrieval": ("retrieval", ()),
    "retrieval, 32 prototypes": ("retrieval", ("far.features=32",)),
    "retrieval, 256 prototypes": ("retrieval", ("far.features=256",)),
    "retrieval, gla beside": ("retrieval", ("memory=gla",)),
    "retrieval, delta beside": ("retrieval", ("memory=delta",)),
    "spikingbrain-7b": ("spikingbrain-7b", ()),
}


def made(model: str, name: str, work: Path) -> tuple[Path, dict[str, Any]]:
    """The row's folder and report; written only if it is not there yet."""
    recipe, overrides = ROWS[name]
    out = work / name.replace(", ", "-").replace(" ", "-")
    todo = plan(model, load_recipe(recipe, overrides))
    if not (out / "report.json").exists():
        convert(todo, out)
    return out, json.loads((out / "report.json").read_text(encoding="utf-8"))


def measured_state(decoder: Decoder, tokens: torch.Tensor, lengths: list[int]) -> dict[str, int]:
    """Bytes of every tensor of the state after so many tokens."""
    state, sizes = decoder.init_state(), {}
    with torch.inference_mode():
        for length in lengths:
            seen = state.num_tokens
            _, state = decoder(tokens[:, seen:length], state, logits="none")
            held = [
                tensor
                for layer in state.layers
                for part in layer
                for tensor in part.tensors(state.num_tokens).values()
            ]
            sizes[str(length)] = sum(t.numel() * t.element_size() for t in held)
    return sizes


def row(
    model: Model, reference: Reference, tasks: list[Task], trials: int, lengths: list[int]
) -> dict[str, Any]:
    """Everything measured of one model."""
    vocabulary, total = Vocabulary(model.tokenizer), reference.contexts.shape[1]

    def quality() -> dict[str, Any]:
        distances = reference.compare(model.decoder)
        scores = [recall(model.decoder, vocabulary, task, trials=trials) for task in tasks]
        return {
            "beyond": distances.bucket(BEYOND_TOKENS, total),
            "buckets": [distances.bucket(*edges) for edges in position_buckets(total)],
            "recall": [score.as_dict() for score in scores],
        }

    found = quality()
    try:
        with without(model.decoder, "memory"):
            found["cut"] = quality()
    except UsageError:
        found["cut"] = None
    text = reference.contexts.flatten()
    many = text.repeat(-(-max(lengths) // len(text)))[None, : max(lengths)]
    return {
        **found,
        "fingerprint": model.fingerprint,
        "parameters": num_parameters(model.config),
        "softmax_groups": len(model.config.softmax_groups()),
        "state_bytes": {str(n): state_bytes(model.config, n) for n in REPORT_LENGTHS},
        "state_bytes_measured": measured_state(model.decoder, many, lengths),
        "share": [
            [part.layer, part.groups, [round(x, 4) for x in part.head_fracs]]
            for part in memory_shares(model.decoder, reference.contexts[:1], 2 * BEYOND_TOKENS)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True, help="for the converted folders")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("benchmarks/data/evaluate"))
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--rows", default=";".join(ROWS), help="names, with semicolons")
    parser.add_argument("--measure-tokens", default="1024,8192")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    set_threads(options.threads)
    original = load(options.model, dtype="bf16")
    text = contexts(
        sorted(options.data.glob("*.txt")), original.tokenizer,
        context_tokens=CONTEXT_TOKENS, max_tokens=options.tokens,
    )  # fmt: skip
    tasks = [Task("copy", 512), Task("passkey", 1024, 0.25), Task("passkey", 2048, 0.5)]
    tasks.append(Task("needles", 1024, 0.1))
    reference = Reference(original.decoder, text)
    lengths = [int(n) for n in options.measure_tokens.split(",")]
    rows = []
    for name in ["original", *options.rows.split(";")]:
        if name == "original":
            model, extra = original, {}
        else:
            folder, report = made(options.model, name, options.work)
            model, extra = load(folder), {"recipe": report["recipe"]}
            extra |= {k: v for k, v in report.get("calibration", {}).items() if k != "each"}
        measured = row(model, reference, tasks, options.trials, lengths)
        rows.append({"name": name, **extra, **measured})
        beyond, cut = measured["beyond"], measured["cut"]
        print(
            f"{name:28} KL {beyond['kl_nats']:.4f}"
            + (f" cut {cut['beyond']['kl_nats']:.4f}" if cut else "")
            + "".join(f"  {s['task']} {s['accuracy_frac']:.2f}" for s in measured["recall"]),
            flush=True,
        )
        report = {
            **provenance(),
            "model": Path(options.model).name,
            "dtype": dtype_name(original.decoder.embedding.dtype),
            "text": f"{len(text)} contexts of {CONTEXT_TOKENS} tokens of Brown, Factbook and "
            "Debian Handbook (benchmarks/texts.py); calibrated on Python's language reference",
            "beyond_tokens": BEYOND_TOKENS,
            "trials": options.trials,
            "rows": rows,
        }
        write(options.output, report)


if __name__ == "__main__":
    main()
