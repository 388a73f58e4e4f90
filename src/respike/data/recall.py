"""Recall samples to train on: the evaluation's makers (`respike.tasks`) with other material.

Nothing that the evaluation asks for is trained: numbers have other lengths, names and values are
capitalised words, the filler is other sentences, and random tokens come from other seeds.
"""

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from respike.data.sources import Sample, TextSource
from respike.errors import UsageError
from respike.material import SENTENCES, Material, Vocabulary
from respike.material.facts import people, relation
from respike.tasks import FAMILIES, MAX_HOPS, Task
from respike.tokenizer import Tokenizer

DIGITS = (4, 6, 7)
"""Lengths of numbers; the evaluation's have five."""
TRAINING_FILLER = (
    "The river runs past the mill. A dog sleeps by the door. Rain is falling on the roof. "
    "The baker opens early. Two boats wait in the harbour. Snow covers the far hills. "
    "She folds the letter twice. The clock in the hall is slow. Children play in the yard. "
    "The train leaves at noon. He puts the kettle on. Leaves turn brown in autumn. "
    "The road bends to the left. A lamp burns in the window. The market is busy today. "
    "Bread and salt are on the table. The old bridge is closed. Wind moves the tall reeds. "
    "Nobody answered the bell. The garden needs water. Stars come out after dusk. "
)
TRAINING_SENTENCES = tuple(f" {s}." for s in TRAINING_FILLER.strip(". ").split(". "))
TRAINING_FACTS = people(
    "Kevin Linda Oscar Diana Victor Nancy Albert Rachel Samuel Judith Walter Olivia Henry Grace "
    "Philip Sophie",
    (
        relation(
            "{who} was born in {what}.", "In which month was {who} born?", "{who} was born in",
            "January March April June July August October December",
        ),
        relation(
            "{who} sold the old {what}.", "What did {who} sell?", "{who} sold the old",
            "car house camera piano bicycle guitar carpet mirror",
        ),
        relation(
            "{who} is learning {what}.", "Which language does {who} learn?", "{who} is learning",
            "French German Spanish Chinese Latin Arabic Greek Russian",
        ),
        relation(
            "{who} always travels by {what}.", "How does {who} travel?",
            "{who} always travels by", "subway bus plane ship taxi tram truck ferry",
        ),
        relation(
            "The garden of {who} is full of {what}.", "What grows in the garden of {who}?",
            "The garden of {who} is full of",
            "roses tulips apples lemons onions carrots herbs beans",
        ),
        relation(
            "{who} studied {what}.", "What did {who} study?", "{who} studied",
            "history physics law music medicine biology art geography",
        ),
    ),
)  # fmt: skip
MATERIAL = Material(TRAINING_SENTENCES, DIGITS[0], re.compile(" [A-Z][a-z]{2,}"), TRAINING_FACTS)
MIN_SENTENCES, MAX_SENTENCES = 24, 400
SENTENCE = re.compile(r"(?:^|(?<=[.!?])|\n)[^\S\n]*([A-Z][^.!?\n]{20,300})\.(?=\s|$)")
FILLER_DOCUMENTS = 16
"""Documents that are searched for enough sentences."""
FILLER_TOKENS = 8192
"""Tokens of a document that filler is taken from."""


@dataclass(frozen=True)
class Curriculum:
    """How far samples reach: their greatest length doubles until it is the last one.

    Attributes:
        least_tokens: Of every sample.
        first_tokens: Greatest length at the beginning.
        last_tokens: Greatest length in the end.
        doubling_samples: Samples after which the greatest length has doubled.
    """

    least_tokens: int = 64
    first_tokens: int = 512
    last_tokens: int = 2048
    doubling_samples: int = 500

    def __post_init__(self) -> None:
        """Refuse ranges that cannot mean anything."""
        sizes = (16, self.least_tokens, self.first_tokens, self.last_tokens)
        if list(sizes) != sorted(sizes) or self.doubling_samples < 1:
            raise UsageError(
                f"recall curriculum: {self.least_tokens}, {self.first_tokens} and "
                f"{self.last_tokens} tokens, doubling after {self.doubling_samples}: expected at "
                "least 16, growing, and at least 1"
            )

    def reach(self, number: int) -> int:
        """Greatest length of the sample of this number."""
        doublings = min(number / self.doubling_samples, 32)
        return min(self.last_tokens, round(self.first_tokens * 2**doublings))


