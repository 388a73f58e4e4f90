"""How many tokens each KV group with a far memory keeps: shared out by the attention they miss.

Some groups look at a few far tokens, some at thousands. So each group's attention is measured that
would be missed with 0, 16, 24, 32, 48, .. kept tokens, and tokens go where they take away most: the
cost of a group is the square of what it misses, in the mean over queries of text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from respike.account import kept_tokens
from respike.config import ModelConfig
from respike.conversion.calibrate import check_contexts, far_windows, layer_heads
from respike.conversion.worth import ASKED_EVERY, KEPT_HALF_LIVES, FarAttention, fit_weight
from respike.errors import UsageError
from respike.models.decoder import Decoder
from respike.recipe import Recipe, SourceShape
from respike.selection.student import Group, check_original

LEAST_KEPT, MOST_KEPT = 16, 4096


@dataclass(frozen=True)
class KeptShares:
    """How many tokens each group keeps, and why.

    Attributes:
        mean_tokens: Of all groups, what was to be shared out.
        counts: Numbers that were tried.
        missed: Share of a group's attention that it misses with each of them.
        kept: The number that each group was given.
    """

    mean_tokens: int
    counts: tuple[int, ...]
    missed: dict[Group, list[float]]
    kept: dict[Group, int]

    def mean_missed(self, kept: Mapping[Group, int]) -> float:
        """The share that groups miss in the mean with other numbers."""
        found = [row[self.counts.index(kept[group])] for group, row in self.missed.items()]
        return sum(found) / len(found)

    def as_dict(self) -> dict[str, Any]:
        """For the scores file."""
        return {
            "kept_tokens": self.mean_tokens,
            "missed_even_frac": self.mean_missed(dict.fromkeys(self.kept, self.mean_tokens)),
            "missed_shared_frac": self.mean_missed(self.kept),
            "kept": {f"{layer}.{group}": count for (layer, group), count in self.kept.items()},
            "counts": list(self.counts),
            "missed_frac": {
                f"{layer}.{group}": [round(share, 6) for share in row]
                for (layer, group), row in self.missed.items()
            },
        }


def share_kept_tokens(
    original: Decoder,
    config: ModelConfig,
    contexts: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> KeptShares:
    """Measure what each group with a far memory misses, and share tokens out.

    Args:
        original: The original model, with its own mixers.
        config: Of the conversion; what its groups keep in the mean is shared out.
        contexts: Text as token ids (N, T).
        progress: Called with (layers done, layers).

    Raises:
        UsageError: ``original`` is converted already, the conversion has no far memories, the
            contexts are too short to tell, or the number cannot be.
        UnsupportedError: The original is no stack of attentions and MLPs.
    """
    check_original(original.config)
    far = far_windows(config)
    parts = [part for _, part in chain(*far)]
    if not parts:
        raise UsageError(
            "the recipe makes no far memories, beside which tokens are kept",
            hint="take retrieval-keep, or set memory=far",
        )
    check_contexts(original, parts, contexts.shape[1])
    near = min(part.window_tokens + part.sink_tokens for part in parts)
    kept = [kept_tokens(part) for part in parts for _ in part.groups]
    mean_tokens = sum(kept) // len(kept)
    counts = _ladder(mean_tokens, min(contexts.shape[1] - near, MOST_KEPT))
    missed: dict[Group, list[float]] = {}
    with torch.inference_mode():
        for layer, heads in enumerate(layer_heads(original, list(contexts))):
            for _, part in far[layer]:
                seen = [x.far_attention(original, part) for x in heads]
                for group in part.groups:
                    missed[layer, group] = _missed(seen, group, counts, config.heads_per_group)
            if progress:
                progress(layer + 1, len(far))
    return KeptShares(mean_tokens, counts, missed, shared_out(missed, counts, mean_tokens))


def _ladder(mean_tokens: int, most: int) -> tuple[int, ...]:
    """Numbers that are tried: two in each doubling, and the mean itself."""
    if not 0 < mean_tokens <= most:
        raise UsageError(
            f"--kept-tokens {mean_tokens}: expected 1 to {most}, the far tokens of a context",
            hint="give longer texts: --context-tokens",
        )
    steps = [LEAST_KEPT << n for n in range(most.bit_length()) if LEAST_KEPT << n <= most]
    steps += [3 * n // 2 for n in steps if 3 * n // 2 <= most]
    return tuple(sorted({0, mean_tokens, *steps}))


def _missed(
    seen: Sequence[FarAttention], group: int, counts: Sequence[int], heads: int
) -> list[float]:
    """The mean share of attention that is missed with each number of kept tokens."""
    weight = fit_weight(seen, group)
    kept = torch.tensor(counts, device=weight.device)
    some = [x.sampled(ASKED_EVERY) for x in seen]
    caught = [
        torch.cat([x.caught(group, weight, half_life, kept) for x in some]).mean(0)
        for half_life in KEPT_HALF_LIVES
    ]
    best = torch.stack(caught).amax(0)  # as calibration will choose
    share = torch.cat([x.share[group].sum(-1) for x in some]).mean()
    missed: list[float] = ((share - best).clamp(min=0) / heads).tolist()
    return missed


def shared_out(
    missed: Mapping[Group, Sequence[float]], counts: Sequence[int], mean_tokens: int
) -> dict[Group, int]:
    """Numbers of kept tokens, at most ``mean_tokens`` in the mean, that cost least.

    Greedy: again and again the rise of one group, by any number of steps, that takes away most
    cost for a token and can still be paid.

    Args:
        missed: See `KeptShares`.
        counts: What a group may keep, rising from 0.
        mean_tokens: Of all groups.
    """
    at = dict.fromkeys(missed, 0)
    left = mean_tokens * len(missed)

    def worth(group: Group, to: int) -> float:
        row, now = missed[group], at[group]
        return (row[now] ** 2 - row[to] ** 2) / (counts[to] - counts[now])

    while True:
        rises = [
            (worth(group, to), group, to)
            for group, now in at.items()
            for to in range(now + 1, len(counts))
            if counts[to] - counts[now] <= left
        ]
        most, group, to = max(rises, key=lambda rise: rise[0], default=(0.0, (0, 0), 0))
        if most <= 0:
            return {group: counts[now] for group, now in at.items()}
        left -= counts[to] - counts[at[group]]
        at[group] = to


def recipe_with_shares(
    shares: KeptShares, recipe: Recipe, source: ModelConfig, name: str, measured_on: str
) -> Recipe:
    """The recipe with each group's own number of kept tokens."""
    by_layer: dict[int, dict[int, int]] = {}
    for (layer, group), count in shares.kept.items():
        by_layer.setdefault(layer, {})[group] = count
    told = {
        "name": name, "measured_on": measured_on,
        "source": SourceShape.model_validate(source, from_attributes=True),
        "about": f"As {recipe.name!r}; the {shares.mean_tokens} tokens that a far memory keeps in "
        "the mean are shared out among the KV groups by measurement (`respike select`).",
        "far": {
            **recipe.far.model_dump(),
            "kept_tokens": shares.mean_tokens, "kept_by_group": by_layer,
        },
    }  # fmt: skip
    return Recipe.model_validate({**recipe.model_dump(exclude_defaults=True), **told})
