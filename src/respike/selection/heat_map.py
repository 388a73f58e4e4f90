"""Pictures of what was measured of each KV group, and of what was chosen."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from respike.config import ModelConfig
from respike.selection.kept import KeptShares
from respike.selection.search import Selection
from respike.selection.student import Group


def draw_selection(selection: Selection, config: ModelConfig, path: Path) -> None:
    """Write a PNG: layers across, KV groups down, kept groups marked with the order of the pick."""
    first = selection.rounds[0]
    order = {group: str(i + 1) for i, group in enumerate(selection.picked)}
    panels = {
        "KL gain from adding the group to the all-window model, nats a token": first["kl_gain"],
        "recall lost when the original's group is windowed, nats an answer": (
            selection.recall_damage
        ),
    }
    _draw(panels, order, config, path)


def draw_kept(shares: KeptShares, config: ModelConfig, path: Path) -> None:
    """Likewise, with the number of tokens that each group keeps; those that keep none are empty."""
    marks = {group: f"{count}" for group, count in shares.kept.items()}
    even = shares.counts.index(shares.mean_tokens)
    missed = {group: 100 * row[even] for group, row in shares.missed.items()}
    title = f"attention missed if each group kept {shares.mean_tokens} tokens, % (kept tokens)"
    _draw({title: missed}, marks, config, path)


def _draw(
    panels: Mapping[str, Mapping[Group, float]],
    marks: Mapping[Group, str],
    config: ModelConfig,
    path: Path,
) -> None:
    depth, groups = config.num_hidden_layers, config.num_key_value_heads
    height = (1.2 + 0.25 * groups) * len(panels)
    width = max(7, depth * 0.34)
    figure, grid_of_axes = pyplot.subplots(len(panels), 1, figsize=(width, height), squeeze=False)
    axes = grid_of_axes[:, 0]
    size = 8 if max(map(len, marks.values()), default=1) < 3 else 6
    for axis, (title, scores) in zip(axes, panels.items(), strict=True):
        grid = [[max(0.0, scores.get((i, g), 0.0)) for i in range(depth)] for g in range(groups)]
        image = axis.imshow(grid, aspect="auto", cmap="viridis")
        figure.colorbar(image, ax=axis, pad=0.01)
        for (layer, group), mark in marks.items():
            bright = grid[group][layer] > 0.7 * max(map(max, grid))
            colour = "black" if bright else "white"
            axis.text(layer, group, mark, ha="center", va="center", color=colour, size=size)
        axis.set_title(title, size=9)
        axis.set_xticks(range(0, depth, 2))
        axis.set_yticks(range(groups))
        axis.set_ylabel("KV group")
    axes[-1].set_xlabel("layer")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
