"""Recall: can the model find something it has read, at a known distance? Three families of tasks.

copy         Random tokens, then the same again. Score: tokens of the repeat predicted right.
passkey      A five-digit number hidden in filler, asked for at the end. Score: all digits right.
multi-query  Word pairs, then some keys again, shuffled. Score: values predicted right.

Every task is made of the model's own vocabulary and scored by its most likely next token, with the
right answer fed back (so that one slip is one slip). The chance level is that of a guess among the
answers a reader without memory could know of: 1 / vocabulary, 10^-5, 1 / pairs.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from respike.errors import UsageError
from respike.evaluation.stats import mean_interval, wilson
from respike.models.decoder import Decoder
from respike.tokenizer import Tokenizer

TASKS = ("copy", "passkey", "multi-query")
BATCH_TOKENS = 8192
"""Tokens of trials that run side by side."""
WORD = re.compile(" [a-z]{3,}")
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)


@dataclass(frozen=True)
class Trial:
    """Token ids and the indices of those that count as answers."""

    tokens: list[int]
    answers: list[int]


@dataclass(frozen=True)
class Task:
    """One setting of a family.

    Attributes:
        family: Of `TASKS`.
        size: copy: lag in tokens. passkey: length in tokens. multi-query: number of pairs.
        depth_frac: passkey: where the number stands, 0 the beginning, 1 the end.
    """

    family: str
    size: int
    depth_frac: float = 0.5

    @property
    def name(self) -> str:
        """Such as ``copy lag 512``."""
        unit = {"copy": "lag", "passkey": "length", "multi-query": "pairs"}[self.family]
        depth = f" depth {self.depth_frac:g}" if self.family == "passkey" else ""
        return f"{self.family} {unit} {self.size}{depth}"


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


class Vocabulary:
    """What tasks are made of: all tokens but the special ones, and those that are plain words.

    A word is one token of a space and at least three lower-case ASCII letters; in a vocabulary with
    hardly any (a toy), every token serves as one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        special = set(tokenizer.special_ids)
        self.tokens = [t for t in range(tokenizer.vocab_size) if t not in special]
        words = [t for t in self.tokens if WORD.fullmatch(tokenizer.decode([t]))]
        self.words = words if len(words) >= 16 else self.tokens

    def ids(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self.tokenizer.encode(text)


def copy_trial(vocabulary: Vocabulary, task: Task, rng: random.Random) -> Trial:
    """``size`` random tokens twice; the first of the repeat cannot be known and does not count.

    Any token but the special ones, not words: words invite a model to go on as text would, and
    SmolLM2-135M then copies 14 % where it copies half of random tokens.
    """
    tokens = rng.choices(vocabulary.tokens, k=task.size)
    return Trial(tokens + tokens, list(range(task.size + 1, 2 * task.size)))


def passkey_trial(vocabulary: Vocabulary, task: Task, rng: random.Random) -> Trial:
    """Filler, the sentence with the number at its depth, filler, the question."""
    key = f"{rng.randrange(10**5):05d}"
    needle = vocabulary.ids(f"The pass key is {key}. Remember it. {key} is the pass key. ")
    question = vocabulary.ids("What is the pass key? The pass key is")
    answer = vocabulary.ids(f" {key}")
    filler = vocabulary.ids(FILLER)
    room = task.size - len(needle) - len(question) - len(answer)
    if room < 0:
        raise UsageError(f"passkey needs a length of at least {task.size - room} tokens")
    filler = (filler * (room // len(filler) + 1))[:room]
    before = round(task.depth_frac * room)
    tokens = filler[:before] + needle + filler[before:] + question + answer
    return Trial(tokens, list(range(len(tokens) - len(answer), len(tokens))))


def multi_query_trial(vocabulary: Vocabulary, task: Task, rng: random.Random) -> Trial:
    """``size`` lines ``key = value``, then up to 16 of the keys again in another order."""
    if 2 * task.size > len(vocabulary.words):
        raise UsageError(f"multi-query: {task.size} pairs need {2 * task.size} words")
    drawn = rng.sample(vocabulary.words, 2 * task.size)
    keys, values = drawn[: task.size], drawn[task.size :]
    equals, newline = vocabulary.ids(" ="), vocabulary.ids("\n")
    tokens: list[int] = []
    answers = []
    for key, value in zip(keys, values, strict=True):
        tokens += [key, *equals, value, *newline]
    for index in rng.sample(range(task.size), min(task.size, 16)):
        tokens += [keys[index], *equals, values[index], *newline]
        answers.append(len(tokens) - 1 - len(newline))
    return Trial(tokens, answers)


TRIALS: dict[str, Callable[[Vocabulary, Task, random.Random], Trial]] = {
    "copy": copy_trial,
    "passkey": passkey_trial,
    "multi-query": multi_query_trial,
}


def make_trials(vocabulary: Vocabulary, task: Task, trials: int, seed: int = 0) -> list[Trial]:
    """The same trials for every model with this vocabulary: they depend on task and seed only."""
    return [
        TRIALS[task.family](vocabulary, task, random.Random(f"{seed}/{task.name}/{i}"))
        for i in range(trials)
    ]


def recall(
    decoder: Decoder,
    vocabulary: Vocabulary,
    task: Task,
    *,
    trials: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Run one task.

    Args:
        decoder: The model.
        vocabulary: From its tokenizer.
        task: What to do.
        trials: Independent repetitions.
        seed: Changes the words and numbers.
        progress: Called with (trials done, trials).
    """
    made = make_trials(vocabulary, task, trials, seed)
    right, nats = [], []
    size = max(1, BATCH_TOKENS // max(len(t.tokens) for t in made))
    with torch.inference_mode():
        for begin in range(0, trials, size):
            for hits, losses in _answers(decoder, made[begin : begin + size]):
                right.append(hits)
                nats.append(losses)
            if progress:
                progress(len(right), trials)
    whole = task.family == "passkey"
    per_trial = torch.stack([h.all().float() if whole else h.float().mean() for h in right])
    chance = {"copy": 1 / len(vocabulary.tokens), "passkey": 1e-5, "multi-query": 1 / task.size}
    return Score(task, per_trial, float(torch.cat(nats).mean()), chance[task.family])


def _answers(decoder: Decoder, trials: Sequence[Trial]) -> list[tuple[Tensor, Tensor]]:
    """For each trial: which answer tokens came out first (bool), and their nats."""
    longest = max(len(t.tokens) for t in trials)
    rows = [t.tokens + [0] * (longest - len(t.tokens)) for t in trials]
    # Padding stands behind everything that is asked for, so causality keeps it out.
    tokens = torch.tensor(rows, device=decoder.embedding.device)
    hidden, _ = decoder.hidden(tokens)
    results = []
    for row, trial in enumerate(trials):
        index = torch.tensor(trial.answers, device=tokens.device)
        logits = decoder.head(hidden[row : row + 1, index - 1])[0].float()
        target = tokens[row, index]
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        results.append(((logits.argmax(-1) == target).cpu(), loss.cpu()))
    return results
