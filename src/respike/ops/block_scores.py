"""Scores and choice of blocks in torch: what `respike.ops.blocks` does without a kernel.

Letters: as there.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from respike.ops.block_rule import BlockRule
from respike.ops.rotary import rotary_tables, rotate_definition


@dataclass(frozen=True)
class Rows:
    """Rows of blocks (B, G, N, M, K), float32: rotated within their blocks, and to their places."""

    within: Tensor
    placed: Tensor
    dtype: torch.dtype
    """In which they are held."""

    @property
    def blocks(self) -> int:
        """How many there are."""
        return self.within.shape[2]


def rows_of(rows: Tensor, blocks: int, frequencies: Tensor, block_tokens: int) -> Rows:
    """Of what is cached, (B, G, blocks * M, K)."""
    B, G, _, K = rows.shape
    within = rows.float().reshape(B, G, blocks, -1, K)
    starts = (torch.arange(blocks) * block_tokens).expand(B * G, -1)
    cos, sin = (x.to(rows.device) for x in rotary_tables(starts, frequencies))
    placed = rotate_definition(within.flatten(0, 1), cos, sin).view_as(within)
    return Rows(within, placed, rows.dtype)


def scores_of(
    q: Tensor,
    rows: Rows,
    positions: Tensor,
    frequencies: Tensor,
    rule: BlockRule,
    at_reach: torch.dtype,
) -> Tensor:
    """Scores (B, G, H/G, T, N, M) of queries with rows, each block at its distance.

    Queries of blocks held at a reach are rounded to ``at_reach``.
    """
    B, T, H, K = q.shape
    G, size = rows.within.shape[1], rule.block_tokens

    def product(at: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        cos, sin = (x.to(q.device) for x in rotary_tables(at, frequencies))
        turned = rotate_definition(q, cos, sin).to(dtype).float()
        turned = turned.view(B, T, G, H // G, K) * K**-0.5
        return torch.einsum("btghk,bgnmk->bghtnm", turned, keys)

    scores = product(positions, rows.placed, torch.float32)
    starts = torch.arange(rows.blocks) * size
    far = torch.arange(rows.blocks) < rule.first_near(positions)[:, :, None]
    for part, reach, first in (
        (slice(0, rule.sink_blocks), rule.sink_reach_tokens, 0),
        (slice(rule.sink_blocks, None), rule.reach_tokens, rule.true_tokens),
    ):
        if reach is None:
            continue
        asked = positions[:, :, None]
        beyond = (far & (asked >= first) & (asked - starts >= reach))[:, :, part]
        if beyond.any():
            at = torch.full_like(positions, reach - 1)
            still = product(at, rows.within[:, :, part], at_reach)
            mask = beyond.to(q.device)[:, None, None, :, :, None]
            scores[..., part, :] = torch.where(mask, still, scores[..., part, :])
    return scores


def choose_blocks(
    q: Tensor, means: Rows, positions: Tensor, frequencies: Tensor, rule: BlockRule
) -> Bool[Tensor, "B G T N"]:
    """Blocks that each token sees in each group."""
    block = torch.arange(means.blocks)
    first_near = rule.first_near(positions)[:, :, None]
    always = ((block >= first_near) | (block < rule.sink_blocks)).to(q.device)[:, None]
    seen = always.expand(-1, means.within.shape[1], -1, -1)
    if bool(always.all()):
        return seen
    with torch.no_grad():
        scores = scores_of(q, means, positions, frequencies, rule, means.dtype).amax(-1)
        scores = scores.masked_fill(always[:, :, None], -torch.inf)
        # Less what keeps a token without candidates from being NaN.
        mass = scores.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
        best = (scores - mass).amax(2)
        top = best.topk(min(rule.top_blocks, means.blocks), -1).indices
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, top, True)
    return seen | (chosen & ~always)
