"""The far memory: softmax attention to what has left the window, in a state of constant size.

A query sees sinks and window exactly. Every token that has left the window it sees through F
prototypes of keys: how much a key belongs to each (key features, positive, summing to one) is
decided when the token leaves, and how much the query likes each (``log_query``) stands in for the
score. All tokens share one denominator, so the memory counts for little when the window holds a
strong match, as far tokens do in softmax.

Letters: B batch, T tokens, H query heads, G KV groups, F prototypes, K key dim, V value dim.
Source: our own. The shared denominator: LoLCATs, arXiv:2410.10254; prototypes as an expansion of
the exponential kernel around cluster centres: the fast Gauss transform (Greengard & Strain, 1991).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from respike.ops import backends
from respike.ops.attention import visible
from respike.ops.gla import gla
from respike.ops.recurrence import SUFFIX, strided, strided_heads


class Prototypes(NamedTuple):
    """What a far memory has learnt.

    Attributes:
        key_weight: (G, F, K); ``phi = softmax(key_weight k + key_bias)``.
        key_bias: (G, F).
        query_weight: (H, F, K); ``log_query = query_weight q + beta``.
        beta: (H); -inf shuts a head.
        log_decay: (G), of each step beyond the window.
    """

    key_weight: Tensor
    key_bias: Tensor
    query_weight: Tensor
    beta: Tensor
    log_decay: Tensor

    def log_query(self, q: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H F"]:
        """How much queries, not rotated, like each prototype."""
        likes = torch.einsum("bthk,hfk->bthf", q.float(), self.query_weight.float())
        return likes + self.beta.float()[:, None]

    def key_features(self, k: Float[Tensor, "B T G K"]) -> Float[Tensor, "B T G F"]:
        """How much keys, not rotated, belong to each prototype."""
        scores = torch.einsum("btgk,gfk->btgf", k.float(), self.key_weight.float())
        return (scores + self.key_bias.float()).softmax(-1)


def far_definition(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    log_query: Float[Tensor, "B T H F"],
    key_features: Float[Tensor, "B T G F"],
    log_decay: Float[Tensor, " G"],
    window_tokens: int,
    sink_tokens: int,
) -> Float[Tensor, "B T H V"]:
    """One softmax over all tokens before, in which far ones have another score: the definition.

    In float32, for a sequence from its beginning; j is far when ``sink_tokens <= j <= t - W``::

        score(t, j) = q_t . k_j / sqrt(K)                                     near
        score(t, j) = log sum_f exp(log_query_tf) phi_jf + (t - W - j) log_decay    far
        o_t = sum_j softmax_j(score(t, j)) v_j

    Args:
        q: Queries, rotated. Query head h belongs to KV group h // (H / G).
        k: Keys, rotated.
        v: Values.
        log_query: How much a query likes each prototype; -inf everywhere shuts the memory.
        key_features: phi, how much each key belongs to each prototype, >= 0.
        log_decay: Of the memory, for each step beyond the window, <= 0.
        window_tokens: W, self included.
        sink_tokens: First tokens, which never become far.
    """
    heads_per_group = q.shape[2] // k.shape[2]
    k32, v32, phi, decay = (
        x.float().repeat_interleave(heads_per_group, dim=-2)
        for x in (k, v, key_features, log_decay[:, None])
    )
    near_scores = torch.einsum("bthk,bshk->bhts", q.float(), k32) * q.shape[-1] ** -0.5
    far_scores = torch.logsumexp(
        log_query.float()[:, :, None] + phi.log()[:, None], dim=-1
    ).permute(0, 3, 1, 2)
    t = torch.arange(q.shape[1])
    steps = t[:, None] - window_tokens - t[None]
    far_scores = far_scores + steps.clamp(min=0) * decay[:, :, None]
    near = visible(t[None], t[None], window_tokens, sink_tokens)[:, None]
    seen = visible(t[None], t[None])[:, None]
    scores = torch.where(near, near_scores, far_scores).masked_fill(~seen, -torch.inf)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v32)


def far_read(
    log_query: Float[Tensor, "B T H F"],
    key_features: Float[Tensor, "B T G F"],
    v: Float[Tensor, "B T G V"],
    log_decay: Float[Tensor, "B T G 1"],
    memory: Float[Tensor, "B G F V1"],
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"], Float[Tensor, "B G F V1"]]:
    """Write each step's key and value to the memory, then read it: mean value, mass, next memory.

    Args:
        log_query: As in `far_definition`; of the token of the step.
        key_features: Of the token that leaves the window at the step; zeros write nothing.
        v: Its value.
        log_decay: Applied before the step's write.
        memory: Sums of features times (value, 1), float32, V1 = V + 1.

    Returns:
        The mean of all far values as the query weighs them (zeros while there is none), the
        logarithm of their weights' sum (-inf while there is none), and the memory after the span.
        Weights below e^-87 of the best prototype's count as none.
    """
    best = log_query.float().amax(-1, keepdim=True).detach()
    best = best.masked_fill(best.isinf(), 0)
    ones = v.new_ones(*v.shape[:3], 1)
    read, memory = gla(
        (log_query.float() - best).exp(),
        key_features,
        torch.cat((v, ones), -1),
        log_decay,
        memory,
        scale=1.0,
    )
    mass = read[..., -1]
    some = mass > 0
    safe = mass.where(some, 1)
    mean = (read[..., :-1] / safe[..., None]).where(some[..., None], 0)
    return mean, (safe.log() + best[..., 0]).where(some, -torch.inf), memory


def share_denominator(
    near: Float[Tensor, "B T H V"],
    near_log_mass: Float[Tensor, "B T H"],
    far: Float[Tensor, "B T H V"],
    far_log_mass: Float[Tensor, "B T H"],
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """Two averages under one denominator: the joint average, and ``far``'s share of the mass.

    A far mass of nothing (-inf) gives ``near``, bit for bit.
    """
    share = torch.sigmoid(far_log_mass - near_log_mass)
    out = torch.lerp(near.float(), far.float(), share[..., None])
    return out.to(near.dtype), share


def far(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    real: Int[Tensor, "B 2"],
    prototypes: Prototypes,
    memory: Float[Tensor, "B G F V1"],
    near: tuple[Tensor, Tensor],
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B G F V1"]]:
    """The window's average joined by all that has left it, by the fastest form that can run here.

    `far_read` of the prototypes' likes and features, then `share_denominator`: the definition is
    `far_torch`. Nothing given is written to.

    Args:
        q: Queries, not rotated.
        k: Keys of the tokens that leave the window, one a step, not rotated.
        v: Their values.
        real: For each row, on the processor: the first step at which a token leaves, and the
            first that is padding, at which the memory does not age either.
        prototypes: Of these heads and groups.
        memory: As for `far_read`.
        near: The window's output (B, T, H, V), and the logarithm of its mass (B, T, H), float32.

    Returns:
        The joint average, and the memory after the span; as a cache, it carries no gradient.
    """
    if backends.needs_gradient(memory):
        raise ValueError("the memory is a cache and has no gradient: see far_torch")
    if backends.needs_gradient(q, k, v, *near, *prototypes):
        joint, memory = _Far.apply(real, memory, q, k, v, *near, *prototypes)  # type: ignore[no-untyped-call]
        return joint, memory
    return _far(q, k, v, real, prototypes, memory, near)


class _Far(torch.autograd.Function):
    """The op with its gradients, all of which are computed anew: by a kernel, or in torch."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, memory: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, *near = leaves[:5]
        ctx.save_for_backward(real, memory, *leaves)
        joint, memory = _far(q, k, v, real, Prototypes(*leaves[5:]), memory, (near[0], near[1]))
        ctx.mark_non_differentiable(memory)
        return joint, memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_joint: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        real, memory, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        q, k, v, out, mass, *weights = saved
        kernels = backends.choose(
            "far_gradient", q, k, v, out, d_joint, float32=(mass, memory, *weights)
        )
        found: Sequence[Tensor | None]
        if kernels is None:
            found = _torch_gradients(real, memory, saved, needed, d_joint)
        else:
            found = _native_gradients(kernels, real, memory, saved, d_joint)
        return None, None, *(x if n else None for x, n in zip(found, needed, strict=True))


