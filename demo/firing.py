"""The model's own sentence as spikes: the step, its section of the report, and its pictures."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import page
import plots
from committed import Committed, origin
from stage import Run, bar, indented

from respike.checkpoint import open_checkpoint
from respike.cli.show import human_bytes, table
from respike.loading import load_decoder, load_tokenizer
from respike.models.spiking import spike_sites, watch_sites
from respike.spiking import Goal, Measure, spike

SILENT_FRAC = 0.3
"""Share of weights to skip: about what an untrained model bears."""
CALIBRATION_TOKENS, HELD_OUT_TOKENS, CONTEXT_TOKENS = 512, 1024, 512
SENTENCE = "The key to the archive is kept in the blue tin on the top shelf."
CHANNELS = 48
"""Shown of each site: every so many'th, so that the picture stays readable."""
NAMES = {"qkv": "into q, k, v", "o": "into o", "mlp": "into gate, up", "down": "into down"}

Results = dict[str, Any]


def show_spikes(run: Run) -> None:
    goal = Goal(silent_frac=SILENT_FRAC, budget="uniform")
    measure = Measure(
        context_tokens=CONTEXT_TOKENS,
        calibration_tokens=CALIBRATION_TOKENS,
        held_out_tokens=HELD_OUT_TOKENS,
        dtype=run.dtype,
    )
    with bar("neurons in front of every layer but the head") as step:
        report = spike(
            run.model, run.folder("spiking"), goal, measure, rasters=False, force=True,
            progress=lambda _, done, total: step(done, total),
        )  # fmt: skip
    kept = ("total", "sites", "distance", "neuron", "runs", "not_spiked", "text")
    drawn = raster(run)
    run.results["spikes"] = {key: report[key] for key in kept} | {"raster": drawn}
    total = report["total"]
    rows = [(what, value) for what, value in figures(run.results["spikes"])]
    print(indented(table(("spikes", ""), rows)))
    fired = sum(map(sum, drawn["fired"].values())) / sum(map(sum, drawn["neurons"].values()))
    print(f"  {SENTENCE!r}: {fired:.0%} of its neurons in layer {drawn['layer']} fire")
    assert total["events"] > 0


def spike_commands(run: Run) -> list[str]:
    return [
        f"respike spikes {run.model} {run.folder('spiking')} --silent {SILENT_FRAC:g} "
        f"--budget uniform --calibration-tokens {CALIBRATION_TOKENS} --max-tokens "
        f"{HELD_OUT_TOKENS} --context-tokens {CONTEXT_TOKENS} --no-rasters --force"
    ]


