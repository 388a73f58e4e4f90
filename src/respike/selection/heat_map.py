"""A picture of a selection: what each KV group is worth, and which were kept."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from respike.config import ModelConfig
from respike.selection.search import Selection


def draw(selection: Selection, config: ModelConfig, path: Path) -> None:
    """Write a PNG: layers across, KV groups down, kept groups marked with the order of the pick."""
    first = selection.rounds[0]
    panels = [
        ("KL gain from adding the group to the all-window model, nats a token", first["kl_gain"]),
        (
            "recall lost when the original's group is windowed, nats an answer",
            selection.recall_damage,
        ),
    ]
    depth, groups = config.num_hidden_layers, config.num_key_value_heads
    figure, axes = pyplot.subplots(2, 1, figsize=(max(7, depth * 0.34), 2.4 + 0.5 * groups))
    order = {group: i + 1 for i, group in enumerate(selection.picked)}
    for axis, (title, scores) in zip(axes, panels, strict=True):
        grid = [[max(0.0, scores.get((i, g), 0.0)) for i in range(depth)] for g in range(groups)]
        image = axis.imshow(grid, aspect="auto", cmap="viridis")
        figure.colorbar(image, ax=axis, pad=0.01)
        for (layer, group), number in order.items():
            bright = grid[group][layer] > 0.7 * max(map(max, grid))
            colour = "black" if bright else "white"
            axis.text(layer, group, str(number), ha="center", va="center", color=colour, size=8)
        axis.set_title(title, size=9)
        axis.set_xticks(range(0, depth, 2))
        axis.set_yticks(range(groups))
        axis.set_ylabel("KV group")
    axes[-1].set_xlabel("layer")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
