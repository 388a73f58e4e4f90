"""Softmax attention of a cache: sinks, a run of keys, a window; exact or int8 keys.

What `respike.ops.attention` does with a mask, without one: which keys a query sees follows from
where they stand. The sinks stand at positions 0, 1, ..; the other keys without a gap from ``first``
on. A query at position p sees the sinks up to p and the keys j with p - window_tokens < j <= p.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, K key dim, V value dim.
Source: as `respike.ops.attention`; online softmax: Milakov and Gimelshein, arXiv:1805.02867; its
use block by block: Dao et al., arXiv:2205.14135.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor
from torch.autograd.function import once_differentiable

from respike.ops import backends
from respike.ops.attention import visible
from respike.ops.recurrence import SUFFIX
from respike.ops.softmax_gradient import Row, Where, torch_gradients

_NO_WINDOW = 1 << 62


class Keys(NamedTuple):
    """Keys and values as caches hold them, key/value head first."""

    k: Tensor
    """(B, G, S, K), rotated; int8 if there are scales."""
    v: Tensor
    """(B, G, S, V), likewise."""
    k_scale: Tensor | None = None
    """What each row of k is multiplied by, float32 (B, G, S)."""
    v_scale: Tensor | None = None
    """What each row of v is multiplied by, likewise."""

    def exact(self) -> tuple[Tensor, Tensor]:
        """Keys and values in float32."""
        if self.k_scale is None or self.v_scale is None:
            return self.k.float(), self.v.float()
        return dequantise_rows(self.k, self.k_scale), dequantise_rows(self.v, self.v_scale)


def quantise_rows(
    x: Float[Tensor, "*rows K"],
) -> tuple[Int8[Tensor, "*rows K"], Float32[Tensor, "*rows"]]:
    """Each row as integers of -127 to 127 and one scale, its largest magnitude over 127.

    A row that is not finite comes back as NaN from `dequantise_rows`.
    """
    scale = x.float().abs().amax(-1) / 127
    step = scale[..., None]
    integers = torch.where(step > 0, x.float() / step, 0.0).round()
    return integers.nan_to_num(0.0).clamp(-127, 127).to(torch.int8), scale


def dequantise_rows(
    integers: Int8[Tensor, "*rows K"], scale: Float32[Tensor, "*rows"]
) -> Float32[Tensor, "*rows K"]:
    """What `quantise_rows` stands for."""
    return integers.float() * scale[..., None]


def window_softmax_definition(
    q: Float[Tensor, "B T H K"],
    keys: Keys,
    sinks: Keys | None = None,
    *,
    q_sink: Float[Tensor, "B T H K"] | None = None,
    first: int = 0,
    start: int = 0,
    window_tokens: int | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float32[Tensor, "B T H"]]:
    """Softmax over the sinks and the window, written out in float32: the definition.

    Args:
        q: Queries, rotated. Query head h belongs to KV group h // (H / G).
        keys: The key at index i stands at position ``first + i``; none of them is a sink.
        sinks: The first tokens of the sequence. None: there are none.
        q_sink: Queries as sinks are to see them, if not as ``q``.
        first: Position of the first key.
        start: Position of the first query; the others follow it.
        window_tokens: Length of the window, self included. None sees everything before.
        scale: Factor on the scores. None means ``K ** -0.5``.

    Returns:
        The outputs, and the logarithm of the softmax's denominator.
    """
    B, T, _, K = q.shape
    positions = (start + torch.arange(T)).expand(B, T)
    scores, values = [], []
    for part, query, begin, window in (
        (sinks, q if q_sink is None else q_sink, 0, None),
        (keys, q, first, window_tokens),
    ):
        if part is None:
            continue
        k, v = part.exact()
        stand = (begin + torch.arange(k.shape[2])).expand(B, -1)
        seen = visible(positions, stand, window).to(q.device)
        rows = query.float().reshape(B, T, k.shape[1], -1, K)
        products = torch.einsum("btgrk,bgsk->btgrs", rows, k)
        products = products * (K**-0.5 if scale is None else scale)
        scores.append(products.masked_fill(~seen[:, :, None, None], -torch.inf))
        values.append(v)
    both = torch.cat(scores, -1)
    out = torch.einsum("btgrs,bgsv->btgrv", both.softmax(-1), torch.cat(values, 2))
    return out.flatten(2, 3).to(q.dtype), both.logsumexp(-1).flatten(2, 3)


def window_softmax(
    q: Float[Tensor, "B T H K"],
    keys: Keys,
    sinks: Keys | None = None,
    *,
    q_sink: Float[Tensor, "B T H K"] | None = None,
    first: int = 0,
    start: int = 0,
    window_tokens: int | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float32[Tensor, "B T H"]]:
    """Softmax over the sinks and the window by the fastest implementation that can run here.

    Same arguments and results as `window_softmax_definition`. The bits do not depend on the number
    of threads. Gradients of exact keys are written out, once, in bounded memory.

    Raises:
        ValueError: The tensors do not fit together, or a query sees no key.
    """
    q_sink = q if q_sink is None else q_sink
    parts = [keys] if sinks is None else [keys, sinks]
    for part in parts:
        _check(q, part, keys)
    _check_seen(q.shape[1], keys, sinks, first, start, window_tokens)
    where = Where(first, start, window_tokens, q.shape[3] ** -0.5 if scale is None else scale)
    exact = [x for part in parts for x in (part.k, part.v) if part.k_scale is None]
    if exact and backends.needs_gradient(q, q_sink, *exact):
        out, mass = _WindowSoftmax.apply(where, q, q_sink, *exact)  # type: ignore[no-untyped-call]
        return out, mass
    return _forward(q, q_sink, keys, sinks, where)


class _WindowSoftmax(torch.autograd.Function):
    """The op with its gradients, for exact keys: k, v, and then those of sinks if there are any."""

    @staticmethod
    def forward(
        ctx: Any, where: Where, q: Tensor, q_sink: Tensor, *exact: Tensor
    ) -> tuple[Tensor, Tensor]:
        sinks = Keys(*exact[2:]) if exact[2:] else None
        out, mass = _forward(q, q_sink, Keys(*exact[:2]), sinks, where)
        ctx.where, ctx.same = where, q_sink is q
        ctx.save_for_backward(q, q_sink, *exact, out, mass)
        return out, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_mass: Tensor) -> tuple[Tensor | None, ...]:
        q, q_sink, *exact, out, mass = ctx.saved_tensors
        row = Row(q, q if ctx.same else q_sink, out, mass, d_out, d_mass)
        kernels = backends.choose("softmax_gradient", q, q_sink, *exact, out, d_out)
        if kernels is None:
            return None, *torch_gradients(row, exact, ctx.where)
        return None, *_native_gradients(kernels, row, exact, ctx.where)


def _native_gradients(
    kernels: backends.Kernels, row: Row, exact: list[Tensor], where: Where
) -> tuple[Tensor | None, ...]:
    """As `torch_gradients`, by the kernel."""
    (B, T, H, K), (_, G, _, V) = row.q.shape, exact[1].shape
    q, same = row.q.contiguous(), row.q_sink is row.q or not exact[2:]
    q_sink = q if same else row.q_sink.contiguous()
    saved = [row.out.contiguous(), row.mass.contiguous()]
    given = [row.d_out.contiguous(), row.d_mass.float().contiguous()]
    parts = [_in_rows(Keys(*exact[i : i + 2])) for i in range(0, len(exact), 2)]
    d_q, d_q_sink = torch.empty_like(q), None if same else torch.empty_like(q)
    d_parts = [x.new_empty(x.shape) for x in exact]
    found = [d_q, d_q_sink, *d_parts, *[None] * (4 - len(d_parts))]
    window = _NO_WINDOW if where.window_tokens is None else where.window_tokens
    getattr(kernels.module, f"softmax_gradient_{SUFFIX[q.dtype]}")(
        kernels.level,
        torch.get_num_threads(),
        [x.data_ptr() for x in (q, q_sink, *saved, *given)],
        cache_of(parts[0]),
        cache_of(parts[1]) if parts[1:] else [0] * 13,
        [0 if x is None else x.data_ptr() for x in found],
        (B, G, T, H // G, K, V),
        where.first,
        where.start,
        window,
        where.scale,
    )
    return d_q, d_q_sink, *d_parts


def _forward(
    q: Tensor, q_sink: Tensor, keys: Keys, sinks: Keys | None, where: Where
) -> tuple[Tensor, Tensor]:
    """The op without gradients of its own."""
    parts = [keys] if sinks is None else [keys, sinks]
    exact = [x for part in parts for x in (part.k, part.v) if part.k_scale is None]
    kernels = backends.choose("softmax", q, q_sink, *exact)
    if kernels is None:
        return window_softmax_definition(q, keys, sinks, q_sink=q_sink, **where._asdict())
    window = _NO_WINDOW if where.window_tokens is None else where.window_tokens
    return _run(kernels, q, q_sink, keys, sinks, (where.first, where.start, window, where.scale))


def _run(
    kernels: backends.Kernels,
    q: Tensor,
    q_sink: Tensor,
    keys: Keys,
    sinks: Keys | None,
    where: tuple[int, int, int, float],
) -> tuple[Tensor, Tensor]:
    """The kernel; ``where`` is first, start, window, scale."""
    B, T, H, K = q.shape
    G, V = keys.v.shape[1], keys.v.shape[3]
    q, q_sink = q.contiguous(), (q if q_sink is q else q_sink).contiguous()
    keys, sinks = _in_rows(keys), None if sinks is None else _in_rows(sinks)
    out, mass = q.new_empty(B, T, H, V), q.new_empty(B, T, H, dtype=torch.float32)
    getattr(kernels.module, f"softmax_{SUFFIX[q.dtype]}")(
        keys.k_scale is not None,
        kernels.level,
        torch.get_num_threads(),
        q.data_ptr(),
        q_sink.data_ptr(),
        cache_of(keys),
        [0] * 13 if sinks is None else cache_of(sinks),
        out.data_ptr(),
        mass.data_ptr(),
        (B, G, T, H // G, K, V),
        *where,
    )
    return out, mass


def _check(q: Tensor, part: Keys, like: Keys) -> None:
    """That keys fit queries, and sinks the other keys."""
    (B, _, H, K), (_, G, S, V) = q.shape, part.v.shape
    fits = part.k.shape == (B, G, S, K) and part.v.shape == (B, like.v.shape[1], S, V)
    if not fits or H % G or like.v.shape[3] != V:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, part.k, part.v))
        raise ValueError(f"queries, keys and values of shapes {shapes} do not fit together")
    scales = (part.k_scale, part.v_scale)
    int8 = part.k.dtype == part.v.dtype == torch.int8
    scaled = [s is not None and s.shape == (B, G, S) and s.dtype == torch.float32 for s in scales]
    if (like.k.dtype == torch.int8) != int8 or not (
        all(scaled) if int8 else scales == (None, None)
    ):
        raise ValueError(
            "int8 keys and values need float32 scales (B, G, S), others must have none"
        )
    if any(x is not None and x.device != q.device for x in part):
        raise ValueError(f"queries are on {q.device}, keys, values or their scales are not")


def _check_seen(
    tokens: int, keys: Keys, sinks: Keys | None, first: int, start: int, window_tokens: int | None
) -> None:
    """That every query sees a key."""
    if window_tokens is not None and window_tokens < 1:
        raise ValueError(f"window_tokens is {window_tokens}, expected at least 1")
    if start < 0 or first < 0:
        raise ValueError(f"positions {start} (queries), {first} (keys), expected at least 0")
    last_seen = first + keys.k.shape[2]
    window = _NO_WINDOW if window_tokens is None else window_tokens
    reached = first <= start and last_seen > start + tokens - window and last_seen > first
    if not reached and (sinks is None or sinks.k.shape[2] == 0):
        raise ValueError(
            f"a query sees no key: keys {first} to {last_seen - 1}, queries {start} on"
        )


def row_major(x: Tensor) -> Tensor:
    """``x`` with the numbers of each row together, a copy only if it must be."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _in_rows(part: Keys) -> Keys:
    """The same with the numbers of each row together, copied only if they must be."""
    k, v = row_major(part.k), row_major(part.v)
    if part.k_scale is None or part.v_scale is None:
        return Keys(k, v)
    return Keys(k, v, part.k_scale.contiguous(), part.v_scale.contiguous())


def cache_of(part: Keys) -> list[int]:
    """`Cache` of native/module.cpp."""
    scales = [s for s in (part.k_scale, part.v_scale) if s is not None]
    addresses = [x.data_ptr() for x in (part.k, part.v, *scales)] + [0] * (2 - len(scales))
    steps = [step for x in (part.k, part.v) for step in (x.stride(0), x.stride(1))]
    steps += list(scales[0].stride()[:2]) if scales else [0, 0]
    return [*addresses, *steps, part.k.stride(2), part.v.stride(2), part.k.shape[2]]
