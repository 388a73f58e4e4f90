"""Block-sparse softmax mixer, and its cache.

Letters: B batch, T tokens, S slots, H query heads, G KV groups, K head dim.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from respike.layers.mixer import Mixer
from respike.layers.span import Span
from respike.layers.storage import Rows
from respike.ops.backends import needs_gradient
from respike.ops.block_rule import BlockRule
from respike.ops.blocks import block_softmax, block_weights, summarise
from respike.ops.softmax import Keys, dequantise_rows, quantise_rows


class BlockSoftmax(Mixer):
    """Softmax over sinks, a window, and the best blocks of what is older: see `respike.ops.blocks`.

    The cache grows with the sequence, the keys that a token looks at do not (but for one summary
    for each ``rule.summary_tokens`` tokens).

    Args:
        rule: What is seen.
        int8: Cached keys and values are rounded to 8 bits, with a scale for each.
        by_head: Each query head chooses its own blocks.
        dense_decode: A token that comes alone sees all blocks, as in MoBA's release. What a token
            sees then depends on how the sequence is cut into calls.
    """

    def __init__(
        self,
        rule: BlockRule,
        *,
        int8: bool = False,
        by_head: bool = False,
        dense_decode: bool = False,
    ) -> None:
        super().__init__()
        self.rule, self.int8 = rule, int8
        self.by_head, self.dense_decode = by_head, dense_decode

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> "BlockState":
        """See `Mixer.init_state`."""
        k = like.new_zeros(batch, groups, 0, head_dim)
        if self.int8:
            byte, scale = k.to(torch.int8), k.new_zeros(batch, groups, 0, 1, dtype=torch.float32)
            parts = {"k": byte, "k_scale": scale, "v": byte, "v_scale": scale}
        else:
            parts = {"k": k, "v": k}
        return BlockState(parts, k, self.rule)

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: "BlockState"
    ) -> tuple[Tensor, "BlockState"]:
        """See `Mixer.forward`."""
        del x
        k = span.rotate_within(k, self.rule.block_tokens).transpose(1, 2)
        v = v.transpose(1, 2)
        state.append(k, v, span)
        self.observe(q, span, state)
        keys, summaries = state.read(span.end)
        if needs_gradient(q, k, v):
            keys = _with_gradient(keys, k, v, span)
        rule = self.rule
        if self.dense_decode and span.num_tokens == 1:
            blocks = keys.k.shape[2] // rule.block_tokens
            rule = replace(rule, top_blocks=1 << blocks.bit_length())  # all, and seldom another
        out = block_softmax(
            q, keys, summaries, span.start, span.frequencies, rule, by_head=self.by_head
        )
        return out, state

    def observe(self, q: Tensor, span: Span, state: "BlockState") -> None:
        """See `Mixer.observe`."""
        if self.observer is not None:
            last, held = span.last(), state.read(span.end)
            asked = span.last_of(q)
            weights = block_weights(asked, *held, last.start, span.frequencies, self.rule)
            self.observer(weights[:, :, : span.end])


def _with_gradient(keys: Keys, k: Tensor, v: Tensor, span: Span) -> Keys:
    """Caches carry no gradient: this span's keys and values as they came, after the cached ones."""
    old, rest = span.common_start(), keys.k.shape[2] - span.end
    k, v = (x[:, :, : span.end - old] for x in (k, v))
    return Keys(
        *(
            pad(torch.cat((held[:, :, :old].to(new.dtype), new), 2), (0, 0, 0, rest))
            for held, new in zip(keys.exact(), (k, v), strict=True)
        )
    )


