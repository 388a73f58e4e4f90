"""Block-sparse softmax: the sinks, a window, and of everything older the best few blocks.

Positions are cut into blocks of ``block_tokens``. A query at p always sees the blocks its window
reaches into and those that hold sinks, whole. Of the others each KV group sees ``top_blocks``:
those whose summaries score highest with any of its query heads. A summary is the mean of
``summary_tokens`` keys in a row; a block's score is that of its best summary, less the head's
logarithm of the sum of the exponentials of all candidates' scores, so that heads are comparable.
With ``by_head`` every query head chooses for itself. MoBA is that, with a window of one token (so
the query's own block), no sinks, one summary a block, and blocks at their true distance; its k
counts the own block too.

Keys are cached rotated to their place within their block, ``j - b`` for token j of the block that
begins at b. A query is rotated by the block's distance ``p - b``, which gives the true rotary
score; a smaller distance makes the whole block look nearer, without touching the cache. Distances
of blocks outside the window are held below a reach (InfLLM holds them all at one distance), so that
no rotary distance leaves the range the weights were trained on; below `BlockRule.true_tokens` none
does anyway.

Letters: B batch, T tokens, S slots of a cache, N blocks, M tokens or summaries of a block, Z
summaries, H query heads, G KV groups, K key dim, V value dim, R = K / 2 frequencies.
Source: Xiao et al., InfLLM, arXiv:2402.04617; Lu et al., MoBA, arXiv:2502.13189.
"""

from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from respike.ops import backends
from respike.ops.block_rule import BlockRule, block_turns
from respike.ops.block_scores import Rows, choose_blocks, rows_of, scores_of
from respike.ops.blocks_gradient import Known, Seen, native_gradients
from respike.ops.recurrence import SUFFIX
from respike.ops.rotary import rotary_tables, rotate_definition
from respike.ops.softmax import Keys, cache_of, row_major

TILE_SCORES = 1 << 24
"""Scores the torch form holds at once."""
GRADIENT_QUERIES = 128
"""Queries whose scores are recomputed at once for gradients, over the blocks before them."""