def _torch_gradients(
    real: Tensor, memory: Tensor, saved: Sequence[Tensor], needed: Sequence[bool], d_joint: Tensor
) -> list[Tensor | None]:
    """Gradients of ``saved`` by autograd through `far_torch`: where the kernel cannot run."""
    leaves = [x.detach().requires_grad_(n) for x, n in zip(saved, needed, strict=True)]
    q, k, v, *near = leaves[:5]
    with torch.enable_grad():
        prototypes = Prototypes(*leaves[5:])
        joint, _ = far_torch(q, k, v, real, prototypes, memory, (near[0], near[1]))
    found = iter(torch.autograd.grad(joint, [x for x in leaves if x.requires_grad], d_joint))
    return [next(found) if n else None for n in needed]


def _native_gradients(
    kernels: backends.Kernels,
    real: Tensor,
    memory: Tensor,
    saved: Sequence[Tensor],
    d_joint: Tensor,
) -> list[Tensor]:
    """Gradients of ``saved`` by the kernel."""
    q, k, v, out, mass, *weights = saved
    (B, T, H, K), (_, G, F, V1) = q.shape, memory.shape
    memory, out, d_joint = memory.contiguous(), out.contiguous(), d_joint.contiguous()
    mass32 = mass.float().contiguous()
    first, end = (x.contiguous() for x in real.long().unbind(1))
    rows = (strided_heads(q, G), strided(k), strided(v))
    own = [x.float().contiguous() for x in weights]
    # Of the prototypes, those of each sequence by itself.
    found = [x.new_empty(x.shape) for x in (q, k, v, out, mass32)]
    each = [x.new_empty(B, *x.shape) for x in own]
    getattr(kernels.module, f"far_gradient_{SUFFIX[q.dtype]}")(
        kernels.level,
        torch.get_num_threads(),
        *(x.data_ptr() for x, _ in rows),
        first.data_ptr(),
        end.data_ptr(),
        [x.data_ptr() for x in own],
        memory.data_ptr(),
        mass32.data_ptr(),
        out.data_ptr(),
        d_joint.data_ptr(),
        [x.data_ptr() for x in (*found, *each)],
        [strides for _, strides in rows],
        (B, T, H, G, K, V1 - 1),
        F,
    )
    whole = [*found, *(x.sum(0) for x in each)]
    return [x.to(like.dtype) for x, like in zip(whole, saved, strict=True)]


