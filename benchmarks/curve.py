"""Quality against tokens of healing, and where published systems' training ends on that axis.

    python benchmarks/curve.py NAME=FOLDER NAME=FOLDER... -o benchmarks/results/curve_X.json

FOLDER is what `respike heal` wrote; FOLDER.healing, beside it, holds the log. A figure of the
course's judge: KL from the original on documents that no step sees, beyond 256 tokens. Courses
judge on the same documents where corpus and seed are the same, as here. The published systems
report no KL, so they are marks at their tokens, with their share of layers without a window.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from resultfile import named_folder, unique, write
from tables import curve_table

from respike.bench.machine import provenance
from respike.checkpoint import open_checkpoint
from respike.config import ModelConfig

PUBLISHED = (
    ("SpikingBrain2.0-5B", 14e9, 10 / 36, "arXiv:2604.22575"),
    ("SpikingBrain-7B", 150e9, 0.0, "arXiv:2509.05276"),
    ("SpikingBrain-76B", 160e9, 4 / 28, "arXiv:2509.05276"),
)
"""Name, tokens, softmax share, source."""


def softmax_share(config: ModelConfig) -> float:
    """Of all KV groups, those that attend to everything, or choose among all of it."""
    groups = [len(part.groups) for _, part in config.mixers() if part.mixer in ("full", "blocks")]
    return sum(groups) / (config.num_hidden_layers * config.num_key_value_heads)


def row(name: str, folder: Path) -> dict[str, Any]:
    log = folder.with_name(f"{folder.name}.healing") / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    names = ("tokens", "kl_nats", "kl_95", "nats_added", "recall_frac")
    verdicts = [{key: line[key] for key in names} for line in lines if line["kind"] == "verdict"]
    share = softmax_share(open_checkpoint(folder).config)
    return {"name": name, "softmax_frac": share, "verdicts": verdicts}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    for one in rows:
        x = [max(v["tokens"], 1e3) for v in one["verdicts"]]
        low, high = zip(*(v["kl_95"] for v in one["verdicts"]), strict=True)
        label = f"{one['name']}, {one['softmax_frac']:.0%} softmax"
        (line,) = axis.plot(x, [v["kl_nats"] for v in one["verdicts"]], "o-", ms=4, label=label)
        axis.fill_between(x, low, high, alpha=0.2, color=line.get_color())
    for i, (name, tokens, share, _) in enumerate(PUBLISHED):
        axis.axvline(tokens, color="gray", ls=":")
        axis.text(tokens, 0.98 - 0.16 * i, f"{name}, {share:.0%} softmax ", ha="right", va="top",
                  transform=axis.get_xaxis_transform(), size=8)  # fmt: skip
    axis.set(xscale="log", yscale="log", xlim=(0.8e3, 4e11))
    axis.set_xlabel("tokens of training after conversion (those on the left edge: none)")
    axis.set_ylabel("KL to the original, nats")
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=named_folder, metavar="NAME=FOLDER")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    unique([name for name, _ in options.folders])
    rows = [row(name, folder) for name, folder in options.folders]
    draw(rows, options.output.with_suffix(".png"))
    published = [
        dict(zip(("name", "tokens", "softmax_frac", "source"), one, strict=True))
        for one in PUBLISHED
    ]
    found = {"benchmark": "curve", **provenance(), "rows": rows, "published": published}
    write(options.output, found)
    print(curve_table(found))


if __name__ == "__main__":
    main()
