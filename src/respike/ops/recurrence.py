"""What the recurrent ops share: the way through a sequence in chunks, decays, reading the state.

A sequence is worked through in blocks, which bounds the memory, and a block in chunks: what happens
inside the chunks is done for all of them at once, and only the state goes from chunk to chunk. A
chunk of one KV group is one matrix of a batch of M = B * G * N.

Letters: B batch, T tokens, H query heads, G key/value heads, K key dim, V value dim, C tokens of a
chunk, N chunks, R = H / G query heads of a group; head h belongs to group h // R.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from respike.ops import backends

Op = Callable[..., tuple[Tensor, Tensor]]
"""From inputs and a state to outputs and the next state."""

BLOCK_TOKENS = 512
"""Tokens worked through at once. Their intermediate results then fit a processor's cache."""

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
"""Of native kernels."""


def default_scale(scale: float | None, key_dim: int) -> float:
    """Factor on the outputs; None means ``key_dim ** -0.5``."""
    return key_dim**-0.5 if scale is None else scale


def read_state(
    q: Float[Tensor, "B 1 H K"], state: Float32[Tensor, "B G K V"], scale: float
) -> Float32[Tensor, "B 1 H V"]:
    """Outputs of one token. A group's heads are the rows of one product: its state is read once."""
    B, _, H, K = q.shape
    rows = (q.float() * scale).reshape(B, state.shape[1], -1, K)
    return (rows @ state).reshape(B, 1, H, -1)


def check_chunk(chunk_tokens: int) -> None:
    """Refuse chunks without tokens.

    Raises:
        ValueError: ``chunk_tokens`` is not positive.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected at least 1")


def one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as they are if they share a dtype, else in float32."""
    if all(x.dtype == tensors[0].dtype for x in tensors):
        return tensors
    return tuple(x.float() for x in tensors)


def strided(x: Float[Tensor, "B T G ..."]) -> tuple[Tensor, tuple[int, int, int]]:
    """The tensor with contiguous rows, copied only if it must be, and its first strides."""
    if x.ndim == 4 and x.stride(3) != 1:
        x = x.contiguous()
    return x, (x.stride(0), x.stride(1), x.stride(2))


