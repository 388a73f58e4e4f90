"""What a mixer remembers between calls: explicit, countable, savable.

Letters: B batch, G KV groups of the mixer, K head dim, W window, S sinks.

A mixer's forward consumes the state it is given and returns the next one; buffers may be reused,
so `clone` a state first to keep it. States do not count tokens: the decoder's state does, once for
all layers, and passes the counts in a `Span`. Cached keys are already rotated.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from respike.layers.span import Span
from respike.layers.storage import capacity, put_rows

# Not typing.Self: the shape checks of the tests decorate methods one by one and cannot know it.
S = TypeVar("S", bound="MixerState")


@runtime_checkable
class MixerState(Protocol):
    """The contract of every mixer's state."""

    def nbytes(self, num_tokens: int) -> int:
        """Bytes one sequence of ``num_tokens`` tokens needs, whatever is allocated now."""
        ...

    def clone(self: S) -> S:
        """An independent copy."""
        ...

    def rows(self: S, index: slice, num_tokens: int | None = None) -> S:
        """Some sequences of the batch, with room for ``num_tokens`` at most; shares memory."""
        ...

    @classmethod
    def join(cls: type[S], states: Sequence[S]) -> S:
        """One batch from several, in order."""
        ...

    def tensors(self, num_tokens: int) -> dict[str, Tensor]:
        """What has to be stored for sequences of up to ``num_tokens`` tokens."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave; shapes are checked by the caller's state format."""
        ...


