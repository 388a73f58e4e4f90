"""Gated linear attention: the definition, the chunked form, and one step.

The state is a matrix for each KV group, shared by the group's query heads. Each token lets it
decay, by one factor or by one for each key channel, and writes an outer product into it.

Letters: B batch, T tokens, H query heads, G key/value heads, K key dim, V value dim, C tokens of a
chunk, N chunks, M = B * G * N, R = H / G query heads of a group; head h belongs to group h // R.
Source: Yang et al., arXiv:2312.06635 (GLA); Qin et al., arXiv:2404.07904 (HGRN2), Chou et al.,
arXiv:2411.10741 (MetaLA) and the SpikingBrain report, arXiv:2509.05276, for the tied gate.
"""

from functools import partial

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from respike.ops import backends
from respike.ops.recurrence import (
    SUFFIX,
    check_chunk,
    chunk_outputs,
    decayed_scores,
    decays_between,
    default_scale,
    in_chunks,
    one_dtype,
    read_state,
    recomputed,
    strided,
    strided_heads,
)


def gla_definition(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    log_decay: Float[Tensor, "B T G #K"],
    state: Float32[Tensor, "B G K V"],
    scale: float | None = None,
) -> tuple[Float32[Tensor, "B T H V"], Float32[Tensor, "B G K V"]]:
    """The recurrence written out in float32: the definition.

    For head h of group g, token by token::

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T
        o_t = scale * q_t^T S_t

    Args:
        q: Queries. Query head h belongs to KV group h // (H / G).
        k: Keys.
        v: Values.
        log_decay: At most 0, for each key channel or one for all of them; -inf forgets everything.
        state: The state before the first token.
        scale: Factor on the outputs. None means ``K ** -0.5``.

    Returns:
        The outputs and the state after the last token.
    """
    (B, T, H, K), G = q.shape, k.shape[2]
    scale = default_scale(scale, K)
    q32 = q.float().reshape(B, T, G, H // G, K)
    k32, v32, decay = k.float(), v.float(), log_decay.float().exp()
    outs = [state.new_zeros(B, 0, H, v.shape[-1])]
    for t in range(T):
        state = decay[:, t, :, :, None] * state + torch.einsum(
            "bgk,bgv->bgkv", k32[:, t], v32[:, t]
        )
        out = scale * torch.einsum("bgrk,bgkv->bgrv", q32[:, t], state)
        outs.append(out.reshape(B, 1, H, v.shape[-1]))
    return torch.cat(outs, dim=1), state


def gla_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 G K"],
    v: Float[Tensor, "B 1 G V"],
    log_decay: Float[Tensor, "B 1 G #K"],
    state: Float32[Tensor, "B G K V"],
    scale: float | None = None,
) -> tuple[Float32[Tensor, "B 1 H V"], Float32[Tensor, "B G K V"]]:
    """`gla_definition` for one token."""
    decay = log_decay[:, 0, :, :, None].float().exp()
    written = k[:, 0, :, :, None].float() * v[:, 0, :, None].float()
    state = torch.addcmul(written, decay, state)
    return read_state(q, state, default_scale(scale, q.shape[-1])), state


def gla(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    log_decay: Float[Tensor, "B T G #K"],
    state: Float32[Tensor, "B G K V"],
    *,
    scale: float | None = None,
    chunk_tokens: int = 32,
) -> tuple[Float32[Tensor, "B T H V"], Float32[Tensor, "B G K V"]]:
    """`gla_definition` by the fastest implementation that can run here.

    Natively, or in chunks by torch, or by `gla_step` for one token. Safe and accurate at any decay:
    every factor is the exponential of a sum of log-decays, or a product of such, and at most 1;
    differences of sums are never formed. ``state`` is not written to. For gradients the chunks are
    made again, so nothing but the inputs is kept for them.

    Args:
        q: As for `gla_definition`, and so are k, v, log_decay, state and scale.
        k: Keys.
        v: Values.
        log_decay: For each key channel, or one for all of them, which is cheaper.
        state: The state before the first token.
        scale: Factor on the outputs.
        chunk_tokens: Tokens of a chunk of torch's; changes speed and rounding only.

    Raises:
        ValueError: ``chunk_tokens`` is not positive.
    """
    check_chunk(chunk_tokens)
    scale = default_scale(scale, q.shape[-1])
    same = one_dtype(q, k, v)
    if q.shape[1] > chunk_tokens and backends.needs_gradient(*same, log_decay, state):
        run = partial(gla, scale=scale, chunk_tokens=chunk_tokens)
        again = partial(_in_chunks, scale=scale, chunk_tokens=chunk_tokens)
        return recomputed(run, again, scale, *same, log_decay, state)
    kernels = backends.choose("gla", *same, float32=(log_decay, state))
    if kernels is not None:
        return _native(kernels, same, log_decay, state, scale)
    if q.shape[1] == 1:
        return gla_step(q, k, v, log_decay, state, scale)
    return _in_chunks(q, k, v, log_decay, state, scale=scale, chunk_tokens=chunk_tokens)


def _in_chunks(
    *tensors: Float[Tensor, "B ..."], scale: float, chunk_tokens: int
) -> tuple[Float32[Tensor, "B T H V"], Float32[Tensor, "B G K V"]]:
    """The op by torch; ``tensors`` are q, k, v, log_decay and the state."""
    return in_chunks(_block, tensors[:-1], tensors[-1], scale, chunk_tokens)


