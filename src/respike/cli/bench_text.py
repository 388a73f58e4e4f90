"""What bench and plan print."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from respike.cli.show import human_bytes, pairs, table

Data = Mapping[str, Any]
TIE = 1.3
"""Ratios below this are ties: machines drift by a quarter."""


def bench_text(data: Data) -> str:
    """Rows, ratios, what is missing, quality; and what has to be known to read them."""
    blocks = [_rows_table(data)] if data["rows"] else []
    if data["ratios"]:
        blocks.append("ours against, times faster (best setting each; ~ a tie, * fitted)\n"
                      + _ratio_table(data))  # fmt: skip
    blocks.append(_quality_text(data))
    blocks.append("\n".join(_notes(data)))
    return "\n\n".join(blocks)


def _rows_table(data: Data) -> str:
    header = (
        "tokens", "contender", "n", "first token, s", "prefill tok/s", "decode tok/s",
        "state", "peak", "MB/token", "GB/s", "of read", "ideal tok/s",
    )  # fmt: skip
    everyone = [*data["rows"], *data["fitted"]]
    rows = sorted(best_of_groups(everyone), key=lambda r: (r["context_tokens"], r["group"]))
    shown = table(header, [_cells(row) for row in rows])
    if len(rows) < len(everyone):
        shown += (
            f"\n{len(everyone) - len(rows)} rows of settings that are best at neither are left "
            "out; -o and --json have them"
        )
    return shown


def best_of_groups(rows: Sequence[Data]) -> list[Data]:
    """Of each group at each length, the rows with the best prefill and the best decoding."""
    from respike.bench.report import middle  # not above: `--help` does without torch

    found = []
    for row in rows:
        same = [
            r
            for r in rows
            if r["group"] == row["group"] and r["context_tokens"] == row["context_tokens"]
        ]
        first = min(same, key=lambda r: middle(r["ttft_seconds"]))
        step = max(same, key=lambda r: middle(r["decode_tokens_per_second"]))
        if row is first or row is step:
            found.append(row)
    return found


def _cells(row: Data) -> tuple[str, ...]:
    begin = f"{row['context_tokens']:,}", row["contender"]
    ideal = f"{row['ideal_decode_tokens_per_second']:.1f}"
    if row.get("fitted"):
        figures = (
            f"{row['ttft_seconds']:.2f}",
            f"{row['prefill_tokens_per_second']:.0f}",
            f"{row['decode_tokens_per_second']:.1f}",
        )
        return (*begin, "fitted", *figures, "-", "-", "-", "-", "-", ideal)
    return (
        *begin,
        str(row["n"]),
        _spread(row["ttft_seconds"], 2),
        f"{row['prefill_tokens_per_second']['median']:.0f}",
        _spread(row["decode_tokens_per_second"], 1),
        human_bytes(row["state_bytes"]),
        "-" if row["peak_rss_bytes"] is None else human_bytes(row["peak_rss_bytes"]),
        f"{row['moved_bytes_per_token'] / 1e6:.1f}",
        f"{row['moved_bytes_per_second'] / 1e9:.1f}",
        f"{100 * row['read_frac']:.0f} %",
        ideal,
    )


def _spread(part: Data, digits: int) -> str:
    low, high = f"{part['min']:.{digits}f}", f"{part['max']:.{digits}f}"
    return f"{part['median']:.{digits}f} [{low}, {high}]"


def _ratio_table(data: Data) -> str:
    header = (
        "tokens",
        "against",
        "first token",
        "decode",
        "decode, its ideal",
        "its best settings",
    )
    cells = []
    for r in data["ratios"]:
        best = dict.fromkeys((r["ttft_best"], r["decode_best"]))
        settings = [name.removeprefix(f"{r['group']}, ") for name in best if name != r["group"]]
        ours = r["ours_fitted"]
        cells.append(
            (
                f"{r['context_tokens']:,}",
                r["group"],
                _times(r["ttft_times"], r["ttft_fitted"] or ours),
                _times(r["decode_times"], r["decode_fitted"] or ours),
                _times(r["decode_times_of_ideal"], ours),
                "; ".join(settings),
            )
        )
    return table(header, cells)


def _times(value: float, fitted: bool) -> str:
    tie = " ~" if 1 / TIE < value < TIE else ""
    return f"{value:.2f}{tie}{' *' if fitted else ''}"


def _quality_text(data: Data) -> str:
    name = f"model {data['key']['model'][:12]}"
    if isinstance(data["quality"], str):
        return f"quality of {name}: {data['quality']}"
    lines = [f"quality of {name}, untouched by speed:"]
    for q in data["quality"]:
        if "error" in q:
            lines.append(f"  {q['length']:,} tokens: failed: {q['error']}")
            continue
        low, high = q["kl_beyond_95"]
        found = [
            f"{s['task']} {100 * s['model']['accuracy_frac']:.0f} % "
            f"(original {100 * s['original']['accuracy_frac']:.0f} %)"
            for s in q["recall"]
        ]
        lines.append(
            f"  {q['length']:,} tokens: KL {q['kl_nats']:.4f}, beyond {q['beyond_tokens']} "
            f"{q['kl_beyond_nats']:.4f} ({low:.4f} to {high:.4f}); {', '.join(found)}"
        )
        lines += [f"    not asked: {why}" for why in q["not_asked"]]
    return "\n".join(lines)


def _notes(data: Data) -> list[str]:
    gate = data["found"]["gate"]
    machine = data["machine"]
    kernels = f"{len(gate['kernels'])} kernels" if gate["kernels"] else "no native kernels"
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, reads "
        f"{data['read_bytes_per_second'] / 1e9:.1f} GB/s; {kernels} against their definitions"
    ]
    for peer, found in gate.items():
        if isinstance(found, Mapping):
            lines.append(
                f"{peer} on the original weights: KL {found['kl_nats']:.4f} from our engine, same "
                f"first choice for {100 * found['agreement_frac']:.0f} %"
            )
    if machine["l3_bytes"]:
        lines.append(
            f"its L3 cache holds {human_bytes(machine['l3_bytes'])}: steps that move not much more "
            "than that may read faster than memory"
        )
    planned = data["found"]["planned"]["seconds"].items()
    lines.append(
        "planned before the run: " + ", ".join(f"{int(n):,} in {s:.3g} s" for n, s in planned)
    )
    once = [r for r in data["rows"] if r["n"] == 1]
    if once:
        lines.append(f"{len(once)} rows have n = 1")
    if data["fitted"]:
        worst = max(r["fit_error_frac"] for r in data["fitted"])
        lines.append(f"fitted rows: largest error at a measured point {100 * worst:.0f} %")
    lines += [
        f"not measured: {gap['contender']} at {gap['length']:,}: {gap['reason']}"
        for gap in data["skipped"]
    ]
    return [*lines, *data["notes"]]


def cold_text(data: Data) -> str:
    """Each step, and the whole."""
    rows = [
        (name, f"{part['median']:.2f}", f"{part['min']:.2f} to {part['max']:.2f}")
        for name, part in data["seconds"].items()
    ]
    shown = table(("step", "seconds", "range"), rows)
    return (
        f"{shown}\n\n{data['prompt_tokens']} tokens, n = {data['n']}; the first run took "
        f"{data['first_all_seconds']:.2f} s; model {data['model'][:12]}"
    )


def plan_text(data: Data) -> str:
    """Counts, then a row for each length."""
    kept = f"{data['softmax_groups']} of {data['kv_groups']} KV groups"
    shown = [
        ("recipe", f"{data['recipe']} for {data['target']}"),
        ("parameters", f"{data['parameters']:,} ({data['new_parameters']:,} new)"),
        ("of these active", f"{data['active_parameters']:,} a token"),
        ("but embeddings", f"{data['parameters'] - data['embedding_parameters']:,}"),
        ("weights", f"{human_bytes(data['weight_bytes'])} in {data['weights']}"),
        ("softmax", kept),
        ("state growth", f"{data['growth_bytes_per_token']:,} bytes a token (bf16)"),
    ]
    header = ["tokens", "state", "original's", "MFLOP/token", "original's", "MB/token"]
    timed = data["machine"] is not None
    header += ["minutes to read", "decode tok/s, at most"] * timed
    cells = []
    for r in data["rows"]:
        cells.append(
            [
                f"{r['context_tokens']:,}",
                human_bytes(r["state_bytes"]),
                human_bytes(r["original_state_bytes"]),
                f"{r['flops_per_token'] / 1e6:,.0f}",
                f"{r['original_flops_per_token'] / 1e6:,.0f}",
                f"{r['moved_bytes_per_token'] / 1e6:,.1f}",
            ]
        )
        if timed:
            rate = r["decode_tokens_per_second_at_most"]
            cells[-1] += [f"{r['read_seconds'] / 60:,.3g}", f"{rate:,.1f}"]
    blocks = [pairs(shown), table(header, cells)]
    if data["sharding"]:
        blocks.append(_sharding_text(data["sharding"]))
    if data["choices"]:
        words = [f"{key}: {' '.join(why.split())}" for key, why in data["choices"].items()]
        wrapped = [fill(text, 96, initial_indent="  ", subsequent_indent="    ") for text in words]
        blocks.append("\n".join(["chosen where the recipe's own source is silent:", *wrapped]))
    if timed:
        machine = data["machine"]
        blocks.append(
            f"{machine['processor']}, {machine['threads']} threads, reads "
            f"{data['read_bytes_per_second'] / 1e9:.1f} GB/s\nassumed: {data['assumed']}"
        )
    return "\n\n".join(blocks)


def _sharding_text(rows: list[Data]) -> str:
    header = ["devices", "each to run", "each to train", "and gathered, a layer at a time"]
    sizes = ("run", "train", "gathered")
    cells = [[f"{r['ranks']:,}", *(human_bytes(r[key]) for key in sizes)] for r in rows]
    return table(header, cells) + (
        "\nFSDP2, a layer a unit: bf16 to run; float32 weights, gradients and moments of Adam to "
        "train"
    )
