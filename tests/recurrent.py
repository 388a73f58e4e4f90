"""What the tests of the recurrent ops share: inputs, decays, splits, comparisons.

Letters: B batch, T tokens, H query heads, G key/value heads, K key dim, V value dim.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tolerance import assert_close

B, H, G, K, V = 2, 6, 3, 10, 7
Array = np.ndarray[Any, np.dtype[Any]]
Result = tuple[Tensor, Tensor]
Op = Callable[..., Result]
CHUNKS = (1, 7, 16, 32, 64, 128)
SPLIT_LENGTHS = (2, 3, 8, 31, 33, 64, 97, 130)
"""Sequences that are cut in two at every place."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _mixture(shape: Sequence[int]) -> Tensor:
    kinds = torch.tensor([0.0, -1e-4, -0.02, -0.5, -30.0, -100.0, -torch.inf])
    shares_up_to = torch.tensor([0.3, 0.6, 0.8, 0.97, 0.98, 0.99])
    return kinds[torch.bucketize(uniform(*shape, seed=5), shares_up_to)]


def _early_large(shape: Sequence[int]) -> Tensor:
    """At the start of each 32 tokens a decay that leaves nothing, then small ones that matter."""
    decays = -0.01 * uniform(*shape, seed=6)
    decays[:, 3::32] = -100.0
    decays[:, 5::64] = -1000.0
    return decays


DECAYS: dict[str, Callable[[Sequence[int]], Tensor]] = {
    "none": lambda shape: torch.zeros(*shape),
    "-1e-4": lambda shape: torch.full(tuple(shape), -1e-4),
    "to -0.1": lambda shape: -0.1 * uniform(*shape, seed=4),
    "-30": lambda shape: torch.full(tuple(shape), -30.0),
    "-100": lambda shape: torch.full(tuple(shape), -100.0),
    "-inf": lambda shape: torch.full(tuple(shape), -torch.inf),
    "mixture": _mixture,
    "early -100": _early_large,
}
"""Log-decays of a shape (B, T, ...)."""


def tokens(tensors: Iterable[Tensor], start: int, stop: int | None) -> list[Tensor]:
    return [x[:, start:stop] for x in tensors]


def in_parts(op: Op, tensors: Sequence[Tensor], state: Tensor, cuts: Iterable[int]) -> Result:
    """The op on pieces of the sequence, the state carried from one to the next."""
    bounds = [0, *sorted(cuts), tensors[0].shape[1]]
    outs = []
    for start, stop in itertools.pairwise(bounds):
        out, state = op(*tokens(tensors, start, stop), state)
        outs.append(out)
    return torch.cat(outs, dim=1), state


def steps(op: Op, tensors: Sequence[Tensor], state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Token by token: the outputs, and the state before each token and after the last."""
    outs, states = [], [state]
    for t in range(tensors[0].shape[1]):
        out, state = op(*tokens(tensors, t, t + 1), state)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=1), states


def assert_same(actual: Result, expected: tuple[Tensor | Array, Tensor | Array]) -> None:
    """Outputs and final states, by the float32 row of the table; references may be float64."""
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, torch.as_tensor(wanted).float())


def gradients(op: Op, tensors: Sequence[Tensor], state: Tensor) -> list[Tensor]:
    """Of every input, state last, for a loss in which every output and state entry counts."""
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, state)]
    out, last = op(*leaves)
    loss = (out * normal(*out.shape, seed=8)).sum() + (last * normal(*last.shape, seed=9)).sum()
    loss.backward()
    grads = [leaf.grad for leaf in leaves]
    assert all(grad is not None for grad in grads)
    return grads  # type: ignore[return-value]


def assert_same_gradients(op: Op, definition: Op, tensors: Sequence[Tensor], state: Tensor) -> None:
    got, expected = (gradients(f, tensors, state) for f in (op, definition))
    for actual, wanted in zip(got, expected, strict=True):
        assert actual.isfinite().all()
        if wanted.abs().max() < 1e-30:  # of a decay of -100: float32 has no digits left
            assert actual.abs().max() < 1e-30
        else:
            assert_close(actual, wanted)
