"""A picture of recall: depth x length maps and curves, for every column that was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from respike.evaluation.columns import LABELS
from respike.tasks import FAMILIES, Task, parse_task

STYLES = dict(zip(LABELS, ("C0-", "C1-", "C2--", "C4-.", "C3:"), strict=True))
"""Colour and dashes of a column, the same in every picture."""
Found = Sequence[tuple[Task, Mapping[str, Any]]]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG.

    One map a column for families with a depth; a curve a column for the others, with 95 % bands for
    original and converted. Where the original scores too little to be evidence, a map's figure
    stands in brackets and a curve's point is hollow.

    Args:
        rows: From `respike.evaluation.columns.row`, one a task.
        path: The file to write.
    """
    found = [(parse_task(row["setting"]), row) for row in rows]
    columns = [name for name in LABELS if f"{name}_accuracy_frac" in rows[0]]
    grids = [f for f, kind in FAMILIES.items() if kind.third == "depth" and _of(found, f)]
    curves = _curves(found)
    height = 3.2 * bool(curves) + 2.8 * len(grids)
    figure = pyplot.figure(figsize=(max(8.0, 2.9 * len(columns)), height), layout="constrained")
    ratios = [3.2] * bool(curves) + [2.8] * len(grids)
    parts = list(figure.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0])
    if curves:
        part = parts.pop(0)
        part.suptitle("hollow: no evidence, the original scores under 80 %", size=10)
        axes = part.subplots(1, len(curves), squeeze=False, sharey=True)[0]
        for axis, (title, unit, points) in zip(axes, curves, strict=True):
            _draw_curves(axis, points, columns)
            axis.set_title(title, size=9)
            axis.set_xlabel(unit)
        axes[0].set_ylabel("accuracy")
        axes[0].legend(fontsize=7)
    for family, part in zip(grids, parts, strict=True):
        part.suptitle(f"{family}: share found, % (in brackets: no evidence)", size=10)
        for number, axis in enumerate(part.subplots(1, len(columns), squeeze=False)[0]):
            _draw_map(axis, _of(found, family), columns[number])
            axis.set_title(LABELS[columns[number]], size=9)
            axis.set_xlabel("length, tokens")
            if number == 0:
                axis.set_ylabel("depth")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _of(found: Found, family: str) -> list[tuple[Task, Mapping[str, Any]]]:
    return [(task, row) for task, row in found if task.family == family]


def _curves(found: Found) -> list[tuple[str, str, list[tuple[int, Mapping[str, Any]]]]]:
    """(title, what x is, points by x) of every family without a depth."""
    curves = []
    for family, kind in FAMILIES.items():
        mine = _of(found, family)
        if kind.third is None and mine:
            points = sorted(((task.size, row) for task, row in mine), key=_x)
            curves.append((family, kind.unit, points))
        if kind.third == "hops":
            for size in sorted({task.size for task, _ in mine}):
                these = ((task.hops, row) for task, row in mine if task.size == size)
                points = sorted(these, key=_x)
                curves.append((f"{family}, {kind.unit} {size}", "hops", points))
    return curves


def _x(point: tuple[int, Mapping[str, Any]]) -> int:
    return point[0]


def _draw_curves(
    axis: Any, points: Sequence[tuple[int, Mapping[str, Any]]], columns: Sequence[str]
) -> None:
    x = [value for value, _ in points]
    for name in columns:
        y = [row[f"{name}_accuracy_frac"] for _, row in points]
        (line,) = axis.plot(x, y, STYLES[name], label=LABELS[name], linewidth=1.4)
        colour = line.get_color()
        for here, value, (_, row) in zip(x, y, points, strict=True):
            fill = colour if row.get("evidence", True) else "white"
            axis.plot(here, value, "o", color=colour, markerfacecolor=fill, markersize=4)
        if name in ("original", "model"):
            low, high = zip(*(row[f"{name}_accuracy_95"] for _, row in points), strict=True)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(x, [row["chance_frac"] for _, row in points], color="grey", linewidth=0.6)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [str(value) for value in x], rotation=45, size=7)
    axis.minorticks_off()


def _draw_map(axis: Any, cells: Found, column: str) -> None:
    sizes = sorted({task.size for task, _ in cells})
    depths = sorted({task.depth_frac for task, _ in cells})
    grid = [[float("nan")] * len(sizes) for _ in depths]
    for task, row in cells:
        value = row[f"{column}_accuracy_frac"]
        across, down = sizes.index(task.size), depths.index(task.depth_frac)
        grid[down][across] = value
        text = f"{100 * value:.0f}" if row.get("evidence", True) else f"({100 * value:.0f})"
        colour = "black" if value > 0.6 else "white"
        axis.text(across, down, text, ha="center", va="center", color=colour, size=8)
    axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axis.set_xticks(range(len(sizes)), [str(size) for size in sizes], size=7)
    axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], size=7)