def _native(
    kernels: backends.Kernels,
    qkv: tuple[Tensor, ...],
    log_decay: Float[Tensor, "B T G #K"],
    state: Float32[Tensor, "B G K V"],
    scale: float,
) -> tuple[Float32[Tensor, "B T H V"], Float32[Tensor, "B G K V"]]:
    q, k, v = qkv
    (B, T, H, K), (_, G, _, V) = q.shape, state.shape
    state = state.clone(memory_format=torch.contiguous_format)
    out = state.new_empty(B, T, H, V)
    rows = (strided_heads(q, G), *(strided(x) for x in (k, v, log_decay.float())))
    getattr(kernels.module, f"gla_{SUFFIX[q.dtype]}")(
        kernels.level,
        torch.get_num_threads(),
        *(x.data_ptr() for x, _ in rows),
        state.data_ptr(),
        out.data_ptr(),
        [strides for _, strides in rows],
        (B, T, H, G, K, V),
        log_decay.shape[-1] == K,
        scale,
    )
    return out, state


def _block(
    q: Float32[Tensor, "M C R K"],
    k: Float32[Tensor, "M C K"],
    v: Float32[Tensor, "M C V"],
    log_decay: Float32[Tensor, "M C #K"],
    state: Float32[Tensor, "B G K V"],
    scale: float,
) -> tuple[Float32[Tensor, "B T G R V"], Float32[Tensor, "B G K V"]]:
    """Whole chunks of every group: all of them at once, but for the way of the state."""
    B, G, K, V = state.shape
    M, _, R, _ = q.shape
    inside = _one_decay if log_decay.shape[-1] == 1 else _per_channel
    weights, since, kept = inside(q, k, log_decay)
    total = log_decay.sum(1).exp().reshape(B, G, -1, log_decay.shape[-1], 1)
    written = (kept.transpose(1, 2) @ v).reshape(B, G, -1, K, V)
    before = []
    for increment, decay in zip(written.unbind(2), total.unbind(2), strict=True):
        before.append(state)
        state = torch.addcmul(increment, decay, state)
    states = torch.stack(before, dim=2).reshape(M, K, V)
    out = chunk_outputs(q * since[:, :, None], states, weights, v, scale)
    return out.reshape(B, G, -1, R, V).transpose(1, 2), state


def _one_decay(
    q: Float32[Tensor, "M C R K"], k: Float32[Tensor, "M C K"], log_decay: Float32[Tensor, "M C 1"]
) -> tuple[Float32[Tensor, "M CR C"], Float32[Tensor, "M C 1"], Float32[Tensor, "M C K"]]:
    """As `_per_channel`, with one decay for all channels: it can wait until after the product."""
    left = decays_between(log_decay[:, :, 0])
    since = left[:, :, :1] * log_decay[:, :1].exp()
    return decayed_scores(q, k, left), since, k * left[:, -1, :, None]


def _per_channel(
    q: Float32[Tensor, "M C R K"], k: Float32[Tensor, "M C K"], log_decay: Float32[Tensor, "M C K"]
) -> tuple[Float32[Tensor, "M CR C"], Float32[Tensor, "M C K"], Float32[Tensor, "M C K"]]:
    """What happens inside a chunk; neighbouring pieces of it are joined until one is left.

    Of two pieces of b tokens the right one sees the left one by a product of matrices, its queries
    times what is left since its start and the other's keys times what is left at its end. Both
    factors are at most 1, and each is at least their product: whatever underflows may be 0.

    Returns:
        The weight of every token's value in the output of every (token, head); what is left, at
        each token, of the state at the start; the keys times what is left of them at the end.
    """
    M, C, R, K = q.shape
    missing = (1 << (C - 1).bit_length()) - C
    if missing:
        q, k = pad(q, (0, 0, 0, 0, 0, missing)), pad(k, (0, 0, 0, missing))
        log_decay = pad(log_decay, (0, 0, 0, missing))
    since = total = log_decay.exp()
    kept = k
    weights = q.reshape(-1, R, K) @ k.reshape(-1, K, 1)
    b = 1
    while b < C:
        queries, keys = q.reshape(-1, 2, b, R, K)[:, 1], kept.reshape(-1, 2, b, K)
        since, total = since.reshape(-1, 2, b, K), total.reshape(-1, 2, K)
        queries = (queries * since[:, 1, :, None]).reshape(-1, b * R, K)
        cross = queries @ keys[:, 0].transpose(1, 2)
        left, right = weights.reshape(-1, 2, b * R, b).unbind(1)
        weights = torch.cat((pad(left, (0, b)), torch.cat((cross, right), dim=2)), dim=1)
        ones = torch.ones_like(total[:, 0])
        since = since * torch.stack((ones, total[:, 0]), dim=1)[:, :, None]
        kept = keys * torch.stack((total[:, 1], ones), dim=1)[:, :, None]
        total = total[:, 0] * total[:, 1]
        b *= 2
    weights = weights.reshape(M, b * R, b)[:, : C * R, :C]
    return weights, since.reshape(M, b, K)[:, :C], kept.reshape(M, b, K)[:, :C]


def tied_gate(
    x: Float[Tensor, "*rest"],
) -> tuple[Float32[Tensor, "*rest"], Float32[Tensor, "*rest"]]:
    """Key and decay from one projection: ``k = sigmoid(x)``, ``exp(log_decay) = 1 - k``.

    Exact at large x, where 1 - k rounds to 0.

    Returns:
        The key, and its log-decay ``log(1 - k)``; float32.
    """
    x = x.float()
    return x.sigmoid(), logsigmoid(-x)
