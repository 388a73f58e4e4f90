"""What the tests of mixers share: inputs, spans whole, cut and ragged, and the window in words.

Letters: B batch, T tokens, D model width, H query heads, G KV groups, K head dim.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from respike.layers.mixer import Mixer
from respike.layers.span import Span
from respike.layers.state import MixerState
from respike.ops.rotary import rotary_frequencies

B, D, G, K = 2, 14, 3, 10
FREQUENCIES = rotary_frequencies(K, 10_000.0)
Array = np.ndarray[Any, np.dtype[Any]]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""x (B, T, D), q (B, T, H, K), k and v (B, T, G, K)."""
CUTS = {"one span": [], "steps": list(range(150)), "spans of 1 to 13": [1, 3, 6, 7, 20, 21]}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mixer_inputs(T: int, heads: int, rows: int = B, dtype: torch.dtype = torch.float32) -> Inputs:
    shapes = ((rows, T, D), (rows, T, heads, K), (rows, T, G, K), (rows, T, G, K))
    return tuple(normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))  # type: ignore[return-value]


def randomise(mixer: Mixer, size: float = 0.5, seed: int = 40) -> None:
    """Every parameter normal, of this size; norms around one."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(mixer.named_parameters()):
            noise = size * normal(*parameter.shape, seed=seed + i)
            parameter.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else noise)


def make_span(start: Sequence[int], valid: Sequence[int], tokens: int, like: Tensor) -> Span:
    head_dim = like.shape[-1]
    frequencies = FREQUENCIES if head_dim == K else rotary_frequencies(head_dim, 10_000.0)
    counts = torch.tensor(start), torch.tensor(valid)
    return Span(*counts, tokens, frequencies, like.dtype, like.device)


def in_spans(mixer: Mixer, inputs: Inputs, cuts: Iterable[int]) -> tuple[Tensor, Any]:
    """Outputs and final state of spans that end at ``cuts`` and at the end."""
    _, q, k, _ = inputs
    rows, T = q.shape[:2]
    state: Any = mixer.init_state(rows, k.shape[2], k.shape[3], k)
    outputs = []
    for begin, end in itertools.pairwise([0, *sorted({c for c in cuts if 0 < c < T}), T]):
        span = make_span([begin] * rows, [end - begin] * rows, end - begin, k)
        out, state = mixer(*(z[:, begin:end] for z in inputs), span, state)
        outputs.append(out)
    return torch.cat(outputs, 1), state


def in_ragged_spans(
    mixer: Mixer, inputs: Inputs, calls: Sequence[Sequence[int]], padding: float
) -> tuple[list[Tensor], Any]:
    """Each row's outputs and the state, when call n gives row b ``calls[n][b]`` tokens."""
    _, q, k, _ = inputs
    rows = len(q)
    state: Any = mixer.init_state(rows, k.shape[2], k.shape[3], k)
    seen, outputs = [0] * rows, [[q[:0]] for _ in range(rows)]
    for valid in calls:
        T = max(valid)
        batch = [z.new_full((rows, T, *z.shape[2:]), padding) for z in inputs]
        for b, count in enumerate(valid):
            for whole, part in zip(inputs, batch, strict=True):
                part[b, :count] = whole[b, seen[b] : seen[b] + count]
        out, state = mixer(*batch, make_span(seen, valid, T, k), state)
        for b, count in enumerate(valid):
            outputs[b].append(out[b, :count])
            seen[b] += count
    return [torch.cat(parts[1:]) for parts in outputs], state


def tensors_of(state: MixerState) -> dict[str, Tensor]:
    return state.tensors(1 << 20)


def double(x: Tensor) -> Array:
    return x.detach().double().numpy()


# ---- the window mixer, written from its words ------------------------------------------------


def turned(x: Array, position: int) -> Array:
    """One head's vector (K,) rotated to ``position``, float64."""
    angle = position * FREQUENCIES.numpy()
    first, second = x[: K // 2], x[K // 2 :]
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ]
    )


def window_in_words(
    q: Array, k: Array, v: Array, *, window: int, sinks: int, reach: int
) -> tuple[Array, int]:
    """One sequence, token by token: (T, H, K) from unrotated q (T, H, K) and k, v (T, G, K).

    Also returns how many (query, sink) pairs were seen at a shortened distance.
    """
    T, H, _ = q.shape
    out, shortened = np.zeros(q.shape), 0
    for p, h in itertools.product(range(T), range(H)):
        group = h // (H // k.shape[1])
        scores, values = [], []
        for j in range(p + 1):
            if j >= sinks and j <= p - window:
                continue  # neither a sink nor one of the last `window` tokens
            query_position = min(p, reach - 1) if j < sinks else p
            shortened += query_position != p
            query, key = turned(q[p, h], query_position), turned(k[j, group], j)
            scores.append(query @ key / math.sqrt(K))
            values.append(v[j, group])
        weights = np.exp(np.array(scores) - max(scores))
        out[p, h] = (weights / weights.sum()) @ np.array(values)
    return out, shortened
