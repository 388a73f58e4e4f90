"""Gradients of `respike.ops.softmax.window_softmax`, block by block of queries.

With the logarithm of the denominator saved, the weights ``P = exp(scores - mass)`` come back from
one product, and each block of queries needs only the keys it can see. Two subtractions happen
inside the products, as channels appended to both sides, so ``dP - delta`` is rounded to the dtype
of the inputs only once it is small. Scores are recomputed in float32, the rest is not.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G, K key dim, V value
dim, C queries of a block.
Source: Dao et al., arXiv:2205.14135, appendix B; the appended channels are our own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_QUERIES = 128
"""Queries of a block, at least: products of fewer rows are slow, of more see many keys in vain."""
TILE_SCORES = 1 << 18
"""Scores of a block where keys are so few that more queries fit."""


class Where(NamedTuple):
    """Where queries and keys stand, and the factor on the scores: see `window_softmax`."""

    first: int
    start: int
    window_tokens: int | None
    scale: float


class Row(NamedTuple):
    """Queries with what the forward pass made of them and what the backward pass was given."""

    q: Tensor
    """(B, T, H, K), rotated."""
    q_sink: Tensor
    """As sinks see them; may be ``q`` itself."""
    out: Tensor
    """(B, T, H, V)."""
    mass: Tensor
    """Logarithm of the denominator, float32 (B, T, H)."""
    d_out: Tensor
    """Gradient of ``out``."""
    d_mass: Tensor
    """Gradient of ``mass``."""


def torch_gradients(row: Row, exact: list[Tensor], where: Where) -> tuple[Tensor | None, ...]:
    """Gradients of the op in torch: what runs where the kernel cannot.

    Args:
        row: The queries.
        exact: Keys and values, then those of sinks if there are any.
        where: Of the op.

    Returns:
        Gradients of q, of q_sink (None if it is q, whose gradient then is of both), and of
        ``exact``, in the dtype of q.
    """
    q, q_sink, out, mass, d_out, d_mass = row
    known = d_out, mass, (d_out.float() * out.float()).sum(-1) - d_mass
    d_q, *d_parts = part_gradients((q, *known), (exact[0], exact[1]), where)
    d_q_sink = None
    if exact[2:]:
        where = where._replace(first=0, window_tokens=None)
        d_q_sink, *d_sinks = part_gradients((q_sink, *known), (exact[2], exact[3]), where)
        d_parts += d_sinks
        if q_sink is q:
            d_q, d_q_sink = d_q.add_(d_q_sink), None
    return tuple(None if d is None else d.to(q.dtype) for d in (d_q, d_q_sink, *d_parts))


def part_gradients(
    rows: tuple[Tensor, Tensor, Tensor, Tensor], keys: tuple[Tensor, Tensor], where: Where
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values by one run of keys of the softmax.

    Args:
        rows: Queries (B, T, H, K) as they see these keys, the gradient of their outputs
            (B, T, H, V), and float32 (B, T, H): the mass, and ``sum(d_out * out) - d_mass``.
        keys: Keys (B, G, S, K), rotated, and values (B, G, S, V).
        where: ``first``, ``start``, ``window_tokens`` and ``scale`` of the op.

    Returns:
        In float32: (B, T, H, K), (B, G, S, K), (B, G, S, V).
    """
    (q, d_out, mass, delta), (k, v), (first, start, window, scale) = rows, keys, where
    (B, T, H, K), (_, G, S, V) = q.shape, v.shape
    R = H // G
    q = _rows(q.float(), -mass / scale, G)
    d_out = _rows(d_out, -delta, G)
    k, v = (_with_ones(x).flatten(0, 1) for x in (k.float(), v))
    exact_q, exact_k = (x[..., :K].to(v.dtype) for x in (q, k))
    d_q = q.new_zeros(B * G, T * R, K, dtype=torch.float32)
    d_k, d_v = (q.new_zeros(B * G, S, n, dtype=torch.float32) for n in (K, V))
    size = max(BLOCK_QUERIES, TILE_SCORES // max(1, B * H * S))
    for begin in range(0, T, size):
        end = min(T, begin + size)
        low = 0 if window is None else max(0, start + begin - window + 1 - first)
        high = min(S, start + end - first)
        if low >= high:
            continue
        some, seen = slice(begin * R, end * R), slice(low, high)
        hidden = _hidden(start + begin - first - low, end - begin, high - low, window, q)
        weights = _product(q[:, some], k[:, seen].mT, scale)
        weights.view(B * G, end - begin, R, -1).add_(hidden[:, None])
        weights = weights.exp_().to(v.dtype)
        d_v[:, seen] += weights.mT @ d_out[:, some, :V]
        d_scores = (d_out[:, some] @ v[:, seen].mT).mul_(weights)
        d_q[:, some] = d_scores @ exact_k[:, seen]
        d_k[:, seen] += d_scores.mT @ exact_q[:, some]
    d_q = d_q.mul_(scale).view(B, G, T, R, K).permute(0, 2, 1, 3, 4).reshape(B, T, H, K)
    return d_q, d_k.mul_(scale).view(B, G, S, K), d_v.view(B, G, S, V)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * a @ b``, rounded once."""
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=scale)


def _rows(x: Tensor, extra: Tensor, groups: int) -> Tensor:
    """(B G, T R, n + 2): x (B, T, H, n), a group's heads in rows, and ``extra`` as two channels."""
    high = extra.to(x.dtype)
    low = (extra - high.float()).to(x.dtype)
    wide = torch.cat((x, high[..., None], low[..., None]), -1)
    B, T, H, n = wide.shape
    return wide.view(B, T, groups, H // groups, n).transpose(1, 2).reshape(B * groups, -1, n)


def _with_ones(x: Tensor) -> Tensor:
    """(B, G, S, n + 2), the counterpart of `_rows`."""
    return torch.cat((x, x.new_ones(*x.shape[:3], 2)), -1)


def _hidden(begin: int, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """(C, S) to add to scores: -inf where a query of ``begin`` on may not see a key of 0 on."""
    p = begin + torch.arange(queries, device=like.device)[:, None]
    j = torch.arange(keys, device=like.device)
    hidden = j > p if window is None else (j > p) | (p - j >= window)
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill_(
        hidden, -torch.inf
    )