def strided_heads(q: Float[Tensor, "B T H K"], groups: int) -> tuple[Tensor, tuple[int, int, int]]:
    """As `strided`, with a group's heads contiguous; the last stride is that of groups."""
    K = q.shape[3]
    if q.stride(3) != 1 or q.stride(2) != K:
        q = q.contiguous()
    return q, (q.stride(0), q.stride(1), q.shape[2] // groups * K)


def in_chunks(
    work: Callable[..., tuple[Tensor, Tensor]],
    tensors: Sequence[Float[Tensor, "B T ..."]],
    state: Float32[Tensor, "B G K V"],
    scale: float,
    chunk_tokens: int,
) -> tuple[Float32[Tensor, "B T H V"], Float32[Tensor, "B G K V"]]:
    """Work through a sequence in blocks of whole chunks.

    Args:
        work: Called for each block with its tensors as `to_chunks` gives them, the queries as
            ``(M, C, R, K)``, then with the state and the scale. Returns outputs of shape
            ``(B, T, G, R, V)``, T a multiple of C, and the state after the block.
        tensors: Queries of H heads first; then whatever there is for each KV group.
        state: The state before the first token.
        scale: Factor on the outputs.
        chunk_tokens: C, unless the sequence is shorter.
    """
    q, *others = tensors
    (B, T, H, K), (_, G, _, V) = q.shape, state.shape
    chunk_tokens = min(chunk_tokens, max(T, 1))
    block = max(1, BLOCK_TOKENS // chunk_tokens) * chunk_tokens
    all_tensors = (q.reshape(B, T, G, H // G, K), *others)
    outs = [state.new_zeros(B, 0, G, H // G, V)]
    # Pieces by split, not by slices: a slice's gradient is as long as the whole sequence.
    pieces = zip(*(torch.split(x, block, dim=1) for x in all_tensors), strict=True)
    for piece in pieces if T else ():
        out, state = work(*(to_chunks(x, chunk_tokens) for x in piece), state, scale)
        outs.append(out[:, : piece[0].shape[1]])
    return torch.cat(outs, dim=1).reshape(B, T, H, V), state


class _Recomputed(torch.autograd.Function):
    """An op whose intermediate results are made again for its gradients, not kept for them."""

    @staticmethod
    def forward(
        ctx: Any, run: Op, again: Op, scale: float, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.again, ctx.scale = again, scale
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[3:]
        exact = [x.float().contiguous() for x in (*ctx.saved_tensors, *d_outs)]
        kernels = backends.choose("recurrent_gradient", *exact)
        if kernels is not None:
            grads = _native_gradients(kernels, exact[:-2], exact[-2:], ctx.scale)
            asked_of = zip(grads, ctx.saved_tensors, wanted, strict=True)
            return None, None, None, *(g.to(x.dtype) if w else None for g, x, w in asked_of)
        leaves = [
            x.detach().requires_grad_(w) for x, w in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad():
            outs = ctx.again(*leaves)
        asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
        # The state does not depend on queries.
        made = [pair for pair in zip(outs, d_outs, strict=True) if pair[0].requires_grad]
        outs, d_outs = zip(*made, strict=True)
        found = iter(torch.autograd.grad(outs, asked, d_outs, allow_unused=True))
        return None, None, None, *(next(found) if want else None for want in wanted)


def recomputed(run: Op, again: Op, scale: float, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """``run(*tensors)``, with the gradients of ``again(*tensors)``, by a kernel if one can run.

    Memory holds the intermediate results of one call at a time, and what runs first may be what
    has no gradients of its own. Both must compute the same.

    Args:
        run: What runs first.
        again: What gradients are made of in torch.
        scale: Factor on the outputs, which both have in them.
        tensors: q, k, v, of the delta rule beta, log_decay, and the state.
    """
    return _Recomputed.apply(  # type: ignore[no-any-return, no-untyped-call]
        run, again, scale, *tensors
    )


def _native_gradients(
    kernels: backends.Kernels, given: Sequence[Tensor], d_outs: Sequence[Tensor], scale: float
) -> list[Tensor]:
    """Gradients of ``given``, the tensors of `recomputed` in float32, by the kernel."""
    q, _, _, *strength, log_decay, state = given
    (B, T, H, K), (_, G, _, V) = q.shape, state.shape
    found = [torch.empty_like(x) for x in given]
    none = [0] * (1 - len(strength))
    addresses, places = ([x.data_ptr() for x in tensors] for tensors in (given, found))
    kernels.module.recurrent_gradient_f32(
        kernels.level,
        torch.get_num_threads(),
        [*addresses[:3], *none, *addresses[3:], *(x.data_ptr() for x in d_outs)],
        [*places[:3], *none, *places[3:]],
        (B, T, H, G, K, V),
        log_decay.ndim == q.ndim and log_decay.shape[-1] == K,
        scale,
    )
    return found


def to_chunks(x: Float[Tensor, "B T G *rest"], chunk_tokens: int) -> Float32[Tensor, "M C *rest"]:
    """In float32, one row of the result for each chunk of each KV group; zeros fill the last chunk.

    A key, a value, a beta and a log-decay of zero leave the state exactly as it is.
    """
    x = x.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    missing = -x.shape[2] % chunk_tokens
    if missing:
        x = pad(x, (0, 0) * (x.ndim - 3) + (0, missing))
    return x.reshape(-1, chunk_tokens, *x.shape[3:])


def decays_between(log_decay: Float32[Tensor, "M C"]) -> Float32[Tensor, "M C C"]:
    """What is left at token i of what was written at token j: ``exp(sum of j+1 .. i)``; 0 if j > i.

    Every sum is formed by itself. As differences of running sums they would lose the small decays
    that follow a large one, and turn -inf into NaN.
    """
    tokens = log_decay.shape[1]
    after = torch.ones(tokens, tokens, dtype=torch.bool, device=log_decay.device).tril(-1)
    sums = torch.where(after, log_decay[:, :, None], 0.0).cumsum(1)
    return sums.exp().tril()


def decayed_scores(
    q: Float32[Tensor, "M C R K"], k: Float32[Tensor, "M C K"], left: Float32[Tensor, "M C C"]
) -> Float32[Tensor, "M CR C"]:
    """Query times key, times what is ``left`` (from `decays_between`) of that key's value."""
    M, C, R, K = q.shape
    scores = (q.reshape(M, C * R, K) @ k.transpose(1, 2)).reshape(M, C, R, C)
    return (scores * left[:, :, None]).reshape(M, C * R, C)


def chunk_outputs(
    q: Float32[Tensor, "M C R K"],
    states: Float32[Tensor, "M K V"],
    weights: Float32[Tensor, "M CR C"],
    values: Float32[Tensor, "M C V"],
    scale: float,
) -> Float32[Tensor, "M CR V"]:
    """``scale * (q^T S + weights^T values)``: what came before the chunk, and what is in it.

    Args:
        q: Queries, times what is left at each token of the state before its chunk.
        states: The state before each chunk.
        weights: For every (token, head) of a chunk, the weight of each value of the chunk.
        values: What was written.
        scale: Factor on the outputs.
    """
    M, C, R, K = q.shape
    before = q.reshape(M, C * R, K) @ states
    return before.baddbmm_(weights, values, beta=scale, alpha=scale)
