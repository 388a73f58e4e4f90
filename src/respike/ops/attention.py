"""Softmax attention over any set of visible keys; the definition and the form that runs.

Which keys a query may see is decided by `visible`, the only place where the window is defined:
a query at position p sees position j <= p if j is one of the sinks (j < sink_tokens) or lies in
the sliding window of ``window_tokens`` tokens that ends with p itself (p - j < window_tokens).
Learned sinks, the first ``learned_sinks`` positions, also see each other's future.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim.
Source: Vaswani et al., arXiv:1706.03762; sinks: Xiao et al., arXiv:2309.17453.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from respike.ops.backends import needs_gradient


def visible(
    query_positions: Int[Tensor, "B T"],
    key_positions: Int[Tensor, "B S"],
    window_tokens: int | None = None,
    sink_tokens: int = 0,
    learned_sinks: int = 0,
) -> Bool[Tensor, "B T S"]:
    """Which key each query may see; a negative key position marks an empty slot.

    Args:
        query_positions: Absolute positions, 0 for the first token of a sequence.
        key_positions: Likewise; -1 where nothing is stored.
        window_tokens: Length of the sliding window, self included. None sees everything before.
        sink_tokens: The first tokens of the sequence that stay visible.
        learned_sinks: The first positions, which see each other whatever their order.
    """
    p, j = query_positions[:, :, None], key_positions[:, None, :]
    seen = (j >= 0) & (j <= p)
    if window_tokens is not None:
        seen &= (p - j < window_tokens) | (j < sink_tokens)
    if learned_sinks:
        seen |= (j >= 0) & (j < learned_sinks) & (p < learned_sinks)
    return seen


def attention_definition(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    seen: Bool[Tensor, "B T S"],
) -> Float[Tensor, "B T H V"]:
    """Softmax attention written out in float32: the definition.

    For head h of group g and a query at t::

        o_t = sum_s softmax_s(q_t . k_s / sqrt(K), over s with seen[t, s]) v_s

    Args:
        q: Queries, rotated. Query head h belongs to KV group h // (H / G).
        k: Keys, rotated.
        v: Values.
        seen: Which keys count; every query must see at least one.
    """
    heads_per_group = q.shape[2] // k.shape[2]
    k32 = k.float().repeat_interleave(heads_per_group, dim=2)
    v32 = v.float().repeat_interleave(heads_per_group, dim=2)
    scores = torch.einsum("bthk,bshk->bhts", q.float(), k32) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhts,bshv->bthv", weights, v32).to(v.dtype)


def attention_bias(seen: Bool[Tensor, "B T S"], dtype: torch.dtype) -> Float[Tensor, "B 1 T S"]:
    """``seen`` as the additive mask `attend` takes: 0 where visible, -inf elsewhere."""
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return bias.masked_fill_(~seen, -torch.inf)[:, None]


def attend(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S V"],
    bias: Float[Tensor, "B 1 T S"] | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "B T H V"]:
    """`attention_definition` by torch's fused kernel, keys and values laid out as caches hold them.

    Args:
        q: Queries, rotated.
        k: Keys, rotated, key/value head first.
        v: Values, likewise.
        bias: From `attention_bias`. None sees every key, or the causal ones.
        causal: Queries and keys are the same tokens and query t sees keys 0..t.
        scale: Factor on the scores. None means ``K ** -0.5``.
    """
    B, T, H, K = q.shape
    if T == 1:
        # One query: the heads of a group become the rows of one product, so that a key is read
        # once a group and not once a head.
        rows = q.reshape(B, k.shape[1], -1, K)
        out = scaled_dot_product_attention(rows, k, v, attn_mask=bias, scale=scale)
        return out.reshape(B, 1, H, -1)
    out = scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=bias, is_causal=causal, scale=scale,
        enable_gqa=k.shape[1] != H,
    )  # fmt: skip
    return out.transpose(1, 2)


def attend_with_mass(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S V"],
    bias: Float[Tensor, "B 1 T S"] | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """`attend`, bit for bit, and the logarithm of its softmax's denominator, float32.

    The latter is what another branch needs to share that denominator. Arguments as for `attend`;
    where gradients are needed, `respike.ops.softmax.window_softmax` gives both.
    """
    differentiable = needs_gradient(q, k, v)
    if q.device.type != "cpu" or differentiable or k.shape[-1] != v.shape[-1]:
        out = attend(q, k, v, bias, causal=causal, scale=scale)
        return out, log_mass(q, k, bias, causal=causal, scale=scale)
    B, T, H, K = q.shape
    rows = q.reshape(B, k.shape[1], -1, K) if T == 1 else q.transpose(1, 2)
    heads_per_group = rows.shape[1] // k.shape[1]
    # What torch's attention is made of on processors; only here does it give the mass away.
    out, mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, k.repeat_interleave(heads_per_group, 1), v.repeat_interleave(heads_per_group, 1),
        is_causal=causal, attn_mask=bias, scale=scale,
    )  # fmt: skip
    if T == 1:
        return out.reshape(B, 1, H, -1), mass.reshape(B, 1, H)
    return out.transpose(1, 2), mass.transpose(1, 2)


def log_mass(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B G S K"],
    bias: Float[Tensor, "B 1 T S"] | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "B T H"]:
    """Logarithm of the denominator of `attend`'s softmax, written out; same arguments.

    In float32, as the fused kernels are inside: scores rounded to the dtype of ``q`` would be
    wrong by more than `attend` is.
    """
    B, T, H, K = q.shape
    rows = q.view(B, T, k.shape[1], -1, K).permute(0, 2, 3, 1, 4)  # B G H/G T K
    scores = rows.flatten(2, 3).float() @ k.transpose(2, 3).float()
    scores = scores.view(*rows.shape[:4], -1)
    scores = scores * (K**-0.5 if scale is None else scale)
    if causal:
        bias = torch.full((T, T), -torch.inf, device=q.device).triu(1)
    if bias is not None:
        scores = scores + (bias if causal else bias[:, None])
    return scores.logsumexp(-1).permute(0, 3, 1, 2).reshape(B, T, H)


def last_weights(
    q: Float[Tensor, "B 1 H K"], k: Float[Tensor, "B G S K"], bias: Float[Tensor, "B 1 1 S"]
) -> Float[Tensor, "B H S"]:
    """What the softmax of `attend` gives to each key; scores are rounded to the dtype of ``q``.

    For looking at, not for computing with: float32 out, and no copy of the keys.
    """
    B, _, H, K = q.shape
    scores = q.view(B, k.shape[1], H // k.shape[1], K) @ k.transpose(2, 3)
    weights: Tensor = (scores.float() * K**-0.5 + bias.float()).softmax(-1)
    return weights.flatten(1, 2)