class RecallSource:
    """Recall samples without an end; see `respike.data.sources.Source`.

    A sample may be longer than the curriculum says where its family needs that: examples of
    variables take some 200 tokens.

    Args:
        name: For the ledger.
        tokenizer: Of the model.
        seed: Other seeds, other samples.
        curriculum: How long they are.
        families: Keys of `FAMILIES`, each as likely as the others; repeat one for more of it.
        filler: Text that numbers are hidden in; None takes `TRAINING_SENTENCES`. With it, every
            second sample is in real text.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        curriculum: Curriculum = Curriculum(),
        families: Sequence[str] = tuple(FAMILIES),
        filler: TextSource | None = None,
    ) -> None:
        unknown = [family for family in families if family not in FAMILIES]
        if unknown or not families:
            raise UsageError(f"recall families {list(families)}, expected {', '.join(FAMILIES)}")
        self.name, self.seed, self.curriculum = name, seed, curriculum
        self.families, self.filler = tuple(families), filler
        self.epoch_samples: int | None = None
        self.vocabulary = Vocabulary(tokenizer, MATERIAL)
        self.fingerprint = (
            f"{tokenizer.sha256} {seed} {curriculum} {self.families} "
            f"{filler.fingerprint if filler else ''}"
        )

    def draw(self, number: int) -> Sample:
        """One trial, with its answers marked."""
        rng = random.Random(f"train {self.seed}/{number}")
        curriculum, family = self.curriculum, rng.choice(self.families)
        least, reach = curriculum.least_tokens, curriculum.reach(number)
        length = round(least * (reach / least) ** rng.random())
        vocabulary = self.vocabulary.with_material(self._sentences(rng), rng.choice(DIGITS))
        for _ in range(8):
            task = self._task(family, length, rng)
            try:
                trial = FAMILIES[family].make(vocabulary, task, rng)
            except UsageError:  # too short for what must stand in it
                length *= 2
                continue
            answers = np.zeros(len(trial.tokens), np.bool_)
            answers[trial.answers] = True
            return Sample(np.array(trial.tokens, np.int64), answers=answers, whole=True)
        raise UsageError(f"recall: no {family} sample can be made with this vocabulary")

    def _task(self, family: str, length: int, rng: random.Random) -> Task:
        if family == "copy":
            return Task(family, max(2, length // 2))
        if family == "multi-query":
            return Task(family, self._pairs(length))
        return Task(family, length, rng.random(), hops=rng.randint(1, MAX_HOPS // 2))

    def _pairs(self, length: int) -> int:
        """The most pairs whose questions and answers fit."""
        kind, most = FAMILIES["multi-query"], len(self.vocabulary.words) // 2

        def tokens(pairs: int) -> int:
            return kind.tokens(self.vocabulary, Task("multi-query", pairs))

        return 1 + bisect_right(range(2, most + 1), length, key=tokens)

    def _sentences(self, rng: random.Random) -> tuple[str, ...]:
        """Filler: sentences of a document, or the built-in ones from a random place on."""
        begin = rng.randrange(len(TRAINING_SENTENCES))
        turned = TRAINING_SENTENCES[begin:] + TRAINING_SENTENCES[:begin]
        if self.filler is None or rng.random() < 0.5:
            return turned
        found: dict[str, None] = {}
        for _ in range(FILLER_DOCUMENTS):
            found |= dict.fromkeys(self._read(self.filler, rng))
            if len(found) >= MIN_SENTENCES:
                break
        kept = tuple(s for s in found if s not in SENTENCES)
        return kept[:MAX_SENTENCES] if len(kept) >= MIN_SENTENCES else turned

    def _read(self, filler: TextSource, rng: random.Random) -> list[str]:
        """Sentences of one document, from a random place on if it is long."""
        tokens = filler.draw(rng.randrange(filler.epoch_samples or 1)).tokens
        place = rng.randrange(max(1, len(tokens) - FILLER_TOKENS))
        text = self.vocabulary.tokenizer.decode(tokens[place : place + FILLER_TOKENS].tolist())
        found = SENTENCE.findall(text)
        return [f" {' '.join(sentence.split())}." for sentence in found]
