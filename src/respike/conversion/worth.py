"""Which tokens a far memory should keep as they are: keys' worth, by what the original looks at.

The logarithm of a key's worth is the linear function of it that foretells best the logarithm of the
attention it gets when it is far (SmolLM2: the 64 of 2,000 tokens that it picks get 95 % of what the
best 64 get; those with the most attention while they were in the window 92 %). How fast worth
halves with age is searched for: what catches the most far attention.

Letters: T tokens of a context, S of its queries, G KV groups, R query heads of each, K head dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ASKED_EVERY = 8
"""Of a context's queries, every eighth is asked what it looks at."""
LEAST_ASKED = 16
"""So many of them must have a key behind their window before its worth is judged."""
LEAST_TOKENS = ASKED_EVERY * LEAST_ASKED
"""Of a context beyond twice its window: with fewer no key can be judged."""
LEAST_RATE = 5e-7
"""A key's share of attention below which differences mean nothing."""
RIDGE = 1e-4
KEPT_HALF_LIVES = (512.0, 1024.0, 2048.0, 4096.0, 8192.0)
"""Of a kept token's worth, in tokens; those that are tried. Shorter ones look better in contexts as
short as those of calibration, and are worse in longer ones."""


@dataclass(frozen=True)
class FarAttention:
    """What some queries of one context look at behind their window.

    Attributes:
        k: Keys (T, G, K), not rotated.
        share: Each key's of the queries' attention (G, S, T), summed over heads.
        far: Which keys are behind the window (S, T).
    """

    k: Tensor
    share: Tensor
    far: Tensor

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, turned_k: Tensor, window_tokens: int, sink_tokens: int
    ) -> "FarAttention":
        """From rotated queries (T, G, R, K), and keys (T, G, K) as they are and rotated."""
        position = torch.arange(len(q), device=q.device)
        asked = position[window_tokens + sink_tokens :: ASKED_EVERY]
        scores = torch.einsum("tgrk,sgk->grts", q[asked], turned_k) * k.shape[-1] ** -0.5
        scores = scores.masked_fill(position > asked[:, None], -torch.inf)
        far = (position <= asked[:, None] - window_tokens) & (position >= sink_tokens)
        return cls(k, scores.softmax(-1).sum(1) * far, far)

    def sampled(self, every: int) -> "FarAttention":
        """Of one query in ``every``."""
        return replace(self, share=self.share[:, ::every], far=self.far[::every])

    def rates(self, group: int) -> tuple[Tensor, Tensor]:
        """Keys that were far for long enough, and their mean shares."""
        counts = self.far.sum(0)
        some = counts >= LEAST_ASKED
        return self.k[some, group], self.share[group].sum(0)[some] / counts[some]

    def caught(self, group: int, weight: Tensor, half_life: float, kept: Tensor) -> Tensor:
        """Share that the keys have which would be kept when each query asks, (S, N).

        Args:
            group: Whose.
            weight: From `fit_weight`.
            half_life: Of worth, in tokens.
            kept: How many are kept (N), int64.
        """
        ages = torch.arange(len(self.k), device=weight.device) * (math.log(2) / half_life)
        order = (self.k[:, group] @ weight + ages).argsort(descending=True)
        rank, share = self.far[:, order].cumsum(-1), self.share[group][:, order].cumsum(-1)
        ends = torch.searchsorted(rank, kept.expand(len(rank), -1).contiguous(), right=True)
        caught: Tensor = torch.nn.functional.pad(share, (1, 0)).gather(-1, ends)
        return caught


def fit_worth(seen: Sequence[FarAttention], group: int, kept_tokens: int) -> tuple[Tensor, float]:
    """The weight (K) of a group's keys in the logarithm of their worth, and the worth's half-life.

    Args:
        seen: Of every context.
        group: Its number in them.
        kept_tokens: How many will be kept.
    """
    weight = fit_weight(seen, group)
    kept = torch.tensor([kept_tokens], device=weight.device)
    some = [s.sampled(ASKED_EVERY) for s in seen]

    def caught(half_life: float) -> float:
        return sum(float(s.caught(group, weight, half_life, kept).sum()) for s in some)

    return weight, max(KEPT_HALF_LIVES, key=caught)


def fit_weight(seen: Sequence[FarAttention], group: int) -> Tensor:
    """The weight alone; see `fit_worth`."""
    keys, rates = (torch.cat(x).double() for x in zip(*(s.rates(group) for s in seen), strict=True))
    spread = keys.std() + 1e-9
    inputs = torch.cat((keys / spread, torch.ones(len(keys), 1, device=keys.device)), 1)
    squares = inputs.T @ inputs / len(inputs)
    squares.diagonal().add_(RIDGE)
    logs = (rates + LEAST_RATE).log()
    weight: Tensor = torch.linalg.solve(squares, inputs.T @ logs / len(inputs))[:-1] / spread
    return weight.float()
