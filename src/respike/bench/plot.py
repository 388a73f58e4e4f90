"""A picture of a bench: time to a first token, decoding and memory against length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Row = Mapping[str, Any]
PANELS = (
    ("ttft_seconds", "first token, seconds"),
    ("decode_tokens_per_second", "decode, tokens a second"),
    ("peak_rss_bytes", "peak memory, GiB"),
)


def draw(rows: Sequence[Row], fitted: Sequence[Row], quoted: Sequence[str], path: Path) -> None:
    """Write a PNG: measured lines solid, fitted ones dashed, n = 1 hollow, ideals dotted.

    Args:
        rows: From `respike.bench.report.row_of`.
        fitted: From `respike.bench.report.fitted_rows`.
        quoted: Contenders to draw; a peer has too many settings for all of them.
        path: The file to write.
    """
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, (key, label) in zip(axes, PANELS, strict=True):
        for number, name in enumerate(quoted):
            mine = [r for r in rows if r["contender"] == name and r[key] is not None]
            _draw_measured(axis, mine, key, f"C{number}", name)
            if key != "peak_rss_bytes":
                guessed = [r for r in fitted if r["contender"] == name]
                _draw_fitted(axis, mine, guessed, key, f"C{number}")
            if key == "decode_tokens_per_second" and mine:
                ideal = [(r["context_tokens"], r["ideal_decode_tokens_per_second"]) for r in mine]
                axis.plot(*zip(*ideal, strict=True), ":", color=f"C{number}", linewidth=0.9)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        places = sorted({r["context_tokens"] for r in (*rows, *fitted)})
        axis.set_xticks(places, [short(n) for n in places], size=7)
        axis.minorticks_off()
        axis.set_xlabel("length, tokens")
        axis.set_title(label, size=10)
    axes[0].legend(fontsize=7)
    figure.suptitle(
        "solid: measured, hollow: n = 1, dashed: fitted; dotted: what reading weights and cache "
        "allows",
        size=9,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_measured(axis: Any, rows: Sequence[Row], key: str, colour: str, name: str) -> None:
    if not rows:
        return
    x = [r["context_tokens"] for r in rows]
    y = [_middle(r, key) for r in rows]
    axis.plot(x, y, "-", color=colour, linewidth=1.4, label=name)
    for row, here, value in zip(rows, x, y, strict=True):
        fill = colour if row["n"] > 1 else "white"
        axis.plot(here, value, "o", color=colour, markerfacecolor=fill, markersize=4)
        if isinstance(row[key], Mapping):
            axis.vlines(here, row[key]["min"], row[key]["max"], color=colour, linewidth=0.8)


def _draw_fitted(
    axis: Any, measured: Sequence[Row], fitted: Sequence[Row], key: str, colour: str
) -> None:
    if not fitted or not measured:
        return
    joined = sorted([measured[-1], *fitted], key=lambda r: int(r["context_tokens"]))
    x, y = [r["context_tokens"] for r in joined], [_middle(r, key) for r in joined]
    axis.plot(x, y, "--", color=colour, linewidth=1.2)


def _middle(row: Row, key: str) -> float:
    value = row[key]["median"] if isinstance(row[key], Mapping) else row[key]
    return float(value) / (1 << 30 if key == "peak_rss_bytes" else 1)


def short(count: int) -> str:
    """Such as 64k or 1M."""
    for unit, size in (("M", 1 << 20), ("k", 1024)):
        if count % size == 0:
            return f"{count // size}{unit}"
    return str(count)
