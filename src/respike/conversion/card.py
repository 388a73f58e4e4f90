"""The model card a converted folder carries."""

from typing import Any

import yaml


def model_card(report: dict[str, Any]) -> str:
    """README.md of a converted model, from its report: what it is, what it holds, what it lost."""
    source, lengths = report["source"], report["state_bytes_bf16"]
    rows = "\n".join(
        f"| {int(n):,} | {b['original'] / 2**20:,.1f} | {b['converted'] / 2**20:,.1f} |"
        for n, b in lengths.items()
    )
    hashes = ", ".join(f"{n} SHA-256 {h}" for n, h in report["source_sha256"].items())
    kinds = ", ".join(f"{count} tensors {kind}" for kind, count in source["stored_as"].items())
    layers = "\n".join(f"| {row['layers']} | {row['mixers']} |" for row in report["layers"])
    again = "byte for byte"
    for part, name in (("spikes", "its spikes"), ("healing", "its training")):
        again = f"but for {name}" if part in report else again
    front = {
        "license": source["license"],
        "base_model": source["name"],
        "tags": ["respike", "hybrid-attention"],
    }
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()}
---
# {source["name"]}, converted by the recipe `{report["recipe"]}`

Made from **{source["name"]}** ({source["family"]}, licence of the source: {source["license"]}) by
respike {report["respike"]}. The weights are the source's (there {kinds}), read by their own
rules and stored here as {report["weights"]}; {_training(report)}. Of {report["kv_groups"]} KV
groups {report["softmax_groups"]} keep full softmax.{_memories(report)}{_spikes(report)}

| layers | mixers |
|---|---|
{layers}

State of one sequence, bf16, in MiB (computed):

| tokens | original | converted |
|--:|--:|--:|
{rows}

Each further token adds {report["growth_bytes_per_token_bf16"]:,} bytes. What the conversion costs
in quality depends on the text: measure it with `respike check ORIGINAL THIS --data TEXT` and
`respike eval THIS --task recall --vs ORIGINAL`.

Source {hashes}; fingerprint {report["fingerprint"]}. `recipe.yaml` makes
this folder again, {again}; `report.json` has every figure.
"""


def _training(report: dict[str, Any]) -> str:
    """What was trained, and what that gained."""
    healing = report.get("healing")
    if healing is None:
        return "nothing was trained"
    if "best" not in healing:
        return f"then healed by {healing['name']} (`respike heal --apply`)"
    start, best = healing["start"], healing["best"]
    return (
        f"then healed by the course `{healing['name']}` (`respike heal`) on {healing['tokens']:,} "
        f"tokens: on held-out text its KL to the source went from {start['kl_nats']:.4f} to "
        f"{best['kl_nats']:.4f} nats a token, recall from {100 * start['recall_frac']:.1f} % to "
        f"{100 * best['recall_frac']:.1f} %"
    )


def _memories(report: dict[str, Any]) -> str:
    """A sentence on what the source does not have; empty if there is nothing."""
    if not report["tensors"]["new"]:
        return ""
    text = f" {report['new_parameters']:,} parameters are new"
    fit = report.get("calibration")
    if fit is None:
        return f"{text} and hold their starting values."
    return (
        f"{text}; memories were fitted to {fit['text_tokens']:,} tokens of text "
        f"and {fit['recall_tokens']:,} of copied random tokens: the mean squared error of a "
        f"head went from {fit['error_shut_frac']:.4f} of its output's square to "
        f"{fit['error_frac']:.4f}, and {fit['shut']} of {fit['heads']} heads stayed shut."
    )


def _spikes(report: dict[str, Any]) -> str:
    """A paragraph on what spikes, and what that cost; empty if nothing does."""
    spikes = report.get("spikes")
    if spikes is None:
        return ""
    total, far = spikes["total"], spikes["distance"]
    trained = "trained through them" if "healing" in report else "not healed by training"
    silent, skipped = 100 * total["silent_frac"], 100 * total["skipped_frac"]
    return f"""

Before every linear layer but the output head stand {spikes["neuron"]["neuron"]} neurons (`respike
spikes`), {trained}; {spikes["runs"]}. On {spikes["text"]["held_out_tokens"]:,} tokens
they were not calibrated on, {silent:.1f} % of their inputs were silent, which skips {skipped:.1f} %
of the weights behind them, at a KL of {far["kl_nats"]:.4f} nats a token to the source."""
