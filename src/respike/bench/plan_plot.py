"""A picture of a plan: state, work and traffic of a token against length, beside the original's."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

from respike.bench.plot import short

PANELS = (
    ("state_bytes", "original_state_bytes", 1 << 20, "state, MiB (bf16)"),
    ("flops_per_token", "original_flops_per_token", 10**9, "work, GFLOP a token"),
    ("moved_bytes_per_token", "original_moved_bytes_per_token", 10**6, "traffic, MB a token"),
)


def draw(data: dict[str, Any], path: Path) -> None:
    """Write a PNG of what `respike.bench.plan.plan` returned: counted, not measured."""
    rows = data["rows"]
    lengths = [row["context_tokens"] for row in rows]
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13, 4.2), layout="constrained")
    for axis, (mine, original, unit, label) in zip(axes, PANELS, strict=True):
        for key, name, style in ((mine, data["recipe"], "o-"), (original, data["target"], "s--")):
            axis.plot(lengths, [row[key] / unit for row in rows], style, label=name, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [short(n) for n in lengths], size=7)
        axis.minorticks_off()
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
        axis.set_xlabel("length, tokens")
        axis.set_title(label, size=10)
    axes[0].legend(fontsize=8)
    figure.suptitle("counted from shapes, not measured", size=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
