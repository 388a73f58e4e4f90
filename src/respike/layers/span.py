"""A span: the stretch of tokens one forward pass works on, the same for every layer.

Positions, rotary tables and masks depend only on the span, so they are made here once and not
once per layer. Letters: B batch, T tokens of the span, K head dim.
"""

from functools import cached_property

import torch
from torch import Tensor

from respike.errors import UnsupportedError
from respike.ops.attention import attention_bias, visible
from respike.ops.rotary import rotary_tables, rotate


class Span:
    """``T`` new tokens for each of ``B`` sequences that may have seen different numbers before.

    Rows may be ragged: row b holds ``valid[b]`` tokens and padding after them. Padding never
    enters a state and no valid query sees it, because it lies in the future of its row.

    Args:
        start: Tokens each row has seen before, int64 (B,), on the processor.
        valid: Real tokens of each row in this span, int64 (B,), on the processor.
        num_tokens: T.
        frequencies: Rotary frequencies, float64 (K / 2,).
        dtype: Dtype of queries and keys, which masks must share.
        device: Where queries and keys live.
        learned_sinks: First positions of a sequence that are no tokens and see each other.
    """

    def __init__(
        self,
        start: Tensor,
        valid: Tensor,
        num_tokens: int,
        frequencies: Tensor,
        dtype: torch.dtype,
        device: torch.device,
        learned_sinks: int = 0,
    ) -> None:
        self.start, self.valid, self.num_tokens = start, valid, num_tokens
        self.starts: list[int] = start.tolist()
        self.valids: list[int] = valid.tolist()
        first = self.starts[0]
        even = all(s == first for s in self.starts) and all(v == num_tokens for v in self.valids)
        self.offset: int | None = first if even else None
        """Common start of all rows when none is padded, else None."""
        self.fresh = not any(self.starts)
        """No row has seen a token yet."""
        self.together = learned_sinks if min(self.starts) < learned_sinks else 0
        """As ``learned_sinks``, 0 if none of them is in the span: all that follows is causal."""
        self.end = max(s + v for s, v in zip(self.starts, self.valids, strict=True))
        self.dtype, self.device = dtype, device
        self.frequencies = frequencies
        self._memo: dict[object, Tensor | tuple[Tensor, Tensor]] = {}

    def common_start(self) -> int:
        """Position of every row's first token: what a mixer needs to give gradients.

        Raises:
            UnsupportedError: They differ.
        """
        if self.fresh:
            return 0
        if self.offset is None:
            raise UnsupportedError("gradients when rows of a batch continue at unlike lengths")
        return self.offset

    @cached_property
    def positions(self) -> Tensor:
        """Of every token, int64 (B, T), on the processor."""
        return self.start[:, None] + torch.arange(self.num_tokens)

    def last(self) -> "Span":
        """The last token of each row, as a span; of a row without any, the one before it."""
        start = (self.start + self.valid - 1).clamp(min=0)
        one = torch.ones_like(start)
        return Span(start, one, 1, self.frequencies, self.dtype, self.device)

    def last_of(self, x: Tensor) -> Tensor:
        """What (B, T, H, K) holds for `last`: (B, 1, H, K)."""
        return x[torch.arange(len(x)), (self.valid - 1).clamp(min=0)][:, None]

    @property
    def padding(self) -> Tensor | None:
        """Which tokens are padding, bool (B, T) on ``device``; None when there is none."""
        if all(valid == self.num_tokens for valid in self.valids):
            return None
        if "padding" not in self._memo:
            padding = torch.arange(self.num_tokens) >= self.valid[:, None]
            self._memo["padding"] = padding.to(self.device)
        memo = self._memo["padding"]
        assert isinstance(memo, Tensor)
        return memo

    def rotate(self, x: Tensor, reach_tokens: int | None = None) -> Tensor:
        """Rotate (B, T, H, K) by the span's positions, held at ``reach_tokens - 1`` if given."""
        positions = self.positions
        if reach_tokens is not None:
            positions = positions.clamp(max=reach_tokens - 1)
        return rotate(x, *self._tables(("rotary", reach_tokens), positions))

    def rotate_within(self, x: Tensor, block_tokens: int) -> Tensor:
        """Rotate (B, T, G, K) by each token's place in its block of ``block_tokens``."""
        places = self.positions % block_tokens
        return rotate(x, *self._tables(("within", block_tokens), places))

    def rotate_back(self, x: Tensor, delay_tokens: int) -> Tensor:
        """Undo the rotation of (B, T, G, K), which stood ``delay_tokens`` before the span's."""
        return rotate(x, *self._tables(("back", delay_tokens), delay_tokens - self.positions))

    def _tables(self, key: object, positions: Tensor) -> tuple[Tensor, Tensor]:
        if key not in self._memo:
            cos, sin = rotary_tables(positions, self.frequencies)
            self._memo[key] = (cos.to(self.device), sin.to(self.device))
        cos, sin = self._memo[key]
        return cos, sin

    def bias(
        self, key_positions: Tensor, window_tokens: int | None = None, sink_tokens: int = 0
    ) -> Tensor:
        """The mask over keys at ``key_positions`` (B, S), made once for layers that are alike.

        Layers with equal sinks and as many slots lay their keys out alike, so they share the mask.
        """
        key = ("bias", key_positions.shape[1], window_tokens, sink_tokens)
        if key not in self._memo:
            seen = visible(self.positions, key_positions, window_tokens, sink_tokens, self.together)
            self._memo[key] = attention_bias(seen.to(self.device), self.dtype)
        bias = self._memo[key]
        assert isinstance(bias, Tensor)
        return bias
