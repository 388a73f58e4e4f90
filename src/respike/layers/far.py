"""A window with a far memory under one softmax denominator: see `respike.ops.far`.

Letters: B batch, T tokens, H query heads, G KV groups, F prototypes, K head dim.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from respike.layers.mixer import Mixer
from respike.layers.softmax import WindowSoftmax
from respike.layers.span import Span
from respike.layers.state import KeptState, MemoryState, PairState, WindowState
from respike.ops.far import Prototypes, far, far_read, share_denominator
from respike.ops.keep import Rule, attend_kept, keep


class FarSoftmax(Mixer):
    """`WindowSoftmax` whose queries also see a summary of all that has left the window.

    Keys and queries meet the prototypes without rotary positions, so a memory of any age looks
    the same: ``phi = softmax(key_weight k + key_bias)``, ``log_query = query_weight q + beta``.
    A head with ``beta`` of -inf is shut: its output is that of what it sees as it is, bit for bit:
    without kept tokens, the window's. While all are shut the memory is not even written.

    With ``kept_tokens``, those of most worth, ``exp(keep_weight k)`` that halves with age, stay as
    they are when they leave the window, and queries see them at their true distance
    (`respike.ops.keep`); the memory takes what is let go. They are the memory's, so where it is
    switched off they are too.

    Args:
        window: The softmax over sinks and window.
        num_heads: H of the groups this mixer serves.
        num_groups: G.
        head_dim: K.
        features: F.
        kept_tokens: M, tokens of each group that stay as they are, while they are no further away
            than sinks may be seen.
    """

    parts = frozenset({"window", "memory"})

    def __init__(
        self,
        window: WindowSoftmax,
        *,
        num_heads: int,
        num_groups: int,
        head_dim: int,
        features: int,
        kept_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.window, self.kept_tokens = window, kept_tokens
        self.key_weight = nn.Parameter(torch.zeros(num_groups, features, head_dim))
        self.key_bias = nn.Parameter(torch.zeros(num_groups, features))
        self.query_weight = nn.Parameter(torch.zeros(num_heads, features, head_dim))
        self.beta = nn.Parameter(torch.full((num_heads,), -torch.inf))
        self.log2_half_life = nn.Parameter(torch.zeros(num_groups))
        if kept_tokens:
            self.keep_weight = nn.Parameter(torch.zeros(num_groups, head_dim))
            self.keep_log2_half_life = nn.Parameter(torch.zeros(num_groups))
        self.watch = False
        self.share: Tensor | None = None
        """With ``watch``: memory's share of each query's attention (B, T, H) in the last call."""

    def of_groups(self, groups: Sequence[int]) -> "FarSoftmax":
        """The same for some of its groups, counted from 0; weights are copied."""
        count, features, head_dim = self.key_weight.shape
        rep = len(self.beta) // count
        heads = [g * rep + r for g in groups for r in range(rep)]
        part = FarSoftmax(
            self.window, num_heads=len(heads), num_groups=len(groups), head_dim=head_dim,
            features=features, kept_tokens=self.kept_tokens,
        )  # fmt: skip
        for name, own in self.named_parameters(recurse=False):
            of_heads = name in ("query_weight", "beta")
            setattr(part, name, nn.Parameter(own.detach()[heads if of_heads else list(groups)]))
        return part

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> PairState:
        """See `Mixer.init_state`."""
        memory = MemoryState.empty(batch, groups, self.key_weight.shape[1], head_dim + 1, like)
        if self.kept_tokens:
            memory = KeptState.none_kept(memory, self.kept_tokens, like)
        return PairState(self.window.init_state(batch, groups, head_dim, like), memory)

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: PairState
    ) -> tuple[Tensor, PairState]:
        """See `Mixer.forward`."""
        del x
        if "memory" in self.off or (self.is_shut and not self.kept_tokens):
            k, v = span.rotate(k).transpose(1, 2), v.transpose(1, 2)
            near, window = self.window.near(q, k, v, span, state.window, self.off)
            return near.attend(), PairState(window, state.memory)
        seen, leaving, after = self.seen(q, k, v, span, state)
        if self.watch:
            mean, mass, memory = self.recall(q, leaving, span, state.memory.memory)
            out, share = share_denominator(*seen, mean, mass)
            self.share = share.detach()
        else:
            memory = state.memory.memory
            out, memory = far(
                q, leaving.k, leaving.v, leaving.real, self.prototypes(), memory, seen
            )
        after.memory.memory = memory.detach()
        return out, after

    @property
    def is_shut(self) -> bool:
        """No head reads its memory."""
        return bool((self.beta == -torch.inf).all())

    def seen(
        self, q: Tensor, k: Tensor, v: Tensor, span: Span, state: PairState
    ) -> tuple[tuple[Tensor, Tensor], "Leaving", PairState]:
        """What queries make of the tokens that they see as they are.

        Args:
            q: Queries (B, T, H, K), not rotated.
            k: Keys (B, T, G, K), likewise.
            v: Values, likewise.
            span: Where the tokens stand.
            state: Before the span; consumed.

        Returns:
            Their mean value (B, T, H, K) and the logarithm of their softmax's denominator
            (B, T, H); what goes to the memory; and the state after the span but for that memory.
        """
        k, v = span.rotate(k).transpose(1, 2), v.transpose(1, 2)
        left_k, left_v = state.window.leaving(k, v, span)
        near, window = self.window.near(q, k, v, span, state.window, self.off)
        seen = near.attend_with_mass()
        plain_k = span.rotate_back(left_k, self.window.window_tokens)
        first = self.window.sink_tokens + self.window.window_tokens
        if not isinstance(state.memory, KeptState):
            leaving = Leaving(plain_k, left_v, torch.stack((first - span.start, span.valid), 1))
            return seen, leaving, PairState(window, MemoryState(state.memory.memory))
        return self._keep(q, (left_k, plain_k, left_v), span, state.memory, seen, window)

    def _keep(
        self,
        q: Tensor,
        left: tuple[Tensor, Tensor, Tensor],
        span: Span,
        memory: KeptState,
        seen: tuple[Tensor, Tensor],
        window: WindowState,
    ) -> tuple[tuple[Tensor, Tensor], "Leaving", PairState]:
        """`seen` with the kept tokens, of what the window's softmax has seen and what left it."""
        limits = self.window
        rule = Rule(limits.window_tokens, limits.sink_tokens, limits.sink_reach_tokens)
        position = (span.positions - limits.window_tokens).to(q.device)[:, None]
        worth = (left[1].float() * self.keep_weight.float()).sum(-1)
        worth = (worth + position.mT * self.keep_rate()).detach()
        steps = torch.stack((span.start, span.valid), 1)
        places = keep(worth, steps, memory.worth, memory.position, rule)
        fresh = (*(x.transpose(1, 2) for x in (*left, worth)), position.expand_as(places.lost.mT))
        candidates = [torch.cat(pair, 2) for pair in zip(memory.kept(), fresh, strict=True)]
        k, plain_k, v, *_ = candidates
        mean, mass = attend_kept(span.rotate(q), k, v, places)
        out, _ = share_denominator(*seen, mean, mass)
        joint = torch.logaddexp(seen[1], mass)
        lost_k, lost_v = (_chosen(x, places.lost.mT).transpose(1, 2) for x in (plain_k, v))
        first = rule.first_lost(self.kept_tokens) - span.start
        held = places.held[:, :, -1]
        kept = [
            _chosen(x, held, none) for x, none in zip(candidates, KeptState.vacant, strict=True)
        ]
        after = PairState(window, KeptState(memory.memory, *kept))
        return (out, joint), Leaving(lost_k, lost_v, torch.stack((first, span.valid), 1)), after

    def prototypes(self) -> Prototypes:
        """What the memory has learnt, as the op takes it."""
        rate = -math.log(2) * torch.exp2(-self.log2_half_life.float())
        return Prototypes(self.key_weight, self.key_bias, self.query_weight, self.beta, rate)

    def keep_rate(self) -> Tensor:
        """What a token's position adds to the logarithm of its worth, (G) float32.

        Seen from any later position that is the same as a worth that halves with age.
        """
        return math.log(2) * torch.exp2(-self.keep_log2_half_life.float())

    def recall(
        self, q: Tensor, leaving: "Leaving", span: Span, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What queries (B, T, H, K), not rotated, find: see `respike.ops.far.far_read`.

        Args:
            q: The queries.
            leaving: From `seen`.
            span: Where the tokens stand.
            memory: Before the span.
        """
        step = torch.arange(span.num_tokens)
        real = (step >= leaving.real[:, :1]) & (step < leaving.real[:, 1:])
        features = self.key_features(leaving.k, real.to(q.device))
        return far_read(self.log_query(q), features, leaving.v, self._log_decay(span), memory)

    def log_query(self, q: Tensor) -> Tensor:
        """How much queries (B, T, H, K), not rotated, like each prototype: (B, T, H, F)."""
        return self.prototypes().log_query(q)

    def key_features(self, k: Tensor, real: Tensor) -> Tensor:
        """How much keys (B, T, G, K), not rotated, belong to each prototype: (B, T, G, F).

        Zeros where ``real`` (B, T) is false.
        """
        return self.prototypes().key_features(k) * real[:, :, None, None]

    def _log_decay(self, span: Span) -> Tensor:
        """(B, T, G, 1); padding does not age the memory."""
        rate = self.prototypes().log_decay
        aged = torch.ones(len(span.start), span.num_tokens, 1, 1, device=rate.device)
        if span.padding is not None:
            aged = aged.masked_fill(span.padding[:, :, None, None], 0)
        return aged * rate[:, None]


class Leaving(NamedTuple):
    """What a far memory takes in, one token a step.

    Attributes:
        k: Keys (B, T, G, K), not rotated.
        v: Values.
        real: For each row (B, 2), on the processor: the first step with a token, and the first that
            is padding.
    """

    k: Tensor
    v: Tensor
    real: Tensor


def _chosen(x: Tensor, index: Tensor, nobody: int = 0) -> Tensor:
    """Of candidates (B, G, C, ...), those of ``index`` (B, G, N), and ``nobody`` for -1."""
    index = index.view(*index.shape, *(1,) * (x.ndim - 3)).expand(*index.shape, *x.shape[3:])
    return x.gather(2, index.clamp(min=0)).where(index >= 0, nobody)
