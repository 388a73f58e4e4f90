"""What silence costs without training, by neuron and budget: KL against weights skipped.

    python benchmarks/neurons.py models/SmolLM2-135M-Instruct.gguf \
        -o benchmarks/results/neurons_SmolLM2-135M.json

Float weights in float32, so that neurons alone are measured: absmax counts of 8 bits, finer
thresholds (mean|x| / k, whose counts beyond 127 the kernels take exactly), and TEAL, whose values
are not rounded. Each without a band, silenced uniformly, by sensitivity, and only where the width
is (the MLP's inner layer; everything else fires). Bands come from the calibration half of the
built-in text, figures from the other; 95 % intervals over contexts. Expect a minute of two cores
for a row of 4,096 tokens, and three for the prices of a neuron (not timed yet).
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from resultfile import write
from torch import Tensor

from respike.bench.machine import provenance
from respike.checkpoint import open_checkpoint
from respike.device import set_threads
from respike.evaluation import Reference
from respike.loading import load_decoder, load_tokenizer
from respike.models.decoder import Decoder
from respike.models.spiking import SITES, install_spikes, remove_spikes, spike_sites
from respike.spiking import Census, Goal
from respike.spiking.calibrate import Profile, profiles, set_prices, share_out
from respike.text import contexts

NEURONS = {
    "absmax": Goal("dead-zone", weights="float"),
    "mean, k = 8": Goal("dead-zone", step="mean", k=8.0, weights="float"),
    "mean, k = 32": Goal("dead-zone", step="mean", k=32.0, weights="float"),
    "TEAL": Goal("teal", weights="float"),
}
CONTEXT_TOKENS = 512
DOWN = list(SITES).index("down")
WIDE_SILENT = (0.5, 0.8, 0.9)
"""Silent fractions of the MLP's inner layer alone."""
ALMOST_NONE = 1e-4


def row(
    decoder: Decoder, reference: Reference, goal: Goal, bands: Sequence[float]
) -> dict[str, Any]:
    """KL and census of one set of bands."""
    install_spikes(decoder, goal.config(bands))
    census = Census(decoder)
    try:
        with census.watching():
            distances = reference.compare(decoder)
    finally:
        remove_spikes(decoder)
    total = census.figures()["total"]
    far = distances.bucket(0, reference.contexts.shape[1])
    return {
        "skipped_frac": total["skipped_frac"],
        "silent_frac": total["silent_frac"],
        "above_127_frac": total.get("above_127_frac"),
        **{key: far[key] for key in ("kl_nats", "kl_nats_95", "nats_added", "nats_added_95")},
    }


def budgets(
    decoder: Decoder, goal: Goal, found: list[Profile], silent: Sequence[float], fit: Tensor
) -> list[tuple[str, float, list[float]]]:
    """(budget, silence aimed at, bands)."""
    sizes = [float(site.in_features * site.out_features) for site in spike_sites(decoder)]
    sets = [("uniform", s, [p.band(s) for p in found]) for s in silent]
    for s in WIDE_SILENT:
        bands = [p.band(s if i % len(SITES) == DOWN else ALMOST_NONE) for i, p in enumerate(found)]
        sets.append(("inner layer of the MLP alone", s, bands))
    set_prices(decoder, found, fit, goal, None)
    for s in silent:
        shares = share_out(found, sizes, s)
        bands = [p.band(share) for p, share in zip(found, shares, strict=True)]
        sets.append(("sensitivity", s, bands))
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--silent", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6])
    parser.add_argument("--neurons", nargs="+", default=list(NEURONS), choices=list(NEURONS))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--calibration-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    set_threads(options.threads)
    source = open_checkpoint(options.model)
    tokenizer, decoder = load_tokenizer(source), load_decoder(source, dtype="f32")
    fit = contexts(
        (), tokenizer, context_tokens=CONTEXT_TOKENS, max_tokens=options.calibration_tokens,
        use="calibrate",
    )  # fmt: skip
    held = contexts((), tokenizer, context_tokens=CONTEXT_TOKENS, max_tokens=options.tokens)
    reference = Reference(decoder, held)
    rows: list[dict[str, Any]] = []
    for name in options.neurons:
        goal = NEURONS[name]
        found = profiles(decoder, fit, goal)
        sets = budgets(decoder, goal, found, options.silent, fit[:1])
        if goal.neuron != "teal":
            sets.insert(0, ("no band", 0.0, [0.0] * len(found)))
        for budget, silent, bands in sets:
            measured = row(decoder, reference, replace(goal, silent_frac=None), bands)
            rows.append({"neuron": name, "budget": budget, "aimed_frac": silent, **measured})
            print(json.dumps(rows[-1]), flush=True)
            report = {
                **provenance(),
                "model": options.model.name,
                "text": f"{held.numel()} tokens of the built-in text",
                "rows": rows,
            }
            write(options.output, report)


if __name__ == "__main__":
    main()
