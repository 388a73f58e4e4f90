"""Gradients of `respike.ops.blocks.block_softmax` by its kernel, of the blocks that were chosen.

The forward pass writes down each query's denominator and choice, so that neither is found again:
weights come back from one product, and a query meets the blocks it saw and no others.

Letters: as in `respike.ops.blocks`.
Source: as `respike.ops.softmax_gradient`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from respike.ops import backends
from respike.ops.recurrence import SUFFIX
from respike.ops.softmax import Keys, cache_of, row_major


class Known(NamedTuple):
    """What the forward kernel writes down for `native_gradients`."""

    mass: Tensor
    """Logarithm of the denominator, float32 (B, T, H)."""
    chosen: Tensor
    """Bit b % 64 of word b // 64 of (B, G, T, words), int64: the token chose block b."""

    @classmethod
    def empty(cls, q: Tensor, keys: Keys, block_tokens: int) -> "Known":
        """Room for what is to be known of queries (B, T, H, K)."""
        (B, T, H, _), (_, G, S, _) = q.shape, keys.k.shape
        words = -(-S // block_tokens // 64)
        return cls(torch.zeros(B, T, H), torch.zeros(B, G, T, words, dtype=torch.int64))

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Addresses, and words of a token: as the kernel takes them."""
        return self.mass.data_ptr(), self.chosen.data_ptr(), self.chosen.shape[-1]


class Seen(NamedTuple):
    """What was seen: as `respike.ops.blocks.block_softmax` takes it."""

    q: Tensor
    keys: Keys
    start: Tensor
    rule: tuple[int, ...]
    """`respike.ops.block_rule.BlockRule.numbers`."""
    turns: Any
    """Of `respike.ops.block_rule.block_turns`."""


def native_gradients(
    kernels: backends.Kernels, seen: Seen, out: Tensor, known: Known, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values.

    Args:
        kernels: The native kernels.
        seen: What the op was given.
        out: What it made of that.
        known: What it wrote down.
        d_out: The gradient of ``out``.
    """
    q, keys = seen.q.contiguous(), Keys(row_major(seen.keys.k), row_major(seen.keys.v))
    (_, T, H, K), (_, G, S, V) = q.shape, keys.v.shape
    out, d_out = out.contiguous(), d_out.contiguous()
    count = (S - seen.start).clamp(0, T)
    d_q = torch.empty_like(q) if int(count.min()) == T else torch.zeros_like(q)
    d_k, d_v = keys.k.new_empty(keys.k.shape), keys.v.new_empty(keys.v.shape)
    getattr(kernels.module, f"blocks_gradient_{SUFFIX[q.dtype]}")(
        kernels.level,
        torch.get_num_threads(),
        seen.turns,
        seen.rule,
        [x.data_ptr() for x in (q, out, known.mass, known.chosen, d_out)],
        cache_of(keys),
        [x.data_ptr() for x in (d_q, d_k, d_v)],
        (G, T, H // G, K, V),
        seen.start.tolist(),
        count.tolist(),
        known.chosen.shape[-1],
        K**-0.5,
    )
    return d_q, d_k, d_v
