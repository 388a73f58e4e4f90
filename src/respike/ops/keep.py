"""Tokens that stay exact after they have left the window: which, how long, and attention to them.

A far memory is right about most tokens together and wrong about the few that matter one by one.
So each KV group keeps the M tokens of most worth as they are; what it lets go of, at most one token
a step, its memory takes. The definition, for each group, when the query at position t is read::

    token t - W leaves the window; sinks never do
    if that is R tokens ago it is let go at once; else
    a kept token of age R or more is let go, and the newcomer takes its place
    else it takes an empty place if there is one
    else, if it is worth more than the least of the kept, it takes that one's place (the first of
    equals), which is let go
    else it is let go itself
    query t then sees the M kept tokens at their true distances, which are below R

A token's worth depends on its key alone, so what is kept does not depend on how a text is cut.

Letters: B batch, T steps, H query heads, G KV groups, K head dim, M kept tokens, C = M + T
candidates: those kept before a span, then those that leave the window in it, one a step.
Source: our own; that few tokens take most of attention, and are known early: H2O (Zhang et al.,
arXiv:2306.14048). Worth from keys alone: `respike.conversion.worth`.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from respike.ops import backends
from respike.ops.recurrence import SUFFIX

STEPS = 64
"""Queries that are shown one list of candidates."""
LOG2_E = math.log2(math.e)
"""Weights are powers of two: on processors `torch.exp` takes twenty times as long where many are 0,
and `torch.exp2` does not."""


class Rule(NamedTuple):
    """What is the same for all groups.

    Attributes:
        window_tokens: W.
        sink_tokens: First tokens, which never leave.
        reach_tokens: R; nothing is kept unless it is above W.
    """

    window_tokens: int
    sink_tokens: int
    reach_tokens: int

    def first_lost(self, kept_tokens: int) -> int:
        """Position of the first query at which a token is let go; one is at each that follows."""
        room = max(0, min(kept_tokens, self.reach_tokens - self.window_tokens))
        return self.sink_tokens + self.window_tokens + room


class Places(NamedTuple):
    """Who is kept when, int64; candidates by number, -1 is nobody.

    Attributes:
        held: Of each place before steps 0, `STEPS`, .. and behind the last (B, G, N + 1, M).
        until: The first step at which each candidate is not seen any more (B, G, C).
        lost: Whom each step lets go (B, T, G).
    """

    held: Tensor
    until: Tensor
    lost: Tensor


def keep_definition(
    worth: Float[Tensor, "B T G"],
    span: Int[Tensor, "B 2"],
    held_worth: Float[Tensor, "B G M"],
    held_position: Int[Tensor, "B G M"],
    rule: Rule,
) -> Places:
    """The definition, step by step; see `keep`."""
    B, T, G = worth.shape
    M = held_worth.shape[2]
    held = torch.full((B, G, -(-T // STEPS) + 1, M), -1)
    until = torch.zeros(B, G, M + T, dtype=torch.int64)
    lost = torch.full((B, T, G), -1)
    for b, (start, valid) in enumerate(span.tolist()):
        for g in range(G):
            at = held_position[b, g].tolist()
            worths = held_worth[b, g].tolist()
            who = [m if at[m] >= 0 else -1 for m in range(M)]
            for t in range(T):
                if t % STEPS == 0:
                    held[b, g, t // STEPS] = torch.tensor(who)
                position = start + t - rule.window_tokens
                if t >= valid or position < rule.sink_tokens:
                    continue
                mine = float(worth[b, t, g])
                old = [
                    m for m in range(M) if who[m] >= 0 and at[m] <= start + t - rule.reach_tokens
                ]
                empty = [m for m in range(M) if who[m] < 0]
                least = min(range(M), key=worths.__getitem__)
                goes = M + t
                if rule.window_tokens < rule.reach_tokens and (
                    old or empty or mine > worths[least]
                ):
                    place = (old or empty or [least])[0]
                    goes, who[place], at[place], worths[place] = who[place], M + t, position, mine
                lost[b, t, g] = goes
                if goes >= 0:
                    until[b, g, goes] = t
            held[b, g, -1] = torch.tensor(who)
            for m in who:
                if m >= 0:
                    until[b, g, m] = T
    return Places(held, until, lost)


def keep(
    worth: Float[Tensor, "B T G"],
    span: Int[Tensor, "B 2"],
    held_worth: Float[Tensor, "B G M"],
    held_position: Int[Tensor, "B G M"],
    rule: Rule,
) -> Places:
    """Who is kept when, by the fastest form that can run here.

    Args:
        worth: Of the token that leaves at each step, float32; anything where none does.
        span: Position of each row's first query, and how many of its T are no padding.
        held_worth: Of those kept before, by place.
        held_position: Likewise; -1 is an empty place.
        rule: When tokens leave, and when they are too old.
    """
    kernels = backends.choose("keep", worth, held_worth)
    if kernels is None:
        return keep_torch(worth, span, held_worth, held_position, rule)
    B, T, G = worth.shape
    M = held_worth.shape[2]
    held = worth.new_empty(B, G, -(-T // STEPS) + 1, M, dtype=torch.int64)
    until = worth.new_empty(B, G, M + T, dtype=torch.int64)
    lost = worth.new_empty(B, T, G, dtype=torch.int64)
    inputs = [x.contiguous() for x in (worth, span, held_worth, held_position)]
    kernels.module.keep(
        [x.data_ptr() for x in (*inputs, held, until, lost)], (B, T, G, M), STEPS, tuple(rule)
    )
    return Places(held, until, lost)


def keep_torch(
    worth: Float[Tensor, "B T G"],
    span: Int[Tensor, "B 2"],
    held_worth: Float[Tensor, "B G M"],
    held_position: Int[Tensor, "B G M"],
    rule: Rule,
) -> Places:
    """`keep` for all rows and groups at once, step by step."""
    B, T, G = worth.shape
    M, device = held_worth.shape[2], worth.device
    lowest = torch.finfo(torch.float32).min
    places = torch.arange(M, device=device)
    position, values, span = held_position, held_worth, span.to(device)
    who = places.where(position >= 0, -1)
    held, lost = [], []
    until = torch.zeros(B, G, M + T + 1, dtype=torch.int64, device=device)  # the last: nobody's
    for t in range(T):
        if t % STEPS == 0:
            held.append(who)
        now = span[:, :1] + t
        newcomer = now - rule.window_tokens
        leaves = (t < span[:, 1:]) & (newcomer >= rule.sink_tokens)
        old = (who >= 0) & (position <= (now - rule.reach_tokens)[..., None])
        order = values.masked_fill(who < 0, lowest).masked_fill(old, -torch.inf)
        least, place = order.min(-1)
        mine = worth[:, t]
        takes = (
            leaves & (rule.window_tokens < rule.reach_tokens) & ((least == lowest) | (mine > least))
        )
        here = takes[..., None] & (places == place[..., None])
        goes = who.gather(2, place[..., None])[..., 0].where(takes, M + t).where(leaves, -1)
        until.scatter_(2, goes.where(goes >= 0, M + T)[..., None], t)
        who = torch.where(here, M + t, who)
        position = torch.where(here, newcomer[..., None], position)
        values = torch.where(here, mine[..., None], values)
        lost.append(goes)
    held.append(who)
    until.scatter_(2, who.where(who >= 0, M + T), T)
    return Places(torch.stack(held, 2), until[..., :-1], torch.stack(lost, 1))


def attend_kept(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B G C K"],
    v: Float[Tensor, "B G C K"],
    places: Places,
) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T H"]]:
    """Softmax over the kept tokens, float32: mean value, and the logarithm of the denominator.

    Zeros and -inf where nothing is kept. Gradients compute the scores anew: for the `STEPS`
    queries that are shown one list, nothing of all queries times all candidates is ever held.

    Args:
        q: Queries, rotated.
        k: Keys of the candidates, rotated.
        v: Their values.
        places: From `keep`.
    """
    if backends.needs_gradient(q, k, v):
        mean, mass = _AttendKept.apply(places, q, k, v)  # type: ignore[no-untyped-call]
        return mean, mass
    return _attend_kept(q, k, v, places)


class _AttendKept(torch.autograd.Function):
    """The op with its gradients."""

    @staticmethod
    def forward(ctx: Any, places: Places, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mean, mass = _attend_kept(q, k, v, places)
        ctx.save_for_backward(q, k, v, mean, mass, *places)
        return mean, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean: Tensor, d_mass: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mean, mass, *rest = ctx.saved_tensors
        places = Places(*rest)
        likes = d_mean.to(q.dtype)
        # A score's gradient is its weight times (likes * value - delta).
        delta = (likes * mean).sum(-1) - d_mass
        kernels = backends.choose("attend_kept_gradient", q, k, v)
        if kernels is not None:
            return None, *_native_gradient(kernels, (q, k, v), places, mass, likes, delta)
        G, scale = k.shape[1], q.shape[-1] ** -0.5
        dq = torch.zeros_like(q, dtype=torch.float32)
        dk, dv = (torch.zeros(x.shape, device=x.device) for x in (k, v))
        for shown in _shown(k.shape, q.shape[1], places):
            asked, liked = shown.queries(q, G), shown.queries(likes, G)
            keys, values = shown.candidates(k), shown.candidates(v)
            top = shown.queries(mass[..., None], G) * LOG2_E
            weights = shown.scores(asked, keys).sub_(top.masked_fill(top == -torch.inf, 0)).exp2_()
            shown.add(dv, weights.mT @ liked)
            d_scores = (liked @ values.mT).sub_(shown.queries(delta[..., None], G)).mul_(weights)
            d_scores.mul_(scale)
            shown.add(dk, d_scores.mT @ asked)
            shown.put(dq, d_scores @ keys)
        return None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _attend_kept(q: Tensor, k: Tensor, v: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    kernels = backends.choose("attend_kept", q, k, v)
    if kernels is not None:
        return _native(kernels, (q, k, v), places)
    mean = torch.zeros_like(q, dtype=torch.float32)
    mass = torch.full_like(mean[..., :1], -torch.inf)
    for shown in _shown(k.shape, q.shape[1], places):
        scores = shown.scores(shown.queries(q, k.shape[1]), shown.candidates(k))
        top = scores.amax(-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0)
        weights = scores.sub_(top).exp2_()
        total = weights.sum(-1, keepdim=True)
        shown.put(mass, total.log() + top / LOG2_E)
        shown.put(mean, weights @ shown.candidates(v) / total.clamp(min=1e-30))
    return mean, mass[..., 0]


def _native(
    kernels: backends.Kernels, inputs: tuple[Tensor, Tensor, Tensor], places: Places
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.contiguous() for x in inputs)
    mean, mass = torch.empty(q.shape), torch.empty(q.shape[:3])
    buffers, sizes = _as_kernels_take_it((q, k, v), places, mean, mass)
    getattr(kernels.module, f"attend_kept_{SUFFIX[q.dtype]}")(
        kernels.level, torch.get_num_threads(), buffers, sizes, STEPS, q.shape[-1] ** -0.5
    )
    return mean, mass


def _native_gradient(
    kernels: backends.Kernels,
    inputs: tuple[Tensor, Tensor, Tensor],
    places: Places,
    mass: Tensor,
    likes: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.contiguous() for x in inputs)
    likes, delta = likes.contiguous(), delta.contiguous()
    found = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    buffers, sizes = _as_kernels_take_it((q, k, v), places, mass, mass)
    getattr(kernels.module, f"attend_kept_gradient_{SUFFIX[q.dtype]}")(
        kernels.level, torch.get_num_threads(), buffers, [x.data_ptr() for x in (likes, delta)],
        [x.data_ptr() for x in found], sizes, STEPS, q.shape[-1] ** -0.5,
    )  # fmt: skip
    return found


def _as_kernels_take_it(
    inputs: tuple[Tensor, Tensor, Tensor], places: Places, mean: Tensor, mass: Tensor
) -> tuple[list[int], tuple[int, ...]]:
    """Addresses, of contiguous tensors, and sizes."""
    q, k, v = inputs
    sizes = (*q.shape[:3], k.shape[1], q.shape[3], k.shape[2] - q.shape[1])
    return [x.data_ptr() for x in (q, k, v, places.held, places.until, mean, mass)], sizes


class _Shown(NamedTuple):
    """What is shown to the queries of some steps: lists of candidates (B, G, N).

    Rows of queries are (B, G, S R, K), of candidates (B, G, N, K), all float32.

    Attributes:
        steps: The queries'.
        among: Candidates, by their row among those of all groups.
        hidden: To add to scores: -inf where a step does not see a candidate (B, G, S, 1, N).
    """

    steps: slice
    among: Tensor
    hidden: Tensor

    def queries(self, x: Tensor, groups: int) -> Tensor:
        """Of what every head has (B, T, H, K), the rows of these steps."""
        x = x[:, self.steps].float()
        x = x.reshape(*x.shape[:2], groups, -1, x.shape[-1])
        return x.transpose(1, 2).flatten(2, 3)

    def put(self, to: Tensor, rows: Tensor) -> None:
        """Writes such rows to where they belong."""
        there = to[:, self.steps]
        rows = rows.view(*rows.shape[:2], there.shape[1], -1, rows.shape[-1])
        there.copy_(rows.transpose(1, 2).flatten(2, 3))

    def candidates(self, x: Tensor) -> Tensor:
        """Of what every candidate has (B, G, C, K)."""
        rows = x.flatten(0, 2).index_select(0, self.among.flatten()).float()
        return rows.view(*self.among.shape, -1)

    def add(self, to: Tensor, rows: Tensor) -> None:
        """Adds such rows to those of their candidates."""
        to.view(-1, to.shape[-1]).index_add_(0, self.among.flatten(), rows.flatten(0, 2))

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """In powers of two (B, G, S R, N); -inf where a candidate is not seen."""
        scores = (queries @ keys.mT).mul_(queries.shape[-1] ** -0.5 * LOG2_E)
        by_step = scores.view(*self.hidden.shape[:3], -1, scores.shape[-1])
        by_step.add_(self.hidden)
        return scores


def _shown(shape: torch.Size, tokens: int, places: Places) -> Iterator[_Shown]:
    """For each `STEPS` queries: who is held before them, then who leaves in them."""
    B, G, C, _ = shape
    first, device = C - tokens, places.until.device
    group = torch.arange(0, B * G * C, C, device=device).view(B, G, 1)
    for n, start in enumerate(range(0, tokens, STEPS)):
        steps = torch.arange(start, min(start + STEPS, tokens), device=device)
        among = torch.cat((places.held[:, :, n], (first + steps).expand(B, G, -1)), -1)
        index = among.clamp(min=0)
        until = places.until.gather(2, index).masked_fill(among < 0, 0)[..., None, :]
        seen = (index - first)[..., None, :] <= steps[:, None]
        seen &= steps[:, None] < until
        hidden = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)
        yield _Shown(slice(start, start + len(steps)), group + index, hidden[:, :, :, None])
