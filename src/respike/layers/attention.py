"""The attention layer: shared projections, and a softmax mixer for each set of KV groups.

Letters: B batch, T tokens, D model width, H query heads, G KV groups, K head dim.

How sinks keep their distance: inside the source's trained length a sink is seen at its true
distance, so a window as long as the context equals the source. Past ``sink_reach_tokens`` (by
default the trained length) the query stands still at position ``sink_reach_tokens - 1`` when it
looks at sinks, so no rotary distance ever leaves the range the weights were trained on. Only
queries are rotated twice for this: cached keys, and so the state, do not depend on it.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from respike.errors import UnsupportedError
from respike.layers.norm import RMSNorm
from respike.layers.span import Span
from respike.layers.state import KVState, MixerState, WindowState
from respike.ops.attention import attend


@runtime_checkable
class GroupMixer(Protocol):
    """Mixes tokens for some KV groups of a layer; has no weights of the source in it."""

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> MixerState:
        """The state before the first token; dtype and device of ``like``."""
        ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, span: Span, state: Any
    ) -> tuple[Tensor, MixerState]:
        """From unrotated q (B, T, H, K) and k, v (B, T, G, K): outputs (B, T, H, K), next state."""
        ...


class FullSoftmax:
    """Causal softmax over everything before; the cache grows with the sequence."""

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> KVState:
        """See `GroupMixer.init_state`."""
        return KVState.empty(batch, groups, head_dim, like)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, span: Span, state: KVState
    ) -> tuple[Tensor, KVState]:
        """See `GroupMixer.__call__`."""
        q, k, v = span.rotate(q), span.rotate(k).transpose(1, 2), v.transpose(1, 2)
        state.append(k, v, span)
        if span.fresh:
            return attend(q, k, v, causal=True), state
        keys, values = state.k[:, :, : span.end], state.v[:, :, : span.end]
        if q.requires_grad or k.requires_grad or v.requires_grad:
            # Caches carry no gradient: take this span's keys and values as they came.
            if span.offset is None:
                raise UnsupportedError("gradients when rows of a batch continue at unlike lengths")
            keys = torch.cat((keys[:, :, : span.offset], k), 2)
            values = torch.cat((values[:, :, : span.offset], v), 2)
        if span.offset is not None and span.num_tokens == 1:
            return attend(q, keys, values), state
        bias = span.bias(torch.arange(span.end).expand(len(q), -1))
        return attend(q, keys, values, bias), state


class WindowSoftmax:
    """Causal softmax over the sinks and a sliding window; constant memory.

    Args:
        window_tokens: Length of the window, self included.
        sink_tokens: First tokens that stay visible.
        sink_reach_tokens: Largest distance at which sinks are seen, see the module's text.
    """

    parts = frozenset({"window"})
    """What `respike.models.ablation` can switch off; without its window a query sees itself."""
    off: frozenset[str] = frozenset()

    def __init__(self, window_tokens: int, sink_tokens: int, sink_reach_tokens: int) -> None:
        self.window_tokens, self.sink_tokens = window_tokens, sink_tokens
        self.sink_reach_tokens = sink_reach_tokens

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> WindowState:
        """See `GroupMixer.init_state`."""
        slots = self.sink_tokens + self.window_tokens
        k = like.new_zeros(batch, groups, slots, head_dim)
        return WindowState(k, k.clone(), self.sink_tokens)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, span: Span, state: WindowState
    ) -> tuple[Tensor, WindowState]:
        """See `GroupMixer.__call__`."""
        q_sink = span.rotate(q, self.sink_reach_tokens) if self._beyond_reach(span) else None
        q, k, v = span.rotate(q), span.rotate(k).transpose(1, 2), v.transpose(1, 2)
        seen_tokens = 1 if "window" in self.off else self.window_tokens
        if span.fresh and span.num_tokens <= seen_tokens and q_sink is None:
            state.append(k, v, span)
            return attend(q, k, v, causal=True), state
        # Not with gradients, which would be lost in the ring. Asked of torch and not of k, because
        # layers that share a mask must take the same way.
        if span.offset is not None and span.num_tokens == 1 and not torch.is_grad_enabled():
            state.append(k, v, span)
            keys, values = state.k, state.v
            positions = state.slot_positions(span.start + span.valid)
            all_seen = span.end >= state.k.shape[2] and seen_tokens == self.window_tokens
        else:
            keys, values = torch.cat((state.k, k), 2), torch.cat((state.v, v), 2)
            positions = torch.cat((state.slot_positions(span.start), span.positions), 1)
            state.append(k, v, span)
            all_seen = False
        bias = None if all_seen else span.bias(positions, seen_tokens, self.sink_tokens)
        if q_sink is None:
            return attend(q, keys, values, bias), state
        is_sink = (positions < self.sink_tokens).to(k.device)
        return _attend_two_ways(q, q_sink, keys, values, is_sink, bias), state

    def _beyond_reach(self, span: Span) -> bool:
        return self.sink_tokens > 0 and span.end > self.sink_reach_tokens


def _attend_two_ways(
    q: Tensor, q_sink: Tensor, k: Tensor, v: Tensor, is_sink: Tensor, bias: Tensor | None
) -> Tensor:
    """One softmax in which sinks, ``is_sink`` (B, S), are scored by ``q_sink``, the rest by ``q``.

    Both queries are stacked along the head dim; a key has zeros where the other query's channels
    are. Twice the arithmetic, and only past the reach.
    """
    head_dim = q.shape[-1]
    sink = is_sink[:, None, :, None]
    keys = torch.cat((k.masked_fill(sink, 0), k.masked_fill(~sink, 0)), -1)
    queries = torch.cat((q, q_sink), -1)
    out = attend(queries, keys, pad(v, (0, head_dim)), bias, scale=head_dim**-0.5)
    return out[..., :head_dim]


class Attention(nn.Module):
    """Grouped-query attention in which each set of KV groups has a mixer of its own.

    Keeps the source's tensor names: ``q_proj, k_proj, v_proj, o_proj, q_norm, k_norm``.

    Args:
        hidden_size: D.
        num_heads: H, a multiple of the number of groups.
        head_dim: K.
        mixers: (KV groups, mixer) pairs; the groups partition 0..G-1.
        qkv_bias: Biases on the three input projections.
        o_bias: Bias on the output projection.
        qk_norm_eps: Epsilon of the per-head norms of q and k (Qwen3); None has no norms.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        mixers: Sequence[tuple[Sequence[int], GroupMixer]],
        qkv_bias: bool,
        o_bias: bool,
        qk_norm_eps: float | None,
    ) -> None:
        super().__init__()
        self.num_groups = sum(len(groups) for groups, _ in mixers)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.set_mixers(mixers)
        kv_size = self.num_groups * head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_size, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=o_bias)
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps)
        self.has_qk_norm = qk_norm_eps is not None

    def set_mixers(self, mixers: Sequence[tuple[Sequence[int], GroupMixer]]) -> None:
        """Exchange the mixers, for instance to measure what a KV group is worth."""
        self.mixers = [(list(groups), mixer) for groups, mixer in mixers]

    def init_state(self, batch: int, like: Tensor) -> tuple[MixerState, ...]:
        """One state for each mixer, in order."""
        return tuple(m.init_state(batch, len(g), self.head_dim, like) for g, m in self.mixers)

    def forward(
        self, x: Tensor, span: Span, state: tuple[MixerState, ...]
    ) -> tuple[Tensor, tuple[MixerState, ...]]:
        """(B, T, D) and the states before the span -> (B, T, D) and the states after it."""
        B, T, _ = x.shape
        G, K = self.num_groups, self.head_dim
        q = self.q_proj(x).view(B, T, self.num_heads, K)
        k = self.k_proj(x).view(B, T, G, K)
        v = self.v_proj(x).view(B, T, G, K)
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if len(self.mixers) == 1:
            out, new = self.mixers[0][1](q, k, v, span, state[0])
            return self.o_proj(out.reshape(B, T, -1)), (new,)
        q = q.view(B, T, G, -1, K)
        outputs, after, order = [], [], []
        for (groups, mixer), before in zip(self.mixers, state, strict=True):
            out, new = mixer(
                q[:, :, groups].flatten(2, 3), k[:, :, groups], v[:, :, groups], span, before
            )
            outputs.append(out.reshape(B, T, len(groups), -1))
            after.append(new)
            order += groups
        back = [order.index(g) for g in range(G)]
        return self.o_proj(torch.cat(outputs, 2)[:, :, back].reshape(B, T, -1)), tuple(after)
