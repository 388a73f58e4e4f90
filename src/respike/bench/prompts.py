"""Prompts of any length, each one new: a peer that remembers what it has read gains nothing."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

from respike.config import ModelConfig
from respike.text import builtin_text
from respike.tokenizer import Tokenizer

SHORTEST_PIECE = 4096
"""Tokens of text that stand together, where there is as much."""


class Prompts:
    """Real text, cut and put together anew for every prompt; random tokens without a tokenizer.

    Args:
        tokenizer: Of the model; None of a shape without one.
        config: Its config.
    """

    def __init__(self, tokenizer: Tokenizer | None, config: ModelConfig) -> None:
        self.vocab_size = config.vocab_size
        self.ids = tokenizer.encode(builtin_text(), bos=False) if tokenizer else []

    def make(self, length: int, seed: int) -> array[int]:
        """``length`` token ids; another seed gives another prompt from the first token on."""
        rng = random.Random(f"{length}/{seed}")
        found = array("i")
        if not self.ids:
            return array("i", rng.choices(range(self.vocab_size), k=length))
        while len(found) < length:
            start = rng.randrange(len(self.ids))
            room = min(length - len(found), max(SHORTEST_PIECE, length // 16))
            found.extend(self.ids[start : start + room])
        return found

    def write(self, path: Path, length: int, seed: int) -> Path:
        """The same in a file, for a process to read."""
        path.write_bytes(self.make(length, seed).tobytes())
        return path
