"""Quality against memory, without training: the original, strawmen, and selections of many sizes.

    python benchmarks/frontier.py MODEL SELECTED.yaml -o benchmarks/results/frontier_X.json

SELECTED.yaml and SELECTED.scores.json come from `respike select`: the order of its picks gives a
nested recipe for every smaller number of groups. Texts come from `benchmarks/texts.py`, from
sources no recipe was chosen on. Every row is one artefact: the source's weights under the row's
config, named by its fingerprint.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from resultfile import came_from, rows_before, write

from respike.account import state_bytes
from respike.bench.machine import provenance
from respike.checkpoint import fingerprint
from respike.config import ModelConfig
from respike.device import dtype_name, set_threads
from respike.evaluation import (
    Reference,
    Task,
    Vocabulary,
    position_buckets,
    recall,
)
from respike.loading import Model, load
from respike.models.decoder import PREFILL_CHUNK_TOKENS, build_mixers
from respike.recipe import Evenly, Recipe, Rule, apply_recipe, load_recipe
from respike.text import contexts

CONTEXT_TOKENS = 2048
BEYOND_TOKENS = 256
"""KL "beyond the window" is over predictions from at least this many tokens, in every row."""


def candidates(
    selected: Recipe, scores: dict[str, Any], kept: list[int]
) -> list[tuple[str, Recipe]]:
    """Recipes to compare, with the kind each is drawn as."""

    def window(tokens: int, sinks: int) -> Recipe:
        name = f"window {tokens} + {sinks} sinks"
        change = {"name": name, "window_tokens": tokens, "sink_tokens": sinks, "softmax_groups": {}}
        return selected.model_copy(update=change)

    def retrieval(number: int, tokens: int) -> Recipe:
        groups: dict[int, tuple[int, ...]] = {}
        for layer, group, _ in scores["picked"][:number]:
            groups[layer] = (*groups.get(layer, ()), group)
        name = f"retrieval {number}, window {tokens}"
        change = {"name": name, "window_tokens": tokens, "softmax_groups": groups}
        return selected.model_copy(update=change)

    even = selected.model_copy(
        update={
            "name": "even 8 layers",
            "softmax_groups": {},
            "layers": (Rule(at=Evenly(evenly=8), mixer="full"), Rule(at="rest", mixer="window")),
        }
    )
    rows = [("window", window(w, s)) for w in (128, 256) for s in (0, 4)]
    rows.append(("even", even))
    rows += [("retrieval", retrieval(n, 256)) for n in kept]
    rows.append(("retrieval", retrieval(kept[len(kept) // 2], 128)))
    return rows


def wear(model: Model, config: ModelConfig) -> None:
    """Give the loaded weights another config's mixers."""
    for layer, made in zip(model.decoder.layers, config.layers, strict=True):
        layer.self_attn.set_mixers(build_mixers(config, made))


def row(
    model: Model,
    config: ModelConfig,
    reference: Reference,
    tasks: list[Task],
    trials: int,
    chunk_tokens: int,
) -> dict[str, Any]:
    """Everything measured of one config."""
    wear(model, config)
    distances = reference.compare(model.decoder, chunk_tokens=chunk_tokens)
    total = reference.contexts.shape[1]
    vocabulary = Vocabulary(model.tokenizer)
    scores = [recall(model.decoder, vocabulary, task, trials=trials) for task in tasks]
    window = next((p for _, p in config.mixers() if p.mixer == "window"), None)
    return {
        "softmax_groups": len(config.softmax_groups()),
        "window_tokens": window.window_tokens if window else None,
        "sink_tokens": window.sink_tokens if window else None,
        "state_bytes": {str(n): state_bytes(config, n) for n in (2048, 8192, 65536)},
        "buckets": [distances.bucket(*edges) for edges in position_buckets(total)],
        "beyond": distances.bucket(BEYOND_TOKENS, total),
        "copy": scores[0].as_dict(),
        "recall": [score.as_dict() for score in scores[1:]],
        "fingerprint": fingerprint(config, model.files),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("selected", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("benchmarks/data/evaluate"))
    parser.add_argument("--tokens", type=int, default=24_576)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--groups", default="6,12,18,24")
    parser.add_argument("--skip", default="", help="kinds or beginnings of names, with commas")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    set_threads(options.threads)
    model = load(options.model, dtype=options.dtype)
    original = model.config
    text = contexts(
        sorted(options.data.glob("*.txt")),
        model.tokenizer,
        context_tokens=CONTEXT_TOKENS,
        max_tokens=options.tokens,
    )
    tasks = [Task("copy", 512), Task("passkey", 1024, 0.25), Task("multi-query", 64)]
    reference = Reference(model.decoder, text)
    scores = json.loads(options.selected.with_suffix(".scores.json").read_text(encoding="utf-8"))
    kept = [int(n) for n in options.groups.split(",")]
    recipes = candidates(load_recipe(str(options.selected)), scores, kept)
    configs = [("original", "original", original), ("floor", "original, other chunks", original)]
    configs += [(kind, r.name, apply_recipe(r, original)) for kind, r in recipes]
    skipped = tuple(filter(None, options.skip.split(",")))
    configs = [c for c in configs if not any(part.startswith(skipped) for part in c[:2])]
    rows = []
    asked = {"tokens": text.numel(), "trials": options.trials, "dtype": options.dtype}
    done = {(r["kind"], r["fingerprint"]): r for r in rows_before(options.output, asked)}
    for kind, name, config in configs:
        # The floor: the same model, worked through in other chunks, so rounded elsewhere.
        chunk = 192 if kind == "floor" else PREFILL_CHUNK_TOKENS
        measured = done.get((kind, fingerprint(config, model.files)))
        if measured is None:
            measured = row(model, config, reference, tasks, options.trials, chunk)
            measured |= came_from()
        rows.append({**measured, "name": name, "kind": kind})
        beyond, copy = measured["beyond"], measured["copy"]
        print(f"{name:32} KL {beyond['kl_nats']:.4f}  copy {copy['accuracy_frac']:.3f}", flush=True)
        report = {
            **provenance(),
            "model": Path(options.model).name,
            "dtype": dtype_name(model.decoder.embedding.dtype),
            "text": f"{len(text)} contexts of {CONTEXT_TOKENS} tokens of Brown, Factbook and "
            "Debian Handbook, none of them seen by the selection (benchmarks/texts.py)",
            "beyond_tokens": BEYOND_TOKENS,
            "asked": asked,
            "rows": rows,
        }
        write(options.output, report)


if __name__ == "__main__":
    main()
