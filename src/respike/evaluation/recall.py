"""Recall: can the model find something it has read, at a known distance? See `tasks` for what.

Every task is made of the model's own vocabulary and scored by its most likely next token, with the
right answer fed back (so that one slip is one slip). The chance level is that of a guess among the
answers a reader could know of without knowing which is asked for: 1 / vocabulary for copy, 10^-5
for passkey, else 1 over the number of values in the text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from respike.evaluation.distance import HEAD_TOKENS
from respike.evaluation.stats import mean_interval, wilson
from respike.models.decoder import Decoder
from respike.tasks import FAMILIES, Task, Trial, Vocabulary, make_trials

BATCH_TOKENS = 8192
"""Tokens of trials that run side by side."""


@dataclass(frozen=True)
class Score:
    """Result of a task: one value in 0..1 a trial."""

    task: Task
    per_trial: Tensor
    answer_nats: float
    """Mean negative log-likelihood of an answer token."""
    chance_frac: float

    def as_dict(self) -> dict[str, Any]:
        """Mean, 95 % interval (Wilson where each trial is 0 or 1, else bootstrap), counts."""
        n = len(self.per_trial)
        # Also when all copies are perfect or none has a word: a bootstrap would see no spread.
        if ((self.per_trial == 0) | (self.per_trial == 1)).all():
            interval = wilson(int(self.per_trial.sum()), n)
        else:
            interval = mean_interval(self.per_trial)
        return {
            "task": self.task.name,
            "accuracy_frac": float(self.per_trial.mean()),
            "accuracy_95": interval,
            "answer_nats": self.answer_nats,
            "chance_frac": self.chance_frac,
            "trials": n,
        }


def truncated(trial: Trial, last_tokens: int) -> list[Trial]:
    """The trial in pieces in which no answer has more than ``last_tokens`` tokens before it.

    Each piece is read as a text of its own, from position 0. A piece for every answer would take as
    many passes as there are answers, so answers within ``last_tokens / 4`` share one: each sees
    3/4 ``last_tokens`` to ``last_tokens`` tokens, or all there are before it if they are fewer.
    """
    pieces, answers = [], sorted(trial.answers)
    while answers:
        together = [a for a in answers if a - answers[0] <= last_tokens // 4]
        answers = answers[len(together) :]
        end = together[-1]
        begin = max(0, end - last_tokens)
        pieces.append(Trial(trial.tokens[begin : end + 1], [a - begin for a in together]))
    return pieces


def recall(
    decoder: Decoder,
    vocabulary: Vocabulary,
    task: Task,
    *,
    trials: int,
    seed: int = 0,
    last_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Run one task.

    Args:
        decoder: The model.
        vocabulary: From its tokenizer.
        task: What to do.
        trials: Independent repetitions.
        seed: Changes the words and numbers.
        last_tokens: Predict every answer from at most this many tokens, see `truncated`.
        progress: Called with (trials done, trials).
    """
    kind = FAMILIES[task.family]
    made = make_trials(vocabulary, task, trials, seed)
    pieces = [[trial] if last_tokens is None else truncated(trial, last_tokens) for trial in made]
    flat = [(number, piece) for number, some in enumerate(pieces) for piece in some]
    size = max(1, BATCH_TOKENS // max(len(piece.tokens) for _, piece in flat))
    hits: list[list[Tensor]] = [[] for _ in made]
    nats = []
    with torch.inference_mode():
        for begin in range(0, len(flat), size):
            batch = flat[begin : begin + size]
            found = _answers(decoder, [piece for _, piece in batch])
            for (number, _), (correct, losses) in zip(batch, found, strict=True):
                hits[number].append(correct)
                nats.append(losses)
            if progress:
                progress(flat[begin + size][0] if begin + size < len(flat) else trials, trials)
    right = [torch.cat(some) for some in hits]
    per_trial = torch.stack([h.all().float() if kind.whole else h.float().mean() for h in right])
    chance = kind.chance_frac(vocabulary, task)
    return Score(task, per_trial, float(torch.cat(nats).mean()), chance)


def _answers(decoder: Decoder, trials: Sequence[Trial]) -> list[tuple[Tensor, Tensor]]:
    """For each trial: which answer tokens came out first (bool), and their nats."""
    longest = max(len(t.tokens) for t in trials)
    rows = [t.tokens + [0] * (longest - len(t.tokens)) for t in trials]
    # Padding stands behind everything that is asked for, so causality keeps it out.
    tokens = torch.tensor(rows, device=decoder.embedding.device)
    hidden, _ = decoder.hidden(tokens)
    results = []
    for row, trial in enumerate(trials):
        hits, losses = [], []
        # Logits of a long trial's answers, all at once, would be gigabytes.
        for index in torch.split(torch.tensor(trial.answers, device=tokens.device), HEAD_TOKENS):
            logits = decoder.head(hidden[row : row + 1, index - 1])[0].float()
            target = tokens[row, index]
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
            hits.append(logits.argmax(-1) == target)
        results.append((torch.cat(hits).cpu(), torch.cat(losses).cpu()))
    return results
