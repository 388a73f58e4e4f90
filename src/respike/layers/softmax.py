"""Softmax mixers: over everything before, or over the sinks and a sliding window.

Letters: B batch, T tokens, S keys, H query heads, G KV groups, K head dim, V value dim.

How sinks keep their distance: inside the source's trained length a sink is seen at its true
distance, so a window as long as the context equals the source. Past ``sink_reach_tokens`` (by
default the trained length) the query stands still at position ``sink_reach_tokens - 1`` when it
looks at sinks, so no rotary distance ever leaves the range the weights were trained on. Only
queries are rotated twice for this: cached keys, and so the state, do not depend on it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from respike.layers.mixer import Mixer
from respike.layers.span import Span
from respike.layers.state import KVState, WindowState
from respike.ops.attention import attend, attend_with_mass, last_weights
from respike.ops.backends import needs_gradient
from respike.ops.softmax import Keys, window_softmax


class FullSoftmax(Mixer):
    """Causal softmax over everything before; the cache grows with the sequence."""

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> KVState:
        """See `Mixer.init_state`."""
        return KVState.empty(batch, groups, head_dim, like)

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: KVState
    ) -> tuple[Tensor, KVState]:
        """See `Mixer.forward`."""
        del x
        asked = q
        q, k, v = span.rotate(q), span.rotate(k).transpose(1, 2), v.transpose(1, 2)
        state.append(k, v, span)
        self.observe(asked, span, state)
        if needs_gradient(q, k, v):
            return self._with_gradient(q, k, v, span, state), state
        if span.fresh and span.together:
            return attend(q, k, v, span.bias(span.positions)), state
        if span.fresh:
            return attend(q, k, v, causal=True), state
        keys, values = state.k[:, :, : span.end], state.v[:, :, : span.end]
        if span.offset is not None and span.num_tokens == 1:
            return attend(q, keys, values), state
        bias = span.bias(torch.arange(span.end).expand(len(q), -1))
        return attend(q, keys, values, bias), state

    def _with_gradient(self, q: Tensor, k: Tensor, v: Tensor, span: Span, state: KVState) -> Tensor:
        """Caches carry no gradient: this span's keys and values as they came, after the cached."""
        offset = span.common_start()
        if span.together:
            near = NearWithGradient(q, None, Keys(k, v), None, 0, 0, None, span.together)
            return near.attend()
        if offset:
            k = torch.cat((state.k[:, :, :offset], k), 2)
            v = torch.cat((state.v[:, :, :offset], v), 2)
        return window_softmax(q, Keys(k, v), start=offset)[0]

    def observe(self, q: Tensor, span: Span, state: KVState) -> None:
        """See `Mixer.observe`."""
        if self.observer is not None:
            last = span.last()
            bias = last.bias(torch.arange(span.end).expand(len(q), -1))
            asked = last.rotate(span.last_of(q))
            self.observer(last_weights(asked, state.k[:, :, : span.end], bias))


@dataclass(frozen=True)
class NearWithGradient:
    """`Near` as `window_softmax` takes it: no mask, and gradients in bounded memory.

    Attributes:
        q: Queries (B, T, H, K), rotated.
        q_sink: Queries as sinks see them, if not as ``q``.
        keys: Without sinks.
        sinks: None if there are none.
        first: Position of the first key.
        start: Position of the first query.
        window_tokens: None if the keys are no more than the window.
        together: So many of the first queries, learned sinks, see each other and nothing else.
    """

    q: Tensor
    q_sink: Tensor | None
    keys: Keys
    sinks: Keys | None
    first: int
    start: int
    window_tokens: int | None
    together: int = 0

    def attend(self) -> Tensor:
        """See `Near`."""
        return self.attend_with_mass()[0]

    def attend_with_mass(self) -> tuple[Tensor, Tensor]:
        """See `Near`."""
        count = self.together
        q_sink = None if self.q_sink is None else self.q_sink[:, count:]
        out, mass = window_softmax(
            self.q[:, count:], self.keys, self.sinks, q_sink=q_sink, first=self.first,
            start=self.start + count, window_tokens=self.window_tokens,
        )  # fmt: skip
        if not count:
            return out, mass
        held = self.keys if self.sinks is None else self.sinks
        among = Keys(held.k[:, :, :count], held.v[:, :, :count])
        # As if they came after their own keys: each sees all of them.
        first, first_mass = window_softmax(self.q[:, :count], among, start=count)
        return torch.cat((first, out), 1), torch.cat((first_mass, mass), 1)


@dataclass(frozen=True)
class Near:
    """What a window mixer attends to, ready for softmax; channels may be stacked, see `_stack`.

    Attributes:
        q: Queries (B, T, H, C), rotated.
        k: Keys (B, G, S, C), rotated.
        v: Values (B, G, S, V).
        bias: Which keys count (B, 1, T, S), or None for all, or the causal ones.
        causal: Queries and keys are the same tokens, and there is no bias.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    causal: bool = False

    def attend(self) -> Tensor:
        """Softmax attention (B, T, H, V)."""
        return attend(self.q, self.k, self._values(), **self._options())[..., : self.v.shape[-1]]

    def attend_with_mass(self) -> tuple[Tensor, Tensor]:
        """The same, and the logarithm of the softmax's denominator (B, T, H), float32."""
        out, mass = attend_with_mass(self.q, self.k, self._values(), **self._options())
        return out[..., : self.v.shape[-1]], mass

    def _values(self) -> Tensor:
        return pad(self.v, (0, self.q.shape[-1] - self.v.shape[-1]))

    def _options(self) -> dict[str, Any]:
        return {"bias": self.bias, "causal": self.causal, "scale": self.v.shape[-1] ** -0.5}


