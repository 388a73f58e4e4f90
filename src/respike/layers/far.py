"""A window with a far memory under one softmax denominator: see `respike.ops.far`.

Letters: B batch, T tokens, H query heads, G KV groups, F prototypes, K head dim.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from respike.layers.mixer import Mixer
from respike.layers.softmax import WindowSoftmax
from respike.layers.span import Span
from respike.layers.state import MemoryState, PairState
from respike.ops.far import Prototypes, far, far_read, share_denominator


class FarSoftmax(Mixer):
    """`WindowSoftmax` whose queries also see a summary of all that has left the window.

    Keys and queries meet the prototypes without rotary positions, so a memory of any age looks
    the same: ``phi = softmax(key_weight k + key_bias)``, ``log_query = query_weight q + beta``.
    A head with ``beta`` of -inf is shut: its output is the window's, bit for bit. While all are
    shut the memory is not even kept.

    Args:
        window: The softmax over sinks and window.
        num_heads: H of the groups this mixer serves.
        num_groups: G.
        head_dim: K.
        features: F.
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
    ) -> None:
        super().__init__()
        self.window = window
        self.key_weight = nn.Parameter(torch.zeros(num_groups, features, head_dim))
        self.key_bias = nn.Parameter(torch.zeros(num_groups, features))
        self.query_weight = nn.Parameter(torch.zeros(num_heads, features, head_dim))
        self.beta = nn.Parameter(torch.full((num_heads,), -torch.inf))
        self.log2_half_life = nn.Parameter(torch.zeros(num_groups))
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
            features=features,
        )  # fmt: skip
        for name, own in self.named_parameters(recurse=False):
            of_heads = name in ("query_weight", "beta")
            setattr(part, name, nn.Parameter(own.detach()[heads if of_heads else list(groups)]))
        return part

    def init_state(self, batch: int, groups: int, head_dim: int, like: Tensor) -> PairState:
        """See `Mixer.init_state`."""
        return PairState(
            self.window.init_state(batch, groups, head_dim, like),
            MemoryState.empty(batch, groups, self.key_weight.shape[1], head_dim + 1, like),
        )

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: PairState
    ) -> tuple[Tensor, PairState]:
        """See `Mixer.forward`."""
        del x
        k, v = span.rotate(k).transpose(1, 2), v.transpose(1, 2)
        if "memory" in self.off or bool((self.beta == -torch.inf).all()):
            near, window = self.window.near(q, k, v, span, state.window, self.off)
            return near.attend(), PairState(window, state.memory)
        leaving = state.window.leaving(k, v, span)
        near, window = self.window.near(q, k, v, span, state.window, self.off)
        seen = near.attend_with_mass()
        if self.watch:
            mean, mass, memory = self.recall(q, leaving, span, state.memory.memory)
            out, share = share_denominator(*seen, mean, mass)
            self.share = share.detach()
        else:
            k = span.rotate_back(leaving[0], self.window.window_tokens)
            first = self.window.sink_tokens + self.window.window_tokens - span.start
            real = torch.stack((first, span.valid), 1)
            before = state.memory.memory
            out, memory = far(q, k, leaving[1], real, self.prototypes(), before, seen)
        return out, PairState(window, MemoryState(memory))

    def prototypes(self) -> Prototypes:
        """What the memory has learnt, as the op takes it."""
        rate = -math.log(2) * torch.exp2(-self.log2_half_life.float())
        return Prototypes(self.key_weight, self.key_bias, self.query_weight, self.beta, rate)

    def recall(
        self, q: Tensor, leaving: tuple[Tensor, Tensor, Tensor], span: Span, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What queries (B, T, H, K), not rotated, find: see `respike.ops.far.far_read`.

        Args:
            q: The queries.
            leaving: From `WindowState.leaving`.
            span: Where the tokens stand.
            memory: Before the span.
        """
        k, v, real = leaving
        k = span.rotate_back(k, self.window.window_tokens)
        return far_read(
            self.log_query(q), self.key_features(k, real), v, self._log_decay(span), memory
        )

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