def raster(run: Run) -> Results:
    """Counts of the sentence in the middle layer, by site: some channels, all tokens."""
    source = open_checkpoint(run.folder("spiking"))
    decoder, tokenizer = load_decoder(source), load_tokenizer(source)
    ids = tokenizer.encode(SENTENCE)
    layer, sites = len(decoder.layers) // 2, list(spike_sites(decoder))
    found: Results = {"layer": layer, "tokens": [tokenizer.decode([i]) for i in ids]}
    found |= {"counts": {}, "fired": {}, "neurons": {}}

    def see(index: int, x: Any) -> None:
        site = sites[index]
        if site.layer != layer or site.neuron is None:
            return
        counts = site.neuron.fire(x)[0][0]
        every = max(1, counts.shape[1] // CHANNELS)
        found["counts"][site.name] = counts[:, ::every][:, :CHANNELS].tolist()
        found["fired"][site.name] = (counts != 0).sum(1).tolist()
        found["neurons"][site.name] = [counts.shape[1]] * len(counts)

    import torch

    with torch.inference_mode(), watch_sites(decoder, see):
        decoder.hidden(torch.tensor([ids]))
    return found


# ---- the section -----------------------------------------------------------------------------


def figures(found: Results) -> list[tuple[str, str]]:
    """The figures that are not the same, one a row."""
    total, far = found["total"], found["distance"]
    bits = total["bit_sparsity"]["signed-bitwise"]
    empty = total["three_step_windows"]["with_0_1_2_3_spikes_frac"][0]
    return [
        ("silent inputs, exact zeros", f"{total['silent_frac']:.1%}"),
        ("weights skipped", f"{total['skipped_frac']:.1%}"),
        (
            "weights read for a token",
            f"{human_bytes(int(total['weight_bytes_touched']))} of "
            f"{human_bytes(total['weight_bytes'])}",
        ),
        ("mean |count|", f"{total['mean_abs_count']:.2f}"),
        ("zero bits, signed", f"{bits['zero_frac']:.1%} of {bits['steps']} steps"),
        ("empty 3-step windows, as SpikingBrain-1.0 counts", f"{empty:.1%}"),
        (
            "KL to the original, nats a token",
            f"{far['kl_nats']:.3f} {page.interval(far['kl_nats_95'], 3)}",
        ),
    ]


def spikes(results: Results, committed: Committed) -> str:
    """Raster, bars and frontier."""
    found = results.get("spikes")
    parts = [page.paragraph("No spikes were counted in this run.")]
    if found:
        drawn = found["raster"]
        parts = [
            page.paragraph(
                "A neuron before every linear layer but the output head turns numbers into signed "
                "counts; what is silent is left out, and its weights are not read. It runs "
                f"{found['runs']}. Not trained, so silence costs: measured on "
                f"{found['text']['held_out_tokens']:,} tokens it was not calibrated on."
            ),
            page.table(
                "Figures that are often called sparsity, and the price",
                ("what", ""),
                figures(found),
            ),
            page.figure(
                raster_plot(drawn),
                f"Its own sentence in layer {drawn['layer']}: tokens across, one channel in a few "
                "down. Filled: fired, darker for larger counts; empty: silent, nothing was read.",
                "wide",
            ),
            page.figure(
                counts_plot(found["sites"]), "How many spikes an input is worth, layer by layer."
            ),
        ]
    if not committed.spikes:
        parts.append(
            page.paragraph(
                "There is no committed benchmarks/results/spikes_frontier_*.json, so no frontier "
                "of speed."
            )
        )
    for number, result in enumerate(committed.spikes):
        parts.append(speed_frontier(result, number))
    return "".join(parts)


def raster_plot(drawn: Mapping[str, Any]) -> str:
    """Channels down, tokens across, a panel for each site."""
    cell, gap, left, top = 7, 26, 2, 16
    tokens, parts, x0 = drawn["tokens"], [], left
    rows = max(len(counts[0]) for counts in drawn["counts"].values())
    for name, counts in drawn["counts"].items():
        fired, of = sum(drawn["fired"][name]), sum(drawn["neurons"][name])
        title = f"{NAMES[name]}: {1 - fired / of:.0%} silent"
        parts.append(f'<text x="{x0}" y="11">{escape(title)}</text>')
        for t, column in enumerate(counts):
            for c, count in enumerate(column):
                if count:
                    strength = min(1.0, 0.25 + abs(count) / 24)
                    kind = "up" if count > 0 else "down"
                    parts.append(
                        f'<rect class="{kind}" x="{x0 + t * cell}" y="{top + c * 4}" width="6" '
                        f'height="3.4" opacity="{strength:.2f}"/>'
                    )
        x0 += len(tokens) * cell + gap
    size = f"0 0 {x0 - gap + left} {top + rows * 4 + 2}"
    alt = f"Spike raster of the sentence {''.join(tokens).strip()!r}"
    return (
        f'<svg class="map raster" role="img" aria-label="{escape(alt)}" viewBox="{size}">'
        f"{''.join(parts)}</svg>"
    )


def counts_plot(sites: Sequence[Mapping[str, Any]]) -> str:
    """Mean magnitude of counts in each layer, by site."""
    colours = (plots.ORIGINAL, plots.OTHER, plots.CONVERTED, plots.WINDOW)
    with plots.plot(2.8) as (figure, axes):
        width = 0.8 / len(NAMES)
        said = []
        for index, (name, colour) in enumerate(zip(NAMES, colours, strict=True)):
            mine = [s for s in sites if s["site"] == name]
            axes.bar(
                [s["layer"] + (index - 1.5) * width for s in mine],
                [s["mean_abs_count"] for s in mine], width, color=colour, label=NAMES[name],
            )  # fmt: skip
            mean = sum(s["mean_abs_count"] for s in mine) / max(1, len(mine))
            said.append(f"{NAMES[name]} {mean:.2f}")
        axes.xaxis.grid(visible=False)
        axes.set_xlabel("layer")
        axes.set_ylabel("mean |count|")
        plots.legend(figure, axes, 2)
        return plots.svg(figure, "counts", f"Mean |count| by layer. Means: {', '.join(said)}.")


KINDS = {
    "dense": ("o", plots.ORIGINAL), "events": ("D", plots.CONVERTED),
    "llama.cpp": ("^", plots.WINDOW), "transformers": ("s", plots.WINDOW),
}  # fmt: skip


def frontier_plot(result: Mapping[str, Any], threads: str, name: str) -> str:
    """KL against tokens a second on so many threads, or against bytes a token ("bytes")."""

    def value(row: Mapping[str, Any]) -> float:
        if threads == "bytes":
            return float(row["token_bytes"]) / (1 << 20)
        return float(row["tokens_per_second"][threads]["median"])

    with plots.plot() as (figure, axes):
        for kind, (marker, colour) in KINDS.items():
            for weights in sorted({r["weights"] for r in result["rows"] if r["kind"] == kind}):
                mine = [r for r in result["rows"] if r["kind"] == kind and r["weights"] == weights]
                axes.plot(
                    [value(r) for r in mine], [max(r["kl_nats"], 1e-4) for r in mine],
                    marker + (":" if len(mine) > 1 else ""), color=colour,
                    markerfacecolor=colour if weights != "int4" else "none",
                    label=f"{kind} {weights}",
                )  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylabel("KL to the original, nats a token")
        words = (
            f"tokens a second, {page.plural(int(threads), 'thread')}"
            if (threads != "bytes")
            else "weights read for a token, MiB"
        )
        axes.set_xlabel(words)
        plots.legend(figure, axes, 3)
        return plots.svg(figure, name, f"KL against {words} for {len(result['rows'])} rows.")


def speed_frontier(result: Results, number: int) -> str:
    """Plots and table of one committed frontier of spikes."""
    threads = list(result["rows"][0]["tokens_per_second"])
    caption = (
        "Decoding of one sequence; hollow: int4. Lower and further right is better; in the last "
        "picture further left."
    )
    drawn = "".join(
        page.figure(frontier_plot(result, what, f"spikes-{what}-{number}"), caption)
        for what in (*threads, "bytes")
    )
    rows = [
        (
            row["name"],
            row["fingerprint"][:12],
            f"{row['skipped_frac']:.0%}",
            f"{row['kl_nats']:.4f} {page.interval(row['kl_nats_95'], 4)}",
            human_bytes(int(row["token_bytes"])),
            *(f"{row['tokens_per_second'][n]['median']:.0f}" for n in threads),
        )
        for row in result["rows"]
    ]
    header = ("what", "fingerprint", "skipped", "KL", "weights a token",
              *(f"tokens/s, {page.plural(int(n), 'thread')}" for n in threads))  # fmt: skip
    note = f"{result['model']}, {result['text']}; {result['settings']}. {origin(result)}."
    return (
        page.paragraph(f"Not of this run: {note}")
        + f'<div class="figures">{drawn}</div>'
        + page.table("What silence and fewer bits cost, and what they save", header, rows)
    )
