"""The gated delta rule: the definition, the chunked form, and one step.

As gated linear attention with one decay per KV group, but a token does not add its value under
its key: it replaces, in the share beta, what the state answers to that key.

Letters: B batch, T tokens, H query heads, G key/value heads, K key dim, V value dim, C tokens of a
chunk, N chunks, M = B * G * N, R = H / G query heads of a group; head h belongs to group h // R.
Source: Yang et al., arXiv:2412.06464 (Gated DeltaNet); chunks: arXiv:2406.06484.
"""

from functools import partial

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import silu

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


def unit(z: Float[Tensor, "*rows K"], eps: float = 1e-6) -> Float32[Tensor, "*rows K"]:
    """Scaled to length 1, ``z / sqrt(sum(z^2) + eps)``, in float32.

    The result stays float32: rounded, the keys would not have length 1.

    Args:
        z: Queries or keys, one head a row.
        eps: Added to the squared length, so that a row of zeros stays zero.
    """
    z = z.float()
    return z * torch.rsqrt(z.square().sum(-1, keepdim=True) + eps)


def unit_silu(x: Float[Tensor, "*rows K"], eps: float = 1e-6) -> Float32[Tensor, "*rows K"]:
    """`unit` of SiLU: what the rule's keys and queries are made of."""
    return unit(silu(x.float()), eps)


def delta_definition(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    beta: Float[Tensor, "B T G"],
    log_decay: Float[Tensor, "B T G"],
    state: Float32[Tensor, "B G K V"],
    scale: float | None = None,
) -> tuple[Float32[Tensor, "B T H V"], Float32[Tensor, "B G K V"]]:
    """The recurrence written out in float32: the definition.

    For head h of group g, token by token::

        S'  = exp(log_decay_t) S_{t-1}
        S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T
        o_t = scale * q_t^T S_t

    A token with k, beta and log_decay of 0 leaves the state exactly as it was.

    Args:
        q: Queries. Query head h belongs to KV group h // (H / G).
        k: Keys, of length at most 1 (`unit_silu`): longer ones can make the state grow for ever.
        v: Values.
        beta: Share of the old value that is replaced, 0 to 2.
        log_decay: At most 0; -inf forgets everything.
        state: The state before the first token.
        scale: Factor on the outputs. None means ``K ** -0.5``.

    Returns:
        The outputs and the state after the last token.
    """
    (B, T, H, K), G = q.shape, k.shape[2]
    scale = default_scale(scale, K)
    q32 = q.float().reshape(B, T, G, H // G, K)
    k32, v32, beta32, decay = k.float(), v.float(), beta.float(), log_decay.float().exp()
    outs = [state.new_zeros(B, 0, H, v.shape[-1])]
    for t in range(T):
        state = decay[:, t, :, None, None] * state
        answer = torch.einsum("bgk,bgkv->bgv", k32[:, t], state)
        change = beta32[:, t, :, None] * (v32[:, t] - answer)
        state = state + torch.einsum("bgk,bgv->bgkv", k32[:, t], change)
        out = scale * torch.einsum("bgrk,bgkv->bgrv", q32[:, t], state)
        outs.append(out.reshape(B, 1, H, v.shape[-1]))
    return torch.cat(outs, dim=1), state


def delta_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 G K"],
    v: Float[Tensor, "B 1 G V"],
    beta: Float[Tensor, "B 1 G"],
    log_decay: Float[Tensor, "B 1 G"],
    state: Float32[Tensor, "B G K V"],
    scale: float | None = None,
) -> tuple[Float32[Tensor, "B 1 H V"], Float32[Tensor, "B G K V"]]:
    """`delta_definition` for one token."""
    key = k[:, 0, :, None].float()
    decayed = state * log_decay[:, 0, :, None, None].float().exp()
    change = beta[:, 0, :, None, None].float() * (v[:, 0, :, None].float() - key @ decayed)
    state = decayed + key.transpose(2, 3) * change
    return read_state(q, state, default_scale(scale, q.shape[-1])), state