class BlockState:
    """Keys rotated within their blocks, values, and summaries; slot = position.

    Args:
        parts: ``k`` and ``v``, (B, G, S, K), in the model's dtype; or in int8, with ``k_scale`` and
            ``v_scale``, (B, G, S, 1).
        summaries: In the model's dtype, (B, G, S / summary, K).
        rule: Of the mixer.
    """

    def __init__(self, parts: dict[str, Tensor], summaries: Tensor, rule: BlockRule) -> None:
        self.rule = rule
        self.parts = {name: Rows(tensor) for name, tensor in parts.items()}
        self.summaries = Rows(summaries)

    def append(self, k: Tensor, v: Tensor, span: Span) -> None:
        """Store the span's keys and values, (B, G, T, K); padding is left out."""
        new = {"k": k.detach(), "v": v.detach()}
        if "k_scale" in self.parts:
            for name in ("k", "v"):
                new[name], scale = quantise_rows(new[name])
                new[f"{name}_scale"] = scale[..., None]
        for name, tensor in new.items():
            self.parts[name].put(tensor, span, self.rule.block_tokens)
        self._summarise(int(span.start.min()), span.end)

    def reserve(self, num_tokens: int) -> None:
        """Make room for sequences of up to ``num_tokens`` tokens."""
        size = self.rule.block_tokens
        slots = -(-num_tokens // size) * size
        for rows in self.parts.values():
            rows.reserve(slots, size)
        self.summaries.reserve(slots // self.rule.summary_tokens)

    def _summarise(self, start: int, end: int) -> None:
        """Renew the summaries that were completed between ``start`` and ``end``."""
        size = self.rule.summary_tokens
        first, last = start // size, end // size
        self.summaries.reserve(-(-end // self.rule.block_tokens) * self.rule.block_tokens // size)
        if first < last:
            some = slice(first * size, last * size)
            keys = self.parts["k"].data[:, :, some]
            if "k_scale" in self.parts:
                scale = self.parts["k_scale"].data[:, :, some, 0]
                keys = dequantise_rows(keys, scale).to(self.summaries.data.dtype)
            self.summaries.data[:, :, first:last] = summarise(keys, size)

    def read(self, num_tokens: int) -> tuple[Keys, Tensor]:
        """Keys, values and summaries of the blocks of the first tokens."""
        blocks = -(-num_tokens // self.rule.block_tokens)
        size = blocks * self.rule.block_tokens
        parts = {name: rows.data[:, :, :size] for name, rows in self.parts.items()}
        scales = (parts[name][..., 0] for name in ("k_scale", "v_scale") if name in parts)
        count = size // self.rule.summary_tokens
        return Keys(parts["k"], parts["v"], *scales), self.summaries.data[:, :, :count]

    def nbytes(self, num_tokens: int) -> int:
        """See `MixerState.nbytes`; summaries are counted when their tokens are there."""
        _, groups, _, width = self.summaries.data.shape
        summaries = num_tokens // self.rule.summary_tokens
        held = sum(rows.row_bytes for rows in self.parts.values()) * num_tokens
        return groups * (held + summaries * width * self.summaries.data.element_size())

    def clone(self) -> "BlockState":
        """See `MixerState.clone`; copies are in memory, see `Rows.copy`."""
        parts = {name: rows.copy() for name, rows in self.parts.items()}
        return BlockState(parts, self.summaries.copy(), self.rule)

    def rows(self, index: slice, num_tokens: int | None = None) -> "BlockState":
        """See `MixerState.rows`; room is in whole blocks."""
        size, slots, summaries = self.rule.block_tokens, None, None
        if num_tokens is not None:
            slots = -(-num_tokens // size) * size
            summaries = slots // self.rule.summary_tokens
        parts = {name: rows.data[index, :, :slots] for name, rows in self.parts.items()}
        return BlockState(parts, self.summaries.data[index, :, :summaries], self.rule)

    @classmethod
    def join(cls, states: Sequence["BlockState"]) -> "BlockState":
        """See `MixerState.join`."""
        first = states[0]
        parts = {name: Rows.join([s.parts[name] for s in states]) for name in first.parts}
        return cls(parts, Rows.join([s.summaries for s in states]), first.rule)

    def tensors(self, num_tokens: int) -> dict[str, Tensor]:
        """See `MixerState.tensors`; summaries follow from the keys."""
        return {name: rows.data[:, :, :num_tokens] for name, rows in self.parts.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `MixerState.restore`."""
        size = self.rule.block_tokens
        count = tensors["k"].shape[2]
        for name, tensor in tensors.items():
            self.parts[name] = Rows(tensor[:, :, :0])
            self.parts[name].reserve(-(-count // size) * size)
            self.parts[name].data[:, :, :count] = tensor
        batch, groups, _, width = tensors["k"].shape
        self.summaries = Rows(self.summaries.data.new_zeros(batch, groups, 0, width))
        self._summarise(0, count)
