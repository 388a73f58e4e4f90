"""Plots as inline SVG. Colours are CSS variables of the page, so that light and dark both work.

Solid lines and filled dots are measured in this run, squares on dotted lines come from committed
results, dashed lines are computed.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

# Stand-ins that no plot uses otherwise; `svg` puts the page's variables in their place.
INK, GRID, ORIGINAL, CONVERTED, WINDOW, OTHER = (f"#0{n}0{n}0{n}" for n in range(1, 7))
VARIABLES = {
    INK: "--ink", GRID: "--grid", ORIGINAL: "--original", CONVERTED: "--converted",
    WINDOW: "--window", OTHER: "--other",
}  # fmt: skip
COLOURS = {"original": ORIGINAL, "converted": CONVERTED, "window": WINDOW}
MARKERS = {"original": "o", "converted": "D", "window": "^"}
STYLE = {
    "font.size": 9, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "grid.color": GRID, "grid.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8.5,
    "lines.markersize": 4.5, "svg.fonttype": "path", "figure.constrained_layout.use": True,
}  # fmt: skip
WIDTH = 4.2
"""Inches; at 72 points an inch the text is as large on a phone's screen as on paper."""


@contextmanager
def plot(height: float = 3.3) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one set of axes in the house style."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}):
        figure, axes = pyplot.subplots(figsize=(WIDTH, height))
        try:
            yield figure, axes
        finally:
            pyplot.close(figure)


def svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as an <svg> element with an alternative text, without links or clashing ids."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            stream, format="svg", transparent=True,
            metadata={key: None for key in ("Creator", "Date", "Format", "Type")},
        )  # fmt: skip
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r'<svg width="[^"]*" height="[^"]*"|<svg height="[^"]*"', "<svg", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def tokens_axis(axes: Axes, values: Sequence[int]) -> None:
    """A logarithmic axis of context lengths, marked where there are values."""
    axes.set_xscale("log", base=2)
    values = sorted(set(values))
    while len(values) > 8:
        values = values[::2]
    axes.set_xticks(values, [short_count(v) for v in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context, tokens")


def short_count(count: float) -> str:
    """Such as 8k or 1M, in powers of two."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def short_bytes(count: float, _position: object = None) -> str:
    """Such as 256 MiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g} B"


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Above the axes, where it hides nothing."""
    # Drawn objects come sorted by kind; this run's belong first.
    pairs = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=committed_last)
    figure.legend(
        *zip(*pairs, strict=True), loc="outside upper center", ncols=columns, handlelength=2.4
    )


def committed_last(pair: tuple[object, str]) -> bool:
    """A sort key that keeps the order otherwise."""
    return pair[1].endswith("committed")


def state_plot(state: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Bytes of state against context: computed lines, measured dots."""
    with plot() as (figure, axes):
        for role, values in state["bytes"].items():
            axes.plot(state["tokens"], values, "--", color=COLOURS[role], label=role)
            mine = [row for row in rows if row["model"] == role]
            places, counted = (
                [row[key] for row in mine] for key in ("context_tokens", "state_bytes")
            )
            axes.plot(places, counted, MARKERS[role], color=COLOURS[role])
        axes.set_yscale("log", base=2)
        tokens_axis(axes, state["tokens"])
        axes.set_yticks([1 << n for n in range(22, 37, 2)])
        axes.yaxis.set_major_formatter(FuncFormatter(short_bytes))
        axes.set_ylabel("state of one sequence")
        legend(figure, axes, 3)
        ends = ", ".join(f"{r} {short_bytes(round(v[-1], -6))}" for r, v in state["bytes"].items())
        alt = f"State bytes against context length, both axes logarithmic. At 1M tokens: {ends}."
        return svg(figure, "state", alt)


def context_plot(
    key: str, label: str, live: Sequence[Mapping[str, Any]], earlier: Mapping[str, Any] | None
) -> str:
    """Median and range of one measure against context; ``earlier`` are committed results."""
    with plot() as (figure, axes):
        for role in ("original", "converted"):
            mine = [row for row in live if row["model"] == role]
            if mine:
                draw_range(axes, mine, key, role, f"{role}, this run")
        old = earlier["rows"] if earlier else []
        for name in dict.fromkeys(row["model"] for row in old):
            mine = [row for row in old if row["model"] == name]
            axes.plot(
                [r["context_tokens"] for r in mine], [r[key]["median"] for r in mine],
                "s:", color=COLOURS.get(name, OTHER), markerfacecolor="none", alpha=0.9,
                label=f"{name}, committed",
            )  # fmt: skip
        tokens_axis(axes, [r["context_tokens"] for r in [*live, *old]])
        if key == "ttft_seconds":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        else:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        legend(figure, axes, 2)
        return svg(figure, key.replace("_", "-"), context_alt(key, label, live))


def draw_range(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, role: str, label: str
) -> None:
    """A line through medians with bars from minimum to maximum."""
    middle = [row[key]["median"] for row in rows]
    low = [row[key]["median"] - row[key]["min"] for row in rows]
    high = [row[key]["max"] - row[key]["median"] for row in rows]
    axes.errorbar(
        [row["context_tokens"] for row in rows], middle, yerr=[low, high], capsize=3,
        color=COLOURS[role], marker=MARKERS[role], label=label,
    )  # fmt: skip


def context_alt(key: str, label: str, live: Sequence[Mapping[str, Any]]) -> str:
    """The longest length of each model in words."""
    last = {row["model"]: row for row in live}
    ends = ", ".join(
        f"{name} {row[key]['median']:.3g} at {row['context_tokens']:,} tokens"
        for name, row in last.items()
    )
    return f"{label} against context length, measured in this run: {ends}."


def kl_plot(check: Mapping[str, Any]) -> str:
    """KL from the original by position, with 95 % intervals."""
    with plot() as (figure, axes):
        models = check["models"]
        for index, (role, result) in enumerate(models.items()):
            values = [b["kl_nats"] for b in result["buckets"]]
            lows = [max(0, b["kl_nats"] - b["kl_nats_95"][0]) for b in result["buckets"]]
            highs = [max(0, b["kl_nats_95"][1] - b["kl_nats"]) for b in result["buckets"]]
            places = [i + (index - (len(models) - 1) / 2) * 0.38 for i in range(len(values))]
            axes.bar(
                places, values, 0.36, yerr=[lows, highs], capsize=3, color=COLOURS[role],
                ecolor=INK, label=role,
            )  # fmt: skip
        spans = [f"{b['from_tokens']}-{b['to_tokens'] - 1}" for b in result["buckets"]]
        axes.set_xticks(range(len(spans)), spans)
        axes.xaxis.grid(visible=False)
        axes.set_xlabel("tokens of context before the prediction")
        axes.set_ylabel("KL from the original, nats a token")
        legend(figure, axes, 2)
        last = ", ".join(f"{r} {m['buckets'][-1]['kl_nats']:.3g}" for r, m in models.items())
        return svg(
            figure, "kl", f"KL from the original by position. At {spans[-1]} tokens: {last}."
        )


def recall_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Share found of each task by each model, with 95 % intervals and the chance level."""
    with plot(0.9 + 0.72 * len(rows)) as (figure, axes):
        for index, role in enumerate(("original", "converted", "window")):
            scores = [row["scores"][role] for row in rows]
            values = [s["accuracy_frac"] for s in scores]
            low = [max(0, s["accuracy_frac"] - s["accuracy_95"][0]) for s in scores]
            high = [max(0, s["accuracy_95"][1] - s["accuracy_frac"]) for s in scores]
            places = [i + (index - 1) * 0.26 for i in range(len(rows))]
            axes.barh(
                places, values, 0.24, xerr=[low, high], capsize=2.5, color=COLOURS[role],
                ecolor=INK, label=role, error_kw={"elinewidth": 1},
            )  # fmt: skip
        for i, row in enumerate(rows):
            chance = [row["chance_frac"]] * 2
            axes.plot(chance, [i - 0.42, i + 0.42], color=INK, lw=1.4, ls=(0, (2, 1.5)),
                      label="chance" if i == 0 else None)  # fmt: skip
        axes.set_yticks(range(len(rows)), [two_lines(row["task"]) for row in rows])
        axes.invert_yaxis()
        axes.yaxis.grid(visible=False)
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("share found")
        legend(figure, axes, 4)
        said = "; ".join(
            f"{row['task']}: "
            + ", ".join(f"{role} {s['accuracy_frac']:.2f}" for role, s in row["scores"].items())
            for row in rows
        )
        return svg(figure, "recall", f"Share found in each recall task. {said}.")


def share_plot(share: Mapping[str, Any]) -> str:
    """Memory's mean share of attention in each layer that has one."""
    with plot(2.6) as (figure, axes):
        places = [int(layer) for layer in share["layers"]]
        values = list(share["layers"].values())
        axes.bar(places, values, 0.7, color=CONVERTED)
        axes.axhline(share["mean_frac"], color=INK, lw=1, ls=(0, (2, 1.5)), label="mean of heads")
        axes.xaxis.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel("memory's share of attention")
        legend(figure, axes, 1)
        most = max(range(len(values)), key=values.__getitem__)
        alt = (
            f"Memory's share of attention in {len(values)} layers: mean of heads "
            f"{share['mean_frac']:.3f}, most in layer {places[most]}: {values[most]:.3f}."
        )
        return svg(figure, "share", alt)


def two_lines(task: str) -> str:
    """``passkey length 1024 depth 0.1`` on two lines."""
    family, rest = task.split(" ", 1)
    return f"{family}\n{rest.replace('length ', '')}"


FRONTIER_STYLES = {
    "original": ("o", ORIGINAL), "window": ("^", WINDOW), "even": ("s", OTHER),
    "retrieval": ("D", CONVERTED),
}  # fmt: skip


def frontier_plot(result: Mapping[str, Any], measure: str, length: str, name: str) -> str:
    """Quality against cache bytes; ``measure`` is kl or copy."""
    with plot() as (figure, axes):
        for kind, (marker, colour) in FRONTIER_STYLES.items():
            mine = [row for row in result["rows"] if row["kind"] == kind]
            points = [frontier_point(row, measure) for row in mine]
            if not mine:
                continue
            axes.errorbar(
                [row["state_bytes"][length] for row in mine], [p[0] for p in points],
                yerr=[[p[1] for p in points], [p[2] for p in points]], fmt=marker, color=colour,
                capsize=2.5, elinewidth=1, label=kind, linestyle="none",
            )  # fmt: skip
            for row, point in zip(mine, points, strict=True):
                if kind == "retrieval":
                    axes.annotate(
                        str(row["softmax_groups"]), (row["state_bytes"][length], point[0]),
                        xytext=(5, 5), textcoords="offset points", size=7.5,
                    )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(short_bytes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"state at {int(length):,} tokens")
        labels = {"kl": "KL beyond the window, nats a token", "copy": "copying, share right"}
        axes.set_ylabel(labels[measure])
        axes.set_ylim(bottom=0)
        legend(figure, axes, 4)
        alt = f"{labels[measure]} against state bytes for {len(result['rows'])} conversions."
        return svg(figure, name, alt)


def frontier_point(row: Mapping[str, Any], measure: str) -> tuple[float, float, float]:
    """Value, and how far its interval reaches down and up."""
    if measure == "kl":
        value, (low, high) = row["beyond"]["kl_nats"], row["beyond"]["kl_nats_95"]
    else:
        value, (low, high) = row["copy"]["accuracy_frac"], row["copy"]["accuracy_95"]
    return value, max(0.0, value - low), max(0.0, high - value)


def layer_map(grid: Sequence[Sequence[bool]]) -> str:
    """Layers across, KV groups down; filled cells keep full softmax."""
    step, left, top = 12, 20, 4
    layers, groups = len(grid), len(grid[0])
    parts = []
    for x, layer in enumerate(grid):
        for y, kept in enumerate(layer):
            place = f'x="{left + x * step}" y="{top + y * step}" width="10" height="10" rx="1.5"'
            kind = "keeps" if kept else "streams"
            parts.append(f'<rect class="{kind}" {place}/>')
    for x in range(0, layers, 5):
        at = f'x="{left + x * step + 5}" y="{top + groups * step + 12}"'
        parts.append(f'<text {at} text-anchor="middle">{x}</text>')
    for y in range(groups):
        at = f'x="{left - 5}" y="{top + y * step + 8.5}"'
        parts.append(f'<text {at} text-anchor="end">{y}</text>')
    kept = [f"{i}.{g}" for i, layer in enumerate(grid) for g, keeps in enumerate(layer) if keeps]
    alt = f"Layer.group pairs that keep full softmax: {', '.join(kept) or 'none'}."
    size = f"0 0 {left + layers * step} {top + groups * step + 16}"
    inner = "".join(parts)
    return f'<svg class="map" role="img" aria-label="{alt}" viewBox="{size}">{inner}</svg>'
