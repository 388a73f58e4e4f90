"""Sparse state expansion over the gated delta rule: more memory, no more work a token.

One memory is shared by all tokens. Of N further ones, the partitions, every token chooses C; these
it writes and reads, the others it leaves exactly as they are, not even decayed. All heads of a
token choose alike. The partitions share one set of projections.

A token's share in a partition is to scale the key it writes and the query it reads with. In the
released code the keys and queries are scaled to length 1 *after* that, which undoes it: that is
``released``. ``corrected`` scales to length 1 first.

Letters: B batch, T tokens, H query heads, G key/value heads, K key dim, V value dim, N partitions,
C partitions of a token, M most tokens of any partition, P = 1 + N.
Source: Pan et al., arXiv:2507.16577; released form: SpikingBrain2.0, arXiv:2604.22575.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from respike.ops.delta import delta, delta_definition, unit


class Stream(NamedTuple):
    """What a gated delta rule is fed, but for the values; see `respike.ops.delta`."""

    q: Float[Tensor, "B T H K"]
    """Queries before they are scaled to length 1."""
    k: Float[Tensor, "B T G K"]
    """Keys, likewise."""
    beta: Float[Tensor, "B T G"]
    log_decay: Float[Tensor, "B T G"]


class Choice(NamedTuple):
    """Where each token goes, the same for all heads."""

    shares: Float32[Tensor, "B T N"]
    """In every partition; those of the chosen ones matter."""
    where: Int[Tensor, "B T C"]
    """The chosen ones, each once."""
    real: Bool[Tensor, "B T"] | None = None
    """False is padding: it goes nowhere, and what it reads means nothing. None: there is none."""

    @property
    def chosen(self) -> Bool[Tensor, "B T N"]:
        """The same as a table."""
        table = torch.zeros_like(self.shares, dtype=torch.bool).scatter_(2, self.where, True)
        return table if self.real is None else table & self.real[..., None]


def gated(
    x: Float[Tensor, "*rows H K"], share: Float32[Tensor, "*rows"], *, corrected: bool
) -> Float32[Tensor, "*rows H K"]:
    """Queries or keys of length 1, times the share; released: times the share, then of length 1."""
    share = share[..., None, None]
    return share * unit(x) if corrected else unit(share * x.float())


def sse_definition(
    shared: Stream,
    sparse: Stream,
    v: Float[Tensor, "B T G V"],
    choice: Choice,
    state: Float32[Tensor, "B P G K V"],
    *,
    corrected: bool,
) -> tuple[Float32[Tensor, "B T H V"], Float32[Tensor, "B P G K V"]]:
    """Each partition is a gated delta rule over the tokens that chose it: the definition.

    The output is the sum over the shared memory and the chosen partitions, in this order.

    Args:
        shared: For the memory of all tokens.
        sparse: For the partitions.
        v: Values of both.
        choice: Where tokens go.
        state: Before the first token; the shared memory is the first.
        corrected: See the module's text.

    Returns:
        The outputs, and the state after the last token.
    """
    real = choice.chosen.any(-1)
    rows, after = [], []
    for b in range(len(v)):
        kept = real[b].nonzero()[:, 0]
        one = (unit(shared.q), unit(shared.k), v, shared.beta, shared.log_decay)
        q, k, value, beta, log_decay = (x[b, kept][None] for x in one)
        read, first = delta_definition(q, k, value, beta, log_decay, state[b, :1])
        out = read.new_zeros(v.shape[1], *read.shape[2:]).index_add(0, kept, read[0])
        memories = [first]
        for n in range(state.shape[1] - 1):
            mine = choice.chosen[b, :, n].nonzero()[:, 0]
            share = choice.shares[b, mine, n]
            q, k, value, beta, log_decay = (
                x[b, mine][None] for x in (sparse.q, sparse.k, v, sparse.beta, sparse.log_decay)
            )
            q, k = (gated(x, share[None], corrected=corrected) for x in (q, k))
            read, memory = delta_definition(q, k, value, beta, log_decay, state[b, [1 + n]])
            out = out.index_add(0, mine, read[0])
            memories.append(memory)
        rows.append(out)
        after.append(torch.cat(memories))
    return torch.stack(rows), torch.stack(after)


def sse(
    shared: Stream,
    sparse: Stream,
    v: Float[Tensor, "B T G V"],
    choice: Choice,
    state: Float32[Tensor, "B P G K V"],
    *,
    corrected: bool,
) -> tuple[Float32[Tensor, "B T H V"], Float32[Tensor, "B P G K V"]]:
    """`sse_definition` with as many token-streams as a token has memories, whatever N is.

    Every partition's tokens are put together, in order, and all partitions of all rows are the rows
    of one batch for `respike.ops.delta.delta`, so what is fast there is fast here. Same arguments
    and results; ``state`` is not written to.
    """
    k, beta, log_decay = unit(shared.k), shared.beta, shared.log_decay
    if choice.real is not None:
        k, beta, log_decay = (_only(choice.real, x) for x in (k, beta, log_decay))
    out, first = delta(unit(shared.q), k, v, beta, log_decay, state[:, 0])
    if v.shape[1] == 1:
        read, rest = _one_token(sparse, v, choice, state[:, 1:], corrected)
    else:
        read, rest = _many_tokens(sparse, v, choice, state[:, 1:], corrected)
    return out + read, torch.cat((first[:, None], rest), 1)


def _only(real: Tensor, x: Tensor) -> Tensor:
    """``x`` with zeros where it is not real."""
    return x.masked_fill(~real.view(*real.shape, *(1,) * (x.ndim - real.ndim)), 0)


def _many_tokens(
    sparse: Stream,
    v: Tensor,
    choice: Choice,
    state: Float32[Tensor, "B N G K V"],
    corrected: bool,
) -> tuple[Float32[Tensor, "B T H V"], Float32[Tensor, "B N G K V"]]:
    chosen = choice.chosen
    B, T, N = chosen.shape
    most = int(chosen.sum(1).max()) if T else 0
    if most == 0:
        return v.new_zeros(*sparse.q.shape[:3], v.shape[3], dtype=torch.float32), state
    # Of each partition first the tokens that chose it, in their order, then others to fill up.
    order = torch.sort(chosen.to(torch.uint8), dim=1, descending=True, stable=True).indices
    order = order[:, :most].mT  # B N M
    rows = torch.arange(B, device=v.device)[:, None, None]
    part = torch.arange(N, device=v.device)[None, :, None]
    real = chosen[rows, order, part].flatten(0, 1)
    share = choice.shares[rows, order, part].flatten(0, 1)
    q, k, beta, log_decay, value = (x[rows, order].flatten(0, 1) for x in (*sparse, v))
    q, k = (gated(x, share, corrected=corrected) for x in (q, k))
    k, beta, log_decay = (_only(real, x) for x in (k, beta, log_decay))
    read, after = delta(q, k, value, beta, log_decay, state.flatten(0, 1))
    # A token finds what it read at its number among those of the partition.
    number = (chosen.cumsum(1) - 1).clamp(min=0).gather(2, choice.where)
    found = read.view(B, N, *read.shape[1:])[rows, choice.where, number]  # B T C H V
    found = _only(chosen.gather(2, choice.where), found)
    return found.sum(2), after.view_as(state)


def _one_token(
    sparse: Stream,
    v: Tensor,
    choice: Choice,
    state: Float32[Tensor, "B N G K V"],
    corrected: bool,
) -> tuple[Float32[Tensor, "B 1 H V"], Float32[Tensor, "B N G K V"]]:
    """Only the chosen memories are touched: each is a row of the batch."""
    index = choice.where[:, 0]
    B, C = index.shape
    rows = torch.arange(B, device=v.device)[:, None]
    share = choice.shares[:, 0].gather(1, index)
    real = choice.chosen[:, 0].gather(1, index)
    spread = (x.expand(-1, C, *x.shape[2:]) for x in (*sparse, v))
    q, k, beta, log_decay, value = spread
    q, k = (gated(x, share, corrected=corrected) for x in (q, k))
    k, beta, log_decay = (_only(real, x) for x in (k, beta, log_decay))
    q, k, value, beta, log_decay = (
        x.flatten(0, 1)[:, None] for x in (q, k, value, beta, log_decay)
    )
    before = state[rows, index]
    read, after = delta(q, k, value, beta, log_decay, before.flatten(0, 1))
    kept = state.index_put((rows, index), after.view_as(before))
    return _only(real, read.view(B, C, *read.shape[1:])).sum(1), kept