class KVState:
    """A cache that grows: slot = position. Memory: 2 * G * K values a token."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v  # (B, G, capacity, K)

    @classmethod
    def empty(cls, batch: int, groups: int, head_dim: int, like: Tensor) -> "KVState":
        """No tokens yet; dtype and device of ``like``."""
        k = like.new_zeros(batch, groups, 0, head_dim)
        return cls(k, k.clone())

    def append(self, k: Tensor, v: Tensor, span: Span) -> None:
        """Store the span's keys and values, (B, G, T, K); padding is left out."""
        self.reserve(span.end)
        put_rows(self.k, k.detach(), span)
        put_rows(self.v, v.detach(), span)

    def reserve(self, num_tokens: int) -> None:
        """Make room for sequences of up to ``num_tokens`` tokens."""
        have = self.k.shape[2]
        if num_tokens <= have:
            return
        # Zeros, because a masked slot is still multiplied: garbage could be NaN.
        extra = capacity(have, num_tokens) - have
        pad = self.k.new_zeros(*self.k.shape[:2], extra, self.k.shape[3])
        self.k, self.v = torch.cat((self.k, pad), 2), torch.cat((self.v, pad), 2)

    def nbytes(self, num_tokens: int) -> int:
        """See `MixerState.nbytes`."""
        _, groups, _, head_dim = self.k.shape
        return 2 * groups * head_dim * self.k.element_size() * num_tokens

    def clone(self) -> "KVState":
        """See `MixerState.clone`."""
        return KVState(self.k.clone(), self.v.clone())

    def rows(self, index: slice, num_tokens: int | None = None) -> "KVState":
        """See `MixerState.rows`."""
        return KVState(self.k[index, :, :num_tokens], self.v[index, :, :num_tokens])

    @classmethod
    def join(cls, states: Sequence["KVState"]) -> "KVState":
        """See `MixerState.join`."""
        capacity = max(s.k.shape[2] for s in states)

        def padded(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, 0, 0, capacity - x.shape[2]))

        return cls(
            torch.cat([padded(s.k) for s in states]), torch.cat([padded(s.v) for s in states])
        )

    def tensors(self, num_tokens: int) -> dict[str, Tensor]:
        """See `MixerState.tensors`."""
        return {"k": self.k[:, :, :num_tokens], "v": self.v[:, :, :num_tokens]}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `MixerState.restore`."""
        self.k, self.v = tensors["k"], tensors["v"]


class WindowState:
    """Sinks and a ring of the last W tokens in one buffer of S + W slots. Constant memory.

    Slot j < S holds position j, for good. Slot S + (p - S) % W holds position p >= S until p + W
    replaces it. So a token is never stored twice, and which position a slot holds follows from
    the number of tokens seen.
    """

    def __init__(self, k: Tensor, v: Tensor, sink_tokens: int) -> None:
        self.k, self.v, self.sink_tokens = k, v, sink_tokens  # (B, G, S + W, K)

    def slot_positions(self, seen: Tensor) -> Tensor:
        """Position in each slot, (B, S + W), after ``seen`` (B,) tokens; -1 where empty."""
        sinks = self.sink_tokens
        window = self.k.shape[2] - sinks
        slot = torch.arange(sinks + window)[None]
        last = seen[:, None] - 1
        ring = last - (last - slot) % window
        position = torch.where(slot < sinks, slot.expand_as(ring), ring)
        stored = (position <= last) & ((slot < sinks) | (position >= sinks))
        return position.where(stored, -1)

    def append(self, k: Tensor, v: Tensor, span: Span) -> None:
        """Store the span's keys and values, (B, G, T, K): sinks once, then the newest W."""
        sinks = self.sink_tokens
        if span.offset is not None and span.num_tokens == 1:
            p = span.offset
            slot = p if p < sinks else sinks + (p - sinks) % (self.k.shape[2] - sinks)
            self.k[:, :, slot : slot + 1] = k.detach()
            self.v[:, :, slot : slot + 1] = v.detach()
            return
        after = self.slot_positions(span.start + span.valid) - span.start[:, None]
        fresh = (after >= 0).to(k.device)[:, None, :, None]
        index = after.clamp(0, span.num_tokens - 1).to(k.device)[:, None, :, None]
        index = index.expand(-1, k.shape[1], -1, k.shape[3])
        self.k = torch.where(fresh, k.detach().gather(2, index), self.k)
        self.v = torch.where(fresh, v.detach().gather(2, index), self.v)

    def leaving(self, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """The tokens that leave the window while it takes in the span: one, or none, a step.

        To be asked before `append`. At position p it is token p - W, unless that is a sink, was
        never there, or p is padding.

        Args:
            k: The span's keys (B, G, T, K), as they will be stored.
            v: Its values, likewise.
            span: Where the tokens stand.

        Returns:
            Keys and values (B, T, G, K); any where none leaves.
        """
        sinks = self.sink_tokens
        window = self.k.shape[2] - sinks
        if span.offset is not None and span.num_tokens == 1:
            # The new token takes the place of the one that leaves: a copy, before it does.
            place = sinks + (span.offset - sinks) % window
            return self.k[:, :, [place]].transpose(1, 2), self.v[:, :, [place]].transpose(1, 2)
        position = span.positions - window
        real = (position >= sinks) & (span.positions < (span.start + span.valid)[:, None])
        stored = position < span.start[:, None]
        slot = torch.where(
            stored, sinks + (position - sinks) % window, position - span.start[:, None]
        )
        slot = torch.where(stored, slot, slot + sinks + window).where(real, 0)
        index = slot.to(k.device)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        left_k = torch.cat((self.k, k), 2).gather(2, index)
        left_v = torch.cat((self.v, v), 2).gather(2, index)
        return left_k.transpose(1, 2), left_v.transpose(1, 2)

    def nbytes(self, num_tokens: int) -> int:
        """See `MixerState.nbytes`: at most S + W tokens are held, and all slots are allocated."""
        del num_tokens
        return 2 * self.k[0].numel() * self.k.element_size()

    def clone(self) -> "WindowState":
        """See `MixerState.clone`."""
        return WindowState(self.k.clone(), self.v.clone(), self.sink_tokens)

    def rows(self, index: slice, num_tokens: int | None = None) -> "WindowState":
        """See `MixerState.rows`; its slots are as many at any length."""
        del num_tokens
        return WindowState(self.k[index], self.v[index], self.sink_tokens)

    @classmethod
    def join(cls, states: Sequence["WindowState"]) -> "WindowState":
        """See `MixerState.join`."""
        k, v = (torch.cat([getattr(s, name) for s in states]) for name in ("k", "v"))
        return cls(k, v, states[0].sink_tokens)

    def tensors(self, num_tokens: int) -> dict[str, Tensor]:
        """See `MixerState.tensors`."""
        del num_tokens
        return {"k": self.k, "v": self.v}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `MixerState.restore`."""
        self.k, self.v = tensors["k"], tensors["v"]


class MemoryState:
    """A linear memory, (B, G, K, V) in float32 whatever the model's dtype. Constant memory.

    As a cache it carries no gradient from call to call.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory.detach()

    @classmethod
    def empty(cls, batch: int, groups: int, keys: int, values: int, like: Tensor) -> "MemoryState":
        """Nothing remembered yet; device of ``like``."""
        return cls(like.new_zeros(batch, groups, keys, values, dtype=torch.float32))

    def nbytes(self, num_tokens: int) -> int:
        """See `MixerState.nbytes`."""
        del num_tokens
        return self.memory[0].numel() * self.memory.element_size()

    def clone(self) -> "MemoryState":
        """See `MixerState.clone`."""
        return MemoryState(self.memory.clone())

    def rows(self, index: slice, num_tokens: int | None = None) -> "MemoryState":
        """See `MixerState.rows`."""
        del num_tokens
        return MemoryState(self.memory[index])

    @classmethod
    def join(cls, states: Sequence["MemoryState"]) -> "MemoryState":
        """See `MixerState.join`."""
        return cls(torch.cat([s.memory for s in states]))

    def tensors(self, num_tokens: int) -> dict[str, Tensor]:
        """See `MixerState.tensors`."""
        del num_tokens
        return {"memory": self.memory}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `MixerState.restore`."""
        self.memory = tensors["memory"]


class KeptState(MemoryState):
    """A far memory, and the tokens that it keeps as they are; see `respike.ops.keep`.

    Attributes:
        k: Keys of the kept tokens (B, G, M, K), rotated.
        plain_k: The same, not rotated, as the memory will take them.
        v: Values.
        worth: (B, G, M), float32.
        position: (B, G, M), int64; -1 where a place is empty.
    """

    parts = ("k", "plain_k", "v", "worth", "position")
    vacant = (0, 0, 0, 0, -1)
    """What an empty place holds of each."""

    def __init__(self, memory: Tensor, *kept: Tensor) -> None:
        super().__init__(memory)
        self.k, self.plain_k, self.v, self.worth, self.position = (x.detach() for x in kept)

    @classmethod
    def none_kept(cls, memory: MemoryState, kept_tokens: int, like: Tensor) -> "KeptState":
        """Beside an empty memory, M empty places; dtype and device of ``like``."""
        B, G, _, values = memory.memory.shape
        k = like.new_zeros(B, G, kept_tokens, values - 1)
        worth = k.new_zeros(B, G, kept_tokens, dtype=torch.float32)
        position = torch.full_like(worth, -1, dtype=torch.int64)
        return cls(memory.memory, k, k.clone(), k.clone(), worth, position)

    def kept(self) -> list[Tensor]:
        """The kept tokens' tensors, in the order of ``parts``."""
        return [getattr(self, name) for name in self.parts]

    def nbytes(self, num_tokens: int) -> int:
        """See `MixerState.nbytes`: all places are allocated."""
        return super().nbytes(num_tokens) + sum(
            x[0].numel() * x.element_size() for x in self.kept()
        )

    def clone(self) -> "KeptState":
        """See `MixerState.clone`."""
        return KeptState(self.memory.clone(), *(x.clone() for x in self.kept()))

    def rows(self, index: slice, num_tokens: int | None = None) -> "KeptState":
        """See `MixerState.rows`."""
        del num_tokens
        return KeptState(self.memory[index], *(x[index] for x in self.kept()))

    @classmethod
    def join(cls, states: Sequence["MemoryState"]) -> "KeptState":
        """See `MixerState.join`."""
        found = {name: [getattr(s, name) for s in states] for name in ("memory", *cls.parts)}
        return cls(*(torch.cat(tensors) for tensors in found.values()))

    def tensors(self, num_tokens: int) -> dict[str, Tensor]:
        """See `MixerState.tensors`: all of them (B, G, M, K or 1), as files want them."""
        names = (f"kept_{name}" for name in self.parts)
        kept = (x.view(*x.shape[:3], -1) for x in self.kept())
        return super().tensors(num_tokens) | dict(zip(names, kept, strict=True))

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `MixerState.restore`."""
        super().restore(tensors)
        for name, mine in zip(self.parts, self.kept(), strict=True):
            setattr(self, name, tensors[f"kept_{name}"].flatten(mine.ndim - 1))


class PairState:
    """A softmax's state, mostly a window's, and a memory's."""

    def __init__(self, window: WindowState | KVState, memory: MemoryState) -> None:
        self.window: Any = window
        self.memory = memory

    def nbytes(self, num_tokens: int) -> int:
        """See `MixerState.nbytes`."""
        return int(self.window.nbytes(num_tokens)) + self.memory.nbytes(num_tokens)

    def clone(self) -> "PairState":
        """See `MixerState.clone`."""
        return PairState(self.window.clone(), self.memory.clone())

    def rows(self, index: slice, num_tokens: int | None = None) -> "PairState":
        """See `MixerState.rows`."""
        return PairState(self.window.rows(index, num_tokens), self.memory.rows(index))

    @classmethod
    def join(cls, states: Sequence["PairState"]) -> "PairState":
        """See `MixerState.join`."""
        return cls(
            type(states[0].window).join([s.window for s in states]),
            type(states[0].memory).join([s.memory for s in states]),
        )

    def tensors(self, num_tokens: int) -> dict[str, Tensor]:
        """See `MixerState.tensors`."""
        return {**self.window.tensors(num_tokens), **self.memory.tensors(num_tokens)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `MixerState.restore`."""
        self.window.restore(tensors)
        self.memory.restore(tensors)
