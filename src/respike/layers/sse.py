"""Sparse state expansion as a memory, as in SpikingBrain2.0's released code.

Letters: B batch, T tokens, D model width, H query heads, G KV groups, K head dim, N partitions, C
of these that a token chooses, R rank.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from respike.layers.memory import Memory, delta_gates
from respike.layers.span import Span
from respike.ops.routing import balance_loss, route
from respike.ops.sse import Choice, Stream, sse


class SparseDelta(Memory):
    """One gated delta rule for all tokens and N of which each token chooses C: `respike.ops.sse`.

    The partitions share one set of queries and keys: those of the layer, plus a low-rank term each.
    Decays and write strengths are apart: the first G are the shared memory's.

    Args:
        hidden_size: D.
        num_heads: H.
        num_groups: G.
        head_dim: K.
        partitions: N.
        chosen: C.
        rank: R.
        corrected: A token's share in a partition acts; as released, it does not.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_groups: int,
        head_dim: int,
        partitions: int,
        chosen: int,
        rank: int,
        corrected: bool,
    ) -> None:
        super().__init__()
        self.copies, self.chosen, self.corrected = 1 + partitions, chosen, corrected
        self.q_down = nn.Linear(hidden_size, rank, bias=False)
        self.q_up = nn.Linear(rank, num_heads * head_dim, bias=False)
        self.k_down = nn.Linear(hidden_size, rank, bias=False)
        self.k_up = nn.Linear(rank, num_groups * head_dim, bias=False)
        self.a_proj = nn.Linear(hidden_size, 2 * num_groups, bias=False)
        self.b_proj = nn.Linear(hidden_size, 2 * num_groups, bias=False)
        self.A_log = nn.Parameter(torch.zeros(2 * num_groups))
        self.dt_bias = nn.Parameter(torch.zeros(2 * num_groups))
        self.router = nn.Linear(hidden_size, partitions, bias=False)
        self.balances: list[tuple[Tensor, int]] | None = None
        """Unless None, every call adds its `respike.ops.routing.balance_loss` and its tokens."""

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, span: Span, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Memory.forward`."""
        log_decay, beta = (z.chunk(2, -1) for z in delta_gates(self, x))
        other_q = q + self.q_up(self.q_down(x)).view_as(q)
        other_k = k + self.k_up(self.k_down(x)).view_as(k)
        shared = Stream(silu(q.float()), silu(k.float()), beta[0], log_decay[0])
        sparse = Stream(silu(other_q.float()), silu(other_k.float()), beta[1], log_decay[1])
        real = None if span.padding is None else ~span.padding
        shares, index = route(self.router(x), self.chosen)
        if self.balances is not None:
            count = x.shape[0] * x.shape[1] if real is None else int(real.sum())
            self.balances.append((balance_loss(shares, index, real), count))
        memories = state.view(len(x), self.copies, -1, *state.shape[2:])
        choice = Choice(shares, index, real)
        out, after = sse(
            shared, sparse, silu(v.float()), choice, memories, corrected=self.corrected
        )
        return out, after.flatten(1, 2)
