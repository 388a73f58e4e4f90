"""Recall: can the model find something it has read, at a known distance? See `tasks` for what.

Every task is made of the model's own vocabulary and scored by its most likely next token, with the
right answer fed back (so that one slip is one slip). The chance level is that of a guess among the
answers a reader could know of without knowing which is asked for: 1 / vocabulary for copy, 10^-5
for passkey, 1 over the values that the relation takes for questions, else 1 over the number of
values in the text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from respike.evaluation.reading import read_answers
from respike.evaluation.stats import mean_interval, wilson
from respike.material import Trial, Vocabulary
from respike.models.decoder import Decoder
from respike.tasks import FAMILIES, Task, make_trials


@dataclass(frozen=True)
class Score:
    """Result of a task: one value in 0..1 a trial; of several questions, the share answered."""

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
    texts, owners = [], []
    for number, trial in enumerate(make_trials(vocabulary, task, trials, seed)):
        if last_tokens is None:
            texts.append(trial.asked())
            owners += [(number, question) for question in range(len(texts[-1]))]
            continue
        for question, asked in enumerate(trial.asked()):
            for piece in truncated(asked, last_tokens):
                texts.append([piece])
                owners.append((number, question))
    hits: dict[tuple[int, int], list[Tensor]] = {owner: [] for owner in owners}
    nats = []
    for done, (correct, losses) in enumerate(read_answers(decoder, texts), start=1):
        hits[owners[done - 1]].append(correct)
        nats.append(losses)
        if progress:
            progress(owners[done][0] if done < len(owners) else trials, trials)
    right: list[list[Tensor]] = [[] for _ in range(trials)]
    for (number, _), some in hits.items():
        each = torch.cat(some)
        right[number].append(each.all().float() if kind.whole else each.float().mean())
    per_trial = torch.stack([torch.stack(each).mean() for each in right])
    chance = kind.chance_frac(vocabulary, task)
    return Score(task, per_trial, float(torch.cat(nats).mean()), chance)
