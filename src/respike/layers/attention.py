"""The attention layer: shared projections, and a mixer for each set of KV groups.

Letters: B batch, T tokens, D model width, H query heads, G KV groups, K head dim.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from respike.layers.mixer import Mixer
from respike.layers.norm import RMSNorm
from respike.layers.span import Span
from respike.layers.state import MixerState


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
        mixers: Sequence[tuple[Sequence[int], Mixer]],
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

    def set_mixers(self, mixers: Sequence[tuple[Sequence[int], Mixer]]) -> None:
        """Exchange the mixers, for instance to measure what a KV group is worth."""
        self.groups = [list(groups) for groups, _ in mixers]
        self.mixers = nn.ModuleList(mixer for _, mixer in mixers)

    def arrangement(self) -> list[tuple[list[int], Mixer]]:
        """What `set_mixers` would take to make it as it is."""
        return list(zip(self.groups, cast(list[Mixer], list(self.mixers)), strict=True))

    def init_state(self, batch: int, like: Tensor) -> tuple[MixerState, ...]:
        """One state for each mixer, in order."""
        return tuple(
            mixer.init_state(batch, len(groups), self.head_dim, like)
            for groups, mixer in self.arrangement()
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, K), keys and values (B, T, G, K) of (B, T, D), not rotated."""
        B, T, _ = x.shape
        G, K = self.num_groups, self.head_dim
        q = self.q_proj(x).view(B, T, self.num_heads, K)
        k = self.k_proj(x).view(B, T, G, K)
        v = self.v_proj(x).view(B, T, G, K)
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(
        self, x: Tensor, span: Span, state: tuple[MixerState, ...]
    ) -> tuple[Tensor, tuple[MixerState, ...]]:
        """(B, T, D) and the states before the span -> (B, T, D) and the states after it."""
        mixed, state = self.mix(x, self.project(x), span, state)
        return self.o_proj(mixed.flatten(2)), state

    def mix(
        self,
        x: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        span: Span,
        state: tuple[MixerState, ...],
    ) -> tuple[Tensor, tuple[MixerState, ...]]:
        """As `forward` between `project`, which gives ``qkv``, and the output: (B, T, H, K)."""
        B, T, _ = x.shape
        q, k, v = qkv
        if self.groups == [list(range(self.num_groups))]:
            out, new = self.mixers[0](x, q, k, v, span, state[0])
            return out, (new,)
        q = q.view(B, T, self.num_groups, -1, self.head_dim)
        outputs, after, order = [], [], []
        for (groups, mixer), before in zip(self.arrangement(), state, strict=True):
            out, new = mixer(
                x, q[:, :, groups].flatten(2, 3), k[:, :, groups], v[:, :, groups], span, before
            )
            outputs.append(out.reshape(B, T, len(groups), -1))
            after.append(new)
            order += groups
        back = [order.index(g) for g in range(self.num_groups)]
        out = torch.cat(outputs, 2)[:, :, back]
        return out.reshape(B, T, self.num_heads, self.head_dim), tuple(after)
