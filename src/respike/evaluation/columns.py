"""The five columns of recall: what of a converted model's score is whose work.

original     The source.
model        The converted model.
memory_off   The converted model without its memory: what the memory adds.
window_off   The converted model without its window: what reaches without it.
truncated    The source, shown only a window's worth of tokens: what needs no memory at all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from respike.config import ModelConfig
from respike.errors import UsageError
from respike.evaluation.recall import Score, recall
from respike.evaluation.stats import paired_interval
from respike.material import Vocabulary
from respike.models.ablation import without
from respike.models.decoder import Decoder
from respike.tasks import Task

LABELS = {
    "original": "original",
    "model": "converted",
    "memory_off": "memory off",
    "window_off": "window off",
    "truncated": "original, truncated",
}
WINDOW_TOKENS = 256
"""What counts as the window of a model that has none."""
EVIDENCE_FRAC = 0.8
"""A task on which the original scores less says nothing about a conversion."""


@dataclass(frozen=True)
class Column:
    """A model, and how it is run.

    Attributes:
        name: As in the module's text.
        decoder: The model.
        off: The part of it that is switched off.
        last_tokens: How many tokens before an answer it is shown; None shows all.
    """

    name: str
    decoder: Decoder
    off: str | None = None
    last_tokens: int | None = None

    @property
    def missing(self) -> str | None:
        """Why this column cannot be measured, or None if it can."""
        try:
            if self.off is not None:
                with without(self.decoder, self.off):
                    pass
        except UsageError as error:
            return str(error)
        return None

    def score(
        self,
        vocabulary: Vocabulary,
        task: Task,
        *,
        trials: int,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Score:
        """Run one task; see `recall`.

        Raises:
            UsageError: The model has no such part to switch off.
        """
        options: dict[str, Any] = {"trials": trials, "seed": seed, "progress": progress}
        options["last_tokens"] = self.last_tokens
        if self.off is None:
            return recall(self.decoder, vocabulary, task, **options)
        with without(self.decoder, self.off):
            return recall(self.decoder, vocabulary, task, **options)


def window_tokens(config: ModelConfig) -> int:
    """The largest window of the model's mixers; `WINDOW_TOKENS` where there is none."""
    windows = (getattr(part, "window_tokens", 0) for _, part in config.mixers())
    return max(windows, default=0) or WINDOW_TOKENS


def five_columns(original: Decoder, converted: Decoder, last_tokens: int) -> list[Column]:
    """All of the module's text; the truncated original sees ``last_tokens`` tokens."""
    return [
        Column("original", original),
        Column("model", converted),
        Column("memory_off", converted, off="memory"),
        Column("window_off", converted, off="window"),
        Column("truncated", original, last_tokens=last_tokens),
    ]


def row(task: Task, scores: Mapping[str, Score]) -> dict[str, Any]:
    """What was measured of one task, flat, for JSON.

    Args:
        task: The task.
        scores: By the name of the column. With ``original`` there is a verdict on whether the task
            is evidence; with ``model`` too, what was lost, paired by trial.
    """
    first = next(iter(scores.values()))
    found: dict[str, Any] = {
        "task": task.name,
        "setting": task.setting,
        "trials": len(first.per_trial),
        "chance_frac": first.chance_frac,
    }
    for name, score in scores.items():
        result = score.as_dict()
        found |= {
            f"{name}_accuracy_frac": result["accuracy_frac"],
            f"{name}_accuracy_95": result["accuracy_95"],
            f"{name}_answer_nats": result["answer_nats"],
        }
    if "original" in scores:
        found["evidence"] = found["original_accuracy_frac"] >= EVIDENCE_FRAC
        if "model" in scores:
            lost = scores["original"].per_trial - scores["model"].per_trial
            found |= {"lost_frac": float(lost.mean()), "lost_95": paired_interval(lost)}
    return found