class WindowSoftmax(Mixer):
    """Causal softmax over the sinks and a sliding window; constant memory.

    Args:
        window_tokens: Length of the window, self included.
        sink_tokens: First tokens that stay visible.
        sink_reach_tokens: Largest distance at which sinks are seen, see the module's text.
    """

    parts = frozenset({"window"})

    def __init__(self, window_tokens: int, sink_tokens: int, sink_reach_tokens: int) -> None:
        super().__init__()
        self.window_tokens, self.sink_tokens = window_tokens, sink_tokens
        self.sink_reach_tokens = sink_reach_tokens

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> WindowState:
        """See `Mixer.init_state`."""
        slots = self.sink_tokens + self.window_tokens
        k = like.new_zeros(batch, groups, slots, head_dim)
        return WindowState(k, k.clone(), self.sink_tokens)

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: WindowState
    ) -> tuple[Tensor, WindowState]:
        """See `Mixer.forward`."""
        del x
        k, v = span.rotate(k).transpose(1, 2), v.transpose(1, 2)
        near, state = self.near(q, k, v, span, state, self.off)
        return near.attend(), state

    def near(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        span: Span,
        state: WindowState,
        off: frozenset[str] = frozenset(),
    ) -> tuple[Near | NearWithGradient, WindowState]:
        """What the queries see, and the next state.

        Args:
            q: Queries (B, T, H, K), not rotated.
            k: Keys (B, G, T, K), rotated, as the state holds them.
            v: Values, likewise.
            span: Where the tokens stand.
            state: Before the span; consumed.
            off: Of the mixer that asks, which may be one that holds this one.
        """
        q_sink = span.rotate(q, self.sink_reach_tokens) if self._beyond_reach(span) else None
        q = span.rotate(q)
        # Switched off, the window still holds the query's own token: something must be seen.
        window = 1 if "window" in off else self.window_tokens
        if needs_gradient(q, k, v):
            near = self._with_gradient((q, q_sink), (k, v), span, state, window)
            state.append(k, v, span)
            return near, state
        causal = span.fresh and not span.together
        if causal and span.num_tokens <= window and q_sink is None:
            state.append(k, v, span)
            return Near(q, k, v, None, causal=True), state
        # Layers that share a mask must take the same way.
        if span.offset is not None and span.num_tokens == 1:
            state.append(k, v, span)
            keys, values = state.k, state.v
            positions = state.slot_positions(span.start + span.valid)
            all_seen = span.end >= state.k.shape[2] and window == self.window_tokens
        else:
            keys, values = torch.cat((state.k, k), 2), torch.cat((state.v, v), 2)
            positions = torch.cat((state.slot_positions(span.start), span.positions), 1)
            state.append(k, v, span)
            all_seen = False
        bias = None if all_seen else span.bias(positions, window, self.sink_tokens)
        if q_sink is None:
            return Near(q, keys, values, bias), state
        is_sink = (positions < self.sink_tokens).to(k.device)
        return Near(*_stack(q, q_sink, keys, is_sink), values, bias), state

    def _with_gradient(
        self,
        queries: tuple[Tensor, Tensor | None],
        new: tuple[Tensor, Tensor],
        span: Span,
        state: WindowState,
        window: int,
    ) -> NearWithGradient:
        """The cached sinks and ring in order, and after them this span's keys as they came."""
        (q, q_sink), (k, v), start = queries, new, span.common_start()
        if start == 0 and span.num_tokens <= window and q_sink is None:
            return NearWithGradient(q, None, Keys(k, v), None, 0, 0, None, span.together)
        old_sinks = min(start, self.sink_tokens)
        new_sinks = min(self.sink_tokens - old_sinks, span.num_tokens)
        held = min(start - old_sinks, self.window_tokens)
        ring = torch.arange(start - held, start) - self.sink_tokens
        slots = (self.sink_tokens + ring % self.window_tokens).to(k.device)
        pairs = ((state.k, k), (state.v, v))
        sinks = Keys(*(torch.cat((o[:, :, :old_sinks], n[:, :, :new_sinks]), 2) for o, n in pairs))
        keys = Keys(*(torch.cat((o[:, :, slots], n[:, :, new_sinks:]), 2) for o, n in pairs))
        some = sinks if self.sink_tokens else None
        first = start + new_sinks - held
        return NearWithGradient(q, q_sink, keys, some, first, start, window, span.together)

    def _beyond_reach(self, span: Span) -> bool:
        return self.sink_tokens > 0 and span.end > self.sink_reach_tokens


def _stack(q: Tensor, q_sink: Tensor, k: Tensor, is_sink: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of one softmax that scores sinks, ``is_sink`` (B, S), by ``q_sink``.

    Both queries are stacked along the head dim; a key has zeros where the other query's channels
    are. Twice the arithmetic, and only past the reach.
    """
    sink = is_sink[:, None, :, None]
    return (
        torch.cat((q, q_sink), -1),
        torch.cat((k.masked_fill(sink, 0), k.masked_fill(~sink, 0)), -1),
    )