def blocks_definition(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    frequencies: Float[Tensor, " R"],
    rule: BlockRule,
    *,
    by_head: bool = False,
) -> Float[Tensor, "B T H V"]:
    """Block-sparse attention of whole sequences, token by token in float32: the definition.

    Keys and summaries are rounded to the dtype of ``k`` as a cache holds them, and so are rotated
    queries where they choose among blocks held at the reach, which is most of a long text.

    Args:
        q: Queries, not rotated. Query head h belongs to KV group h // (H / G).
        k: Keys, not rotated.
        v: Values.
        frequencies: Rotary frequencies, radians per token, float64.
        rule: What is seen.
        by_head: Each query head chooses blocks for itself, else those of a group together.
    """
    B, T, H, _ = q.shape
    G, size = k.shape[2], rule.block_tokens
    together = 1 if by_head else H // G
    cached = _within_blocks(k, frequencies, size)
    out = v.new_zeros(B, T, H, v.shape[-1])
    for row in range(B):
        for first in range(0, H, together):
            heads, group = slice(first, first + together), first // (H // G)
            keys, values = cached[row, :, group], v[row, :, group].float()
            for p in range(T):
                query = q[row, p, heads]
                seen = _seen_blocks(query, keys, p, frequencies, rule)
                scores = torch.cat(
                    [
                        _turned(query, distance, frequencies)
                        @ keys[b * size : min((b + 1) * size, p + 1)].float().T
                        for b, distance in sorted(seen.items())
                    ],
                    1,
                )
                slots = [j for j in range(p + 1) if j // size in seen]
                weights = (scores * q.shape[-1] ** -0.5).softmax(-1)
                out[row, p, heads] = (weights @ values[slots]).to(v.dtype)
    return out


def _within_blocks(k: Tensor, frequencies: Tensor, size: int) -> Tensor:
    positions = (torch.arange(k.shape[1]) % size).expand(k.shape[:2])
    return rotate_definition(k, *rotary_tables(positions, frequencies))


def _turned(x: Tensor, distance: int, frequencies: Tensor) -> Tensor:
    tables = rotary_tables(torch.tensor([[distance]]), frequencies)
    return rotate_definition(x.float()[None, None], *tables)[0, 0]


def _seen_blocks(
    query: Tensor, keys: Tensor, p: int, frequencies: Tensor, rule: BlockRule
) -> dict[int, int]:
    """Blocks that the heads (H/G, K) of a group see at ``p``, and at what distance."""
    size, near = rule.block_tokens, max(0, p - rule.window_tokens + 1) // rule.block_tokens
    seen = {b: p - b * size for b in range(near, p // size + 1)}
    far: dict[int, int] = {}
    for b in range(near):
        is_sink = b < rule.sink_blocks
        held = rule.reach_tokens if p >= rule.true_tokens else None
        reach = rule.sink_reach_tokens if is_sink else held
        distance = p - b * size if reach is None else min(p - b * size, reach - 1)
        (seen if is_sink else far)[b] = distance
    if not far:
        return seen
    scores = torch.zeros(len(query), len(far))
    for column, (b, distance) in enumerate(far.items()):
        block = keys[b * size : (b + 1) * size]
        block = block.view(-1, rule.summary_tokens, block.shape[-1])
        means = block.float().mean(1).to(keys.dtype).float()
        turned = _turned(query, distance, frequencies)
        if distance < p - b * size:
            turned = turned.to(keys.dtype).float()
        scores[:, column] = (turned @ means.T).amax(-1)
    scores *= query.shape[-1] ** -0.5
    best = (scores - scores.logsumexp(-1, keepdim=True)).amax(0)
    order = best.argsort(descending=True)[: rule.top_blocks].tolist()
    blocks = list(far)
    return seen | {blocks[i]: far[blocks[i]] for i in order}


def summarise(k: Float[Tensor, "B G S K"], summary_tokens: int) -> Float[Tensor, "B G Z K"]:
    """Means of ``summary_tokens`` cached keys in a row, taken in float32.

    Args:
        k: Keys, rotated within their blocks; S is a multiple of ``summary_tokens``.
        summary_tokens: See `BlockRule`.
    """
    B, G, S, K = k.shape
    means = k.reshape(B, G, S // summary_tokens, summary_tokens, K).float().mean(3)
    return means.to(k.dtype)


def block_softmax(
    q: Float[Tensor, "B T H K"],
    keys: Keys,
    summaries: Float[Tensor, "B G Z K"],
    start: Int[Tensor, " B"],
    frequencies: Float[Tensor, " R"],
    rule: BlockRule,
    *,
    by_head: bool = False,
) -> Float[Tensor, "B T H V"]:
    """`blocks_definition` on a cache that holds the queries' tokens, as fast as can be here.

    Queries, exact keys and values have gradients, once; the choice of blocks has none.

    Args:
        q: Queries, not rotated; row b's stand at ``start[b]`` and on. What stands behind the cache
            is padding, and its output means nothing.
        keys: Slot = position, rotated within their blocks, a whole number of blocks. No slot is
            NaN.
        summaries: From `summarise`, of every block that is complete.
        start: Position of each row's first query, int64, on the processor.
        frequencies: Rotary frequencies, radians per token, float64.
        rule: What is seen.
        by_head: See `blocks_definition`. Costs the reading of the cache for each head of a group.

    Raises:
        ValueError: The tensors do not fit together.
    """
    if by_head:
        # As many passes as a group has heads, in each of which a group has one.
        heads = q.reshape(*q.shape[:2], keys.k.shape[1], -1, q.shape[3]).unbind(3)
        some = keys, summaries, start, frequencies, rule
        each = [block_softmax(x.contiguous(), *some) for x in heads]
        return torch.stack(each, 3).flatten(2, 3)
    _check(q, keys, summaries, start, frequencies, rule)
    if keys.k_scale is None and backends.needs_gradient(q, keys.k, keys.v):
        return _BlockSoftmax.apply(rule, start, frequencies, summaries, q, keys.k, keys.v)  # type: ignore[no-any-return, no-untyped-call]
    return _forward(q, keys, summaries, start, frequencies, rule)


class _BlockSoftmax(torch.autograd.Function):
    """The op with its gradients: by a kernel that knows the choice, or else recomputed in torch.

    Which blocks are seen has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, rule: BlockRule, start: Tensor, *rest: Tensor) -> Tensor:
        frequencies, summaries, q, k, v = rest
        kernels, keys = backends.choose("blocks_gradient", q, summaries, k, v), Keys(k, v)
        ctx.rule, ctx.native = rule, kernels is not None
        if kernels is not None:
            known = Known.empty(q, keys, rule.block_tokens)
            out = _forward(q, keys, summaries, start, frequencies, rule, known)
            ctx.save_for_backward(start, frequencies, q, k, v, out, *known)
            return out
        # A copy: the cache they lie in is written to before the backward pass comes.
        ctx.save_for_backward(start, frequencies, q, k, v, summaries.clone())
        return _forward(q, keys, summaries, start, frequencies, rule)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        start, frequencies, q, k, v, *rest = ctx.saved_tensors
        kernels, rule = backends.kernels(), ctx.rule
        if not ctx.native or kernels is None:
            seen = start, frequencies, rule, rest[0]
            return *[None] * 4, *_torch_gradients((q, k, v), seen, d_out)
        turns = block_turns(rule.numbers, tuple(frequencies.tolist()))
        job = Seen(q, Keys(k, v), start, rule.numbers, turns)
        found = native_gradients(kernels, job, rest[0], Known(*rest[1:]), d_out)
        return *[None] * 4, *found


def _torch_gradients(
    leaves: tuple[Tensor, Tensor, Tensor],
    seen: tuple[Tensor, Tensor, BlockRule, Tensor],
    d_out: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients where the kernel cannot run: those of the torch form, some queries at a time."""
    (q, *kv), (start, frequencies, rule, summaries) = leaves, seen
    d_q = torch.empty_like(q)
    d_kv = [torch.zeros_like(x, dtype=torch.float32) for x in kv]
    for begin in range(0, q.shape[1], GRADIENT_QUERIES):
        tile = slice(begin, begin + GRADIENT_QUERIES)
        reached = int(start.max()) + min(tile.stop, q.shape[1])
        slots = min(-(-reached // rule.block_tokens) * rule.block_tokens, kv[0].shape[2])
        given = q[:, tile], *(x[:, :, :slots].float() for x in kv)
        some = [x.detach().requires_grad_() for x in given]
        with torch.enable_grad():
            out = _block_softmax(
                some[0], Keys(*some[1:]), summaries[:, :, : slots // rule.summary_tokens],
                start + begin, frequencies, rule,
            )  # fmt: skip
        d_q[:, tile], *d_some = torch.autograd.grad(out, some, d_out[:, tile])
        for whole, part in zip(d_kv, d_some, strict=True):
            whole[:, :, :slots] += part
    return d_q, *(d.to(q.dtype) for d in d_kv)


def _forward(
    q: Tensor,
    keys: Keys,
    summaries: Tensor,
    start: Tensor,
    frequencies: Tensor,
    rule: BlockRule,
    known: Known | None = None,
) -> Tensor:
    """The op without gradients of its own; what ``known`` is to hold, only the kernel finds."""
    exact = () if keys.k_scale is not None else keys[:2]
    kernels = backends.choose("blocks", q, summaries, *exact)
    if kernels is None:
        return _block_softmax(q, keys, summaries, start, frequencies, rule)
    (B, T, H, K), (_, G, S, V) = q.shape, keys.v.shape
    q, out = q.contiguous(), q.new_empty(B, T, H, V)
    count = (S - start).clamp(0, T)
    if int(count.min()) < T:
        out.zero_()
    keys = keys._replace(k=row_major(keys.k), v=row_major(keys.v))
    summaries = summaries if summaries[0, 0].is_contiguous() else summaries.contiguous()
    numbers = rule.numbers
    getattr(kernels.module, f"blocks_{SUFFIX[q.dtype]}")(
        keys.k_scale is not None,
        kernels.level,
        torch.get_num_threads(),
        block_turns(numbers, tuple(frequencies.tolist())),
        numbers,
        q.data_ptr(),
        cache_of(keys),
        (summaries.data_ptr(), *summaries.stride()[:2]),
        out.data_ptr(),
        (G, T, H // G, K, V),
        start.tolist(),
        count.tolist(),
        (0, 0, 0) if known is None else known.numbers,
        K**-0.5,
    )
    return out


def _check(
    q: Tensor, keys: Keys, summaries: Tensor, start: Tensor, frequencies: Tensor, rule: BlockRule
) -> None:
    (B, _, H, K), (_, G, S, V) = q.shape, keys.v.shape
    fits = keys.k.shape == (B, G, S, K) and keys.v.shape == (B, G, S, V) and H % G == 0
    if not fits or S % rule.block_tokens or start.shape != (B,) or 2 * len(frequencies) != K:
        raise ValueError(
            f"queries {tuple(q.shape)}, keys {tuple(keys.k.shape)}, values {tuple(keys.v.shape)}, "
            f"{len(start)} starts and {len(frequencies)} frequencies do not fit together, or with "
            f"blocks of {rule.block_tokens}"
        )
    if summaries.shape != (B, G, S // rule.summary_tokens, K):
        raise ValueError(
            f"summaries have shape {tuple(summaries.shape)}, expected "
            f"{(B, G, S // rule.summary_tokens, K)}"
        )


def _block_softmax(
    q: Tensor, keys: Keys, summaries: Tensor, start: Tensor, frequencies: Tensor, rule: BlockRule
) -> Tensor:
    """The torch form: scores of everything, of which what is not chosen is masked."""
    B, T, H, _ = q.shape
    k, v = keys.exact()
    step = max(1, TILE_SCORES // (B * H * k.shape[2]))
    held = _held(k, summaries, frequencies, rule)
    outputs = []
    for begin in range(0, T, step):
        tile = q[:, begin : begin + step].float()
        positions = start[:, None] + torch.arange(begin, begin + tile.shape[1])
        weights = _weights(tile, held, positions, frequencies, rule)
        out = torch.einsum("bghts,bgsv->btghv", weights, v)
        outputs.append(out.flatten(2, 3).to(q.dtype))
    return torch.cat(outputs, 1)


def block_weights(
    q: Float[Tensor, "B 1 H K"],
    keys: Keys,
    summaries: Float[Tensor, "B G Z K"],
    start: Int[Tensor, " B"],
    frequencies: Float[Tensor, " R"],
    rule: BlockRule,
) -> Float[Tensor, "B H S"]:
    """What the softmax of `block_softmax` gives to each key, float32; arguments likewise.

    Reads the keys of what is seen, and no others.
    """
    (B, _, H, K), (_, G, S, _) = q.shape, keys.k.shape
    weights = torch.zeros(B, G, H // G, S, device=q.device)
    seen = _seen_by_one(q, keys, summaries, start, frequencies, rule).cpu()
    for row, group in product(range(B), range(G)):
        position = int(start[row])
        blocks = seen[row, group, : position // rule.block_tokens + 1].nonzero()[:, 0]
        slots = blocks[:, None] * rule.block_tokens + torch.arange(rule.block_tokens)
        there = slots.to(q.device)
        k = keys.k[row, group, there].float()  # N M K
        if keys.k_scale is not None:
            k = k * keys.k_scale[row, group, there][..., None]
        query = q[row, 0].view(G, H // G, K)[group].float().expand(1, len(blocks), -1, -1)
        tables = rotary_tables(rule.distances(position, blocks)[None], frequencies)
        turned = rotate_definition(query, *(x.to(q.device) for x in tables))[0]
        scores = torch.einsum("nhk,nmk->hnm", turned, k) * K**-0.5
        scores = scores.masked_fill((slots > position).to(q.device), -torch.inf)
        weights[row, group][:, there.flatten()] = scores.flatten(1).softmax(-1)
    return weights.flatten(1, 2)


def _seen_by_one(
    q: Tensor, keys: Keys, summaries: Tensor, start: Tensor, frequencies: Tensor, rule: BlockRule
) -> Tensor:
    """Blocks (B, G, N) that one token sees in each group."""
    blocks = keys.k.shape[2] // rule.block_tokens
    exact = () if keys.k_scale is not None else keys[:2]
    if backends.choose("blocks", q, summaries, *exact) is None:
        means = rows_of(summaries, blocks, frequencies, rule.block_tokens)
        return choose_blocks(q.float(), means, start[:, None], frequencies, rule).squeeze(2)
    known = Known.empty(q, keys, rule.block_tokens)
    _forward(q, keys, summaries, start, frequencies, rule, known)
    block, near = torch.arange(blocks), rule.first_near(start)[:, None]
    always = (block >= near) | (block < rule.sink_blocks)
    always |= near - rule.sink_blocks <= rule.top_blocks  # then all are seen, and none is noted
    bits = (known.chosen[:, :, 0, :, None] >> torch.arange(64)) & 1
    return bits.bool().flatten(2)[..., :blocks] | always[:, None]


def _held(k: Tensor, summaries: Tensor, frequencies: Tensor, rule: BlockRule) -> tuple[Rows, Rows]:
    blocks = k.shape[2] // rule.block_tokens
    rows, means = (rows_of(x, blocks, frequencies, rule.block_tokens) for x in (k, summaries))
    return rows, means


def _weights(
    q: Tensor,
    held: tuple[Rows, Rows],
    positions: Tensor,
    frequencies: Tensor,
    rule: BlockRule,
) -> Tensor:
    """Softmax weights (B, G, H/G, T, S) of float32 queries at ``positions`` (B, T)."""
    rows, means = held
    slots = torch.arange(rows.blocks * rule.block_tokens).view(rows.blocks, -1)
    seen = choose_blocks(q, means, positions, frequencies, rule)
    scores = scores_of(q, rows, positions, frequencies, rule, torch.float32)  # B G H/G T N M
    past = (slots <= positions[:, :, None, None]).to(q.device)
    scores = scores.masked_fill(~(seen[..., None] & past[:, None])[:, :, None], -torch.inf)
    return scores.flatten(4).softmax(-1)