def _far(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor,
    prototypes: Prototypes,
    memory: Tensor,
    near: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """The op without gradients of its own."""
    out, mass = near
    kernels = backends.choose("far", q, k, v, out, float32=(mass, memory, *prototypes))
    if kernels is None:
        return far_torch(q, k, v, real, prototypes, memory, near)
    (B, T, H, K), (_, G, F, V1) = q.shape, memory.shape
    memory = memory.clone(memory_format=torch.contiguous_format)
    out = out.clone(memory_format=torch.contiguous_format)
    mass = mass.float().contiguous()
    rows = (strided_heads(q, G), strided(k), strided(v))
    first, end = (x.contiguous() for x in real.long().unbind(1))
    weights = [x.float().contiguous() for x in prototypes]
    getattr(kernels.module, f"far_{SUFFIX[q.dtype]}")(
        kernels.level,
        torch.get_num_threads(),
        *(x.data_ptr() for x, _ in rows),
        first.data_ptr(),
        end.data_ptr(),
        [x.data_ptr() for x in weights],
        memory.data_ptr(),
        mass.data_ptr(),
        out.data_ptr(),
        [strides for _, strides in rows],
        (B, T, H, G, K, V1 - 1),
        F,
    )
    return out, memory


def far_torch(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    real: Int[Tensor, "B 2"],
    prototypes: Prototypes,
    memory: Float[Tensor, "B G F V1"],
    near: tuple[Tensor, Tensor],
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B G F V1"]]:
    """`far` in torch, with gradients by autograd."""
    step = torch.arange(q.shape[1])
    ages = (step < real[:, 1:])[:, :, None, None].to(q.device)
    leaves = ages & (step >= real[:, :1])[:, :, None, None].to(q.device)
    mean, mass, memory = far_read(
        prototypes.log_query(q),
        prototypes.key_features(k) * leaves,
        v,
        prototypes.log_decay.float()[:, None] * ages,
        memory,
    )
    return share_denominator(*near, mean, mass)[0], memory