def delta(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    beta: Float[Tensor, "B T G"],
    log_decay: Float[Tensor, "B T G"],
    state: Float32[Tensor, "B G K V"],
    *,
    scale: float | None = None,
    chunk_tokens: int = 32,
) -> tuple[Float32[Tensor, "B T H V"], Float32[Tensor, "B G K V"]]:
    """`delta_definition` by the fastest implementation that can run here.

    Natively, or in chunks by torch, or by `delta_step` for one token. Safe and accurate at any
    decay, as `respike.ops.gla.gla` is, and its gradients are made likewise. ``state`` is not
    written to.

    Args:
        q: As for `delta_definition`, and so are k, v, beta, log_decay, state and scale.
        k: Keys.
        v: Values.
        beta: Share of the old value that is replaced.
        log_decay: One per KV group.
        state: The state before the first token.
        scale: Factor on the outputs.
        chunk_tokens: Tokens of a chunk of torch's; changes speed and rounding only.

    Raises:
        ValueError: ``chunk_tokens`` is not positive.
    """
    check_chunk(chunk_tokens)
    scale = default_scale(scale, q.shape[-1])
    same = one_dtype(q, k, v)
    if q.shape[1] > chunk_tokens and backends.needs_gradient(*same, beta, log_decay, state):
        run = partial(delta, scale=scale, chunk_tokens=chunk_tokens)
        again = partial(_in_chunks, scale=scale, chunk_tokens=chunk_tokens)
        return recomputed(run, again, scale, *same, beta, log_decay, state)
    kernels = backends.choose("delta", *same, float32=(beta, log_decay, state))
    if kernels is not None:
        return _native(kernels, same, (beta, log_decay), state, scale)
    if q.shape[1] == 1:
        return delta_step(q, k, v, beta, log_decay, state, scale)
    return _in_chunks(q, k, v, beta, log_decay, state, scale=scale, chunk_tokens=chunk_tokens)


def _in_chunks(
    *tensors: Float[Tensor, "B ..."], scale: float, chunk_tokens: int
) -> tuple[Float32[Tensor, "B T H V"], Float32[Tensor, "B G K V"]]:
    """The op by torch; ``tensors`` are q, k, v, beta, log_decay and the state."""
    return in_chunks(_block, tensors[:-1], tensors[-1], scale, chunk_tokens)


def _native(
    kernels: backends.Kernels,
    qkv: tuple[Tensor, ...],
    gates: tuple[Tensor, Tensor],
    state: Float32[Tensor, "B G K V"],
    scale: float,
) -> tuple[Float32[Tensor, "B T H V"], Float32[Tensor, "B G K V"]]:
    q, k, v = qkv
    (B, T, H, K), (_, G, _, V) = q.shape, state.shape
    state = state.clone(memory_format=torch.contiguous_format)
    out = state.new_empty(B, T, H, V)
    rows = (strided_heads(q, G), *(strided(x) for x in (k, v, *(y.float() for y in gates))))
    getattr(kernels.module, f"delta_{SUFFIX[q.dtype]}")(
        kernels.level,
        torch.get_num_threads(),
        *(x.data_ptr() for x, _ in rows),
        state.data_ptr(),
        out.data_ptr(),
        [strides for _, strides in rows],
        (B, T, H, G, K, V),
        scale,
    )
    return out, state


def _block(
    q: Float32[Tensor, "M C R K"],
    k: Float32[Tensor, "M C K"],
    v: Float32[Tensor, "M C V"],
    beta: Float32[Tensor, "M C"],
    log_decay: Float32[Tensor, "M C"],
    state: Float32[Tensor, "B G K V"],
    scale: float,
) -> tuple[Float32[Tensor, "B T G R V"], Float32[Tensor, "B G K V"]]:
    """Whole chunks of every group: all of them at once, but for the way of the state.

    The changes u_i that the tokens of a chunk write depend on each other. They solve a unit
    triangular system, whose right side is linear in the state S before the chunk, so that its
    solution is U - W S with U and W for all chunks at once::

        u_i + sum_{j<i} beta_i d_ij (k_i . k_j) u_j = beta_i (v_i - d_i0 S^T k_i)

    with d_ij what is left at i of what was written at j, d_i0 of what was there at the start.
    """
    B, G, K, V = state.shape
    M, C, R, _ = q.shape
    left = decays_between(log_decay)
    since = left[:, :, :1] * log_decay[:, :1, None].exp()
    system = (k @ k.transpose(1, 2)) * left * beta[:, :, None]
    right_side = torch.cat((v, since * k), dim=2) * beta[:, :, None]
    solved = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    own, of_state = solved.reshape(B * G, -1, C, V + K).split((V, K), dim=3)
    kept = (k * left[:, -1, :, None]).reshape(B * G, -1, C, K).transpose(2, 3)
    total = log_decay.sum(1).exp().reshape(B * G, -1, 1, 1)
    before, changes = [], []
    S = state.reshape(B * G, K, V)
    each = (x.unbind(1) for x in (own, of_state, kept, total))
    for own_n, of_state_n, kept_n, total_n in zip(*each, strict=True):
        before.append(S)
        changes.append(torch.baddbmm(own_n, of_state_n, S, alpha=-1))
        S = torch.baddbmm(total_n * S, kept_n, changes[-1])
    states = torch.stack(before, dim=1).reshape(M, K, V)
    values = torch.stack(changes, dim=1).reshape(M, C, V)
    out = chunk_outputs(q * since[:, :, None], states, decayed_scores(q, k, left), values, scale)
    return out.reshape(B, G, -1, R, V).transpose(1, 2), S.reshape(B, G, K, V)
