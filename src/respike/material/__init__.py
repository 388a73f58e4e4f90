"""What recall trials are made of: words, numbers, filler, facts, and how these are hidden."""

import copy
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from respike.errors import UnsupportedError
from respike.material.facts import FACTS, Facts
from respike.tokenizer import Tokenizer

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
SENTENCES = tuple(f" {sentence}." for sentence in FILLER.strip(". ").split(". "))


@dataclass(frozen=True)
class Material:
    """What trials are made of, besides tokens. Training has its own (`respike.data.recall`).

    Attributes:
        sentences: Filler, each sentence with a space before it.
        digits: Of every number that is to be found.
        word: Names, keys and values: tokens whose text it matches in full.
        facts: What can be said of whom.
    """

    sentences: tuple[str, ...] = SENTENCES
    digits: int = 5
    word: re.Pattern[str] = re.compile(" [a-z]{3,}")
    facts: Facts = FACTS

    @property
    def numbers(self) -> range:
        """Every number that may be drawn."""
        return range(10**self.digits)

    def number(self, value: int) -> str:
        """``value`` with leading zeros."""
        return f"{value:0{self.digits}d}"

    @property
    def filler(self) -> str:
        """The sentences as running text that begins and ends at a sentence."""
        return "".join(self.sentences).lstrip() + " "


@dataclass(frozen=True)
class Trial:
    """A text with questions at its end.

    Attributes:
        tokens: Text, questions and answers.
        answers: Indices of the tokens that count.
        questions: Where each question begins and its answer ends, if there are several: each is
            asked on its own, right after the text.
    """

    tokens: list[int]
    answers: list[int]
    questions: tuple[tuple[int, int], ...] = ()

    def asked(self) -> list["Trial"]:
        """The text with each of its questions alone; itself if it has only one."""
        if not self.questions:
            return [self]
        text = self.tokens[: self.questions[0][0]]
        return [
            Trial(
                text + self.tokens[begin:end],
                [len(text) + a - begin for a in self.answers if begin <= a < end],
            )
            for begin, end in self.questions
        ]


ANCHORS = ("\n", ".", "=")
"""What a text may stand behind, where a tokenizer treats the beginning of a text otherwise."""
MIN_WORDS, TOY_TOKENS = 16, 4096


class Vocabulary:
    """What tasks are made of: all tokens but the special ones, and those that are plain words.

    For evaluation a word is one token of a space and at least three lower-case ASCII letters. In a
    small vocabulary with hardly any (a toy), every token serves as one.

    Raises:
        UnsupportedError: A vocabulary of thousands of tokens with hardly any word.
    """

    def __init__(self, tokenizer: Tokenizer, material: Material = Material()) -> None:
        self.tokenizer = tokenizer
        self.material = material
        special = set(tokenizer.special_ids)
        self.tokens = [t for t in range(tokenizer.vocab_size) if t not in special]
        first = tokenizer.encode("a", bos=False)[:1]
        prefixed = bool(first) and (tokenizer.token(first[0]) or "").startswith("\u2581")
        self._anchors = ANCHORS if prefixed else ("",)
        words = self._words()
        if len(words) < MIN_WORDS and len(self.tokens) > TOY_TOKENS:
            raise UnsupportedError(
                f"recall: {len(words)} of {len(self.tokens):,} tokens are a word such as ' apple', "
                f"expected at least {MIN_WORDS}; its tasks are made of English words"
            )
        self.words = words if len(words) >= MIN_WORDS else self.tokens

    def _words(self) -> list[int]:
        """Tokens that are a word behind other text: alone, SentencePiece shows no space."""
        decode, anchor = self.tokenizer.decode, self.tokenizer.encode(".", bos=False)
        begin, word = len(decode(anchor)), self.material.word
        return [t for t in self.tokens if word.fullmatch(decode([*anchor, t])[begin:])]

    def with_material(self, sentences: tuple[str, ...], digits: int) -> "Vocabulary":
        """The same words with other filler and numbers."""
        other = copy.copy(self)
        other.material = replace(self.material, sentences=sentences, digits=digits)
        return other

    def ids(self, text: str) -> list[int]:
        """Token ids of plain text that stands inside other text: never a BOS.

        Nor the space that Llama 2's SentencePiece puts before what it takes for a whole text.
        """
        for anchor in self._anchors:
            before = self.tokenizer.encode(anchor, bos=False) if anchor else []
            ids = self.tokenizer.encode(anchor + text, bos=False)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        raise UnsupportedError(f"recall: {text[:40]!r} joins whatever stands before it")


def spread(count: int, rng: random.Random) -> list[float]:
    """One random depth in each of ``count`` equal parts of the text."""
    return [(part + rng.random()) / count for part in range(count)]


def words_and_text(vocabulary: Vocabulary, *parts: str | int) -> list[int]:
    """Token ids of text in which some words are given as tokens."""
    tokens: list[int] = []
    for part in parts:
        tokens += vocabulary.ids(part) if isinstance(part, str) else [part]
    return tokens


def hidden_in_filler(
    vocabulary: Vocabulary, filler_tokens: int, pieces: Sequence[tuple[float, list[int]]]
) -> list[int]:
    """The pieces at their depths in so much filler.

    A piece stands between two sentences, the nearest place to its depth. What does not fit of the
    filler is cut from its beginning, so that what follows the text follows a whole sentence.
    """
    sentences = [vocabulary.ids(sentence) for sentence in vocabulary.material.sentences]
    filler: list[list[int]] = []
    missing = filler_tokens
    while missing > 0:
        filler.insert(0, sentences[-1 - len(filler) % len(sentences)][-missing:])
        missing -= len(filler[0])
    waiting = sorted(pieces, key=lambda piece: piece[0])
    tokens: list[int] = []
    read = 0
    for sentence in filler:
        while waiting and waiting[0][0] * filler_tokens < read + len(sentence) / 2:
            tokens += waiting.pop(0)[1]
        tokens += sentence
        read += len(sentence)
    for _, piece in waiting:
        tokens += piece
    return tokens
