"""Which blocks a query of `respike.ops.blocks` sees, as its forms in torch and in C++ take it."""

import atexit
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from respike.ops import backends


@dataclass(frozen=True)
class BlockRule:
    """Which tokens a query sees, and at which distance.

    Attributes:
        window_tokens: Length of the window, self included; it is stretched to whole blocks.
        sink_tokens: First tokens that are always seen; likewise.
        block_tokens: Length of a block.
        summary_tokens: Keys averaged in a summary; divides ``block_tokens``.
        top_blocks: Blocks outside the window that a token sees beside the sinks'.
        sink_reach_tokens: Largest distance at which sinks are seen, plus one.
        reach_tokens: The same of chosen blocks; None: all at their true distance.
        true_tokens: Queries at positions below see chosen blocks at their true distance all the
            same.
    """

    window_tokens: int
    sink_tokens: int
    block_tokens: int
    summary_tokens: int
    top_blocks: int
    sink_reach_tokens: int
    reach_tokens: int | None
    true_tokens: int = 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """The attributes in order, -1 for None: as the kernels take them."""
        return tuple(-1 if n is None else n for n in astuple(self))

    @property
    def sink_blocks(self) -> int:
        """Blocks that hold a sink."""
        return -(-self.sink_tokens // self.block_tokens)

    def first_near(self, positions: Tensor) -> Tensor:
        """First block that the window of a query at each of ``positions`` reaches into."""
        return (positions - self.window_tokens + 1).clamp(min=0) // self.block_tokens

    def distances(self, position: int, blocks: Tensor) -> Tensor:
        """At which a query at ``position`` sees each of ``blocks``; below 0 behind it."""
        true = position - blocks * self.block_tokens
        near = int(self.first_near(torch.tensor(position)))
        held = true.clamp(max=self.sink_reach_tokens - 1)
        rest = true
        if self.reach_tokens is not None and position >= self.true_tokens:
            rest = true.clamp(max=self.reach_tokens - 1)
        return torch.where(blocks >= near, true, torch.where(blocks < self.sink_blocks, held, rest))


@lru_cache(maxsize=16)
def block_turns(rule: tuple[int, ...], frequencies: tuple[float, ...]) -> Any:
    """The rotary angles that the kernels need of a rule's `BlockRule.numbers`; made once."""
    kernels = backends.kernels()
    assert kernels is not None
    return kernels.module.BlockTurns(rule, frequencies)


atexit.register(block_turns.cache_clear)  # or the binding reports, at exit, that it leaked
