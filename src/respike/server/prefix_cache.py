"""States of prompts that were read before, found by a hash of their tokens.

Only the hash of a prefix and the state after it are kept, never its text. States are evicted when
they have not been used for longest and the limit is reached.
"""

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

from respike.models.state import DecoderState


@dataclass(frozen=True)
class Key:
    """What a state has seen: ``tokens`` tokens after the state called ``base``."""

    base: str
    tokens: int
    digest: bytes


@dataclass
class PrefixCache:
    """States by what they have seen. Not for several threads.

    Attributes:
        limit_bytes: Of all states together.
        held_bytes: Now.
        hits: Prompts that began with something known.
        misses: Those that did not.
    """

    limit_bytes: int
    held_bytes: int = 0
    hits: int = 0
    misses: int = 0
    _states: "OrderedDict[Key, DecoderState]" = field(default_factory=OrderedDict)

    def find(self, base: str, prompt: list[int]) -> tuple[int, DecoderState] | None:
        """The longest known beginning of ``prompt``: how many tokens, and a copy of the state.

        At least one token is left over, as logits are those of a token.
        """
        lengths = sorted(
            {k.tokens for k in self._states if k.base == base and k.tokens < len(prompt)}
        )
        digest, done, best = hashlib.sha256(), 0, None
        for length in lengths:
            digest.update(array("i", prompt[done:length]).tobytes())
            done = length
            key = Key(base, length, digest.digest())
            if key in self._states:
                best = key
        if best is None:
            self.misses += 1
            return None
        self.hits += 1
        self._states.move_to_end(best)
        return best.tokens, self._states[best].clone()

    def put(self, base: str, prompt: list[int], state: DecoderState) -> None:
        """Keep a copy of the state after ``prompt``, if it fits at all."""
        size = state.nbytes()
        digest = hashlib.sha256(array("i", prompt).tobytes()).digest()
        key = Key(base, len(prompt), digest)
        if key in self._states:
            self._states.move_to_end(key)
            return
        if size > self.limit_bytes // 2:
            return
        while self._states and self.held_bytes + size > self.limit_bytes:
            _, old = self._states.popitem(last=False)
            self.held_bytes -= old.nbytes()
        self._states[key] = state.compact()  # so that what is counted is what is held
        self.held_bytes += size

    def forget(self, base: str) -> None:
        """Drop everything that follows the state called ``base``."""
        for key in [key for key in self._states if key.base == base]:
            self.held_bytes -= self._states.pop(key).nbytes()

    def __len__(self) -> int:
        """States held."""
        return len(self._states)
