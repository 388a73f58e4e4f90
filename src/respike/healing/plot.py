"""A picture of a course: loss, KL on held-out text, recall, and speed against tokens.

Of a model that spikes also the share of the weights behind neurons that is skipped.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

SMOOTHED_STEPS = 16


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG.

    Args:
        lines: From `respike.healing.log.Log.lines`.
        path: The file to write.
    """
    steps = [line for line in lines if line["kind"] == "step"]
    verdicts = [line for line in lines if line["kind"] == "verdict"]
    spikes = any("skipped_frac" in line for line in steps)
    columns = 5 if spikes else 4
    figure, axes = pyplot.subplots(
        1, columns, figsize=(3.75 * columns, 3.6), layout="constrained", squeeze=False
    )
    axes = axes[0]
    if spikes:
        _silence(axes[4], steps, verdicts)
    for kind in dict.fromkeys(map(_kind, steps)):
        mine = [line for line in steps if _kind(line) == kind]
        x = [line["tokens"] / 1e6 for line in mine]
        known = [
            (at, line["loss"]) for at, line in zip(x, mine, strict=True) if line["loss"] is not None
        ]
        at, losses = map(list, zip(*known, strict=True)) if known else ([], [])
        (line,) = axes[0].plot(at, _smooth(losses), label=kind)
        axes[3].plot(x, [v["tokens_per_second"] for v in mine], color=line.get_color(), lw=0.8)
    if steps:
        axes[0].set_yscale("log")
        axes[0].legend(fontsize=7)
    axes[0].set_title(f"loss of the stage, mean of {SMOOTHED_STEPS} steps", size=9)
    x = [v["tokens"] / 1e6 for v in verdicts]
    low, high = zip(*(v["kl_95"] for v in verdicts), strict=True) if verdicts else ((), ())
    axes[1].fill_between(x, low, high, alpha=0.2)
    axes[1].plot(x, [v["kl_nats"] for v in verdicts], "o-", ms=3)
    axes[1].set_ylim(bottom=0)
    axes[1].set_title("KL to the original beyond 256 tokens, nats", size=9)
    for task in verdicts[0]["tasks"] if verdicts else ():
        axes[2].plot(x, [v["tasks"][task][0] for v in verdicts], "o-", ms=3, label=task)
    axes[2].plot(x, [v["recall_frac"] for v in verdicts], "k--", label="mean")
    axes[2].set_ylim(0, 1.02)
    axes[2].legend(fontsize=7)
    axes[2].set_title("recall, share right", size=9)
    axes[3].set_ylim(bottom=0)
    axes[3].set_title("tokens a second", size=9)
    for axis in axes:
        axis.set_xlabel("million tokens of training")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _kind(step: dict[str, Any]) -> str:
    """Steps of a stage with memories off have losses of their own."""
    stage: str = step["stage"]
    return f"{stage}, memory off" if step.get("memory") == "off" else stage


def _silence(axis: Any, steps: list[dict[str, Any]], verdicts: list[dict[str, Any]]) -> None:
    """What was asked, what the steps skipped, and what was measured."""
    mine = [line for line in steps if "skipped_frac" in line]
    x = [line["tokens"] / 1e6 for line in mine]
    axis.plot(x, [line["asked_frac"] for line in mine], "k--", label="asked")
    axis.plot(x, [line["skipped_frac"] for line in mine], lw=0.8, label="training")
    measured = [v for v in verdicts if v.get("skipped_frac") is not None]
    x = [v["tokens"] / 1e6 for v in measured]
    axis.plot(x, [v["skipped_frac"] for v in measured], "o-", ms=3, label="held out")
    axis.set_ylim(0, 1)
    axis.legend(fontsize=7)
    axis.set_title("weights skipped behind neurons, share", size=9)


def _smooth(values: Sequence[float]) -> list[float]:
    return [
        sum(values[max(0, i + 1 - SMOOTHED_STEPS) : i + 1]) / min(i + 1, SMOOTHED_STEPS)
        for i in range(len(values))
    ]
