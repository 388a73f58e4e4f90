"""Past the trained length: how far away should sinks seem? Nats by position for several reaches.

    python benchmarks/sinks.py MODEL [--context-tokens 16384] -o benchmarks/results/sinks_X.json

A model with windows everywhere reads texts of twice its trained length. Only the largest distance
at which sinks are seen changes: within the window, the trained length, or none (true distance).
"""

import argparse
from pathlib import Path

from frontier import wear
from resultfile import write

from respike.bench.machine import provenance
from respike.device import dtype_name, set_threads
from respike.evaluation import mean_interval, negative_log_likelihood
from respike.loading import load
from respike.recipe import apply_recipe, load_recipe
from respike.text import contexts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("benchmarks/data/choose"))
    parser.add_argument("--context-tokens", type=int, default=16_384)
    parser.add_argument("--contexts", type=int, default=3)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    set_threads(options.threads)
    model = load(options.model)
    total = options.context_tokens
    trained = model.config.max_position_embeddings
    text = contexts(
        sorted(options.data.glob("*-essays.txt")),
        model.tokenizer,
        context_tokens=total,
        max_tokens=total * options.contexts,
    )
    rows = []
    reaches = {"260 (the window)": 260, "trained": trained, "true distance": 1 << 40}
    for sinks in (4, 0):
        for name, reach in reaches.items():
            if sinks == 0 and name != "trained":
                continue
            changes = [f"sink_reach_tokens={reach}", f"sink_tokens={sinks}"]
            config = apply_recipe(load_recipe("window", changes), model.config)
            wear(model, config)
            nats = negative_log_likelihood(model.decoder, text)
            inside, past = nats[:, 256 : trained - 1].mean(1), nats[:, trained - 1 :].mean(1)
            row = {
                "sinks": sinks,
                "reach": name,
                "nats_256_to_trained": float(inside.mean()),
                "nats_past_trained": float(past.mean()),
                "nats_past_trained_95": mean_interval(past),
            }
            print(row, flush=True)
            rows.append(row)
    report = {
        **provenance(),
        "model": Path(options.model).name,
        "dtype": dtype_name(model.decoder.embedding.dtype),
        "contexts": len(text),
        "context_tokens": total,
        "trained_tokens": trained,
        "rows": rows,
    }
    write(options.output, report)


if __name__ == "__main__":
    main()
