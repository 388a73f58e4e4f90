"""What models write: greedy continuations of the same prompts, and how far they agree.

Letters: N prompts, T tokens of each, M tokens written.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from respike.errors import UsageError
from respike.evaluation.stats import mean_interval
from respike.models.decoder import PREFILL_CHUNK_TOKENS, Decoder

NGRAM_TOKENS = 4
"""Length of what counts as repeated."""
BATCH_TOKENS = 16_384
"""Tokens of prompts and continuations that run side by side."""


def continuations(
    decoder: Decoder,
    prompts: Int[Tensor, "N T"],
    new_tokens: int,
    *,
    never: Sequence[int] = (),
    last_tokens: int | None = None,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "N M"]:
    """What the model writes after each prompt, always choosing its most likely next token.

    Args:
        decoder: The model.
        prompts: Token ids.
        new_tokens: M, how many to write.
        never: Tokens that are not chosen, such as those that end a text: all texts must be equally
            long to be compared.
        last_tokens: Show the model only what it has read last, as
            `respike.evaluation.recall.truncated` does: between 3/4 of this and all of it.
        chunk_tokens: Of the prefill; another size shows the floor of rounding.
        progress: Called with (tokens written, tokens to write), over all prompts.

    Raises:
        UsageError: No prompt, an empty one, or nothing to write.
    """
    if not prompts.numel() or new_tokens < 1:
        raise UsageError(
            f"{len(prompts)} prompts of {prompts.shape[1]} tokens, {new_tokens} to write: "
            "expected at least one of each"
        )
    size = max(1, BATCH_TOKENS // (prompts.shape[1] + new_tokens))
    step = new_tokens if last_tokens is None else max(1, last_tokens // 4)
    rows: list[Tensor] = []
    for batch in torch.split(prompts.to(decoder.embedding.device), size):
        text = batch
        while (made := text.shape[1] - batch.shape[1]) < new_tokens:
            seen = text if last_tokens is None else text[:, -max(1, last_tokens - step) :]
            count = min(step, new_tokens - made)
            made_now = _greedy(decoder, seen, count, list(never), chunk_tokens)
            text = torch.cat((text, made_now), 1)
            if progress:
                done = sum(len(row) for row in rows) * new_tokens + len(batch) * (made + count)
                progress(done, len(prompts) * new_tokens)
        rows.append(text[:, batch.shape[1] :])
    return torch.cat(rows).cpu()


def _greedy(
    decoder: Decoder, tokens: Tensor, count: int, never: list[int], chunk_tokens: int
) -> Tensor:
    made: list[Tensor] = []
    state = None
    with torch.inference_mode():
        for _ in range(count):
            logits, state = decoder(tokens, state, logits="last", chunk_tokens=chunk_tokens)
            scores = logits[:, 0].float()
            scores[:, never] = -torch.inf
            tokens = scores.argmax(-1, keepdim=True)
            made.append(tokens)
    return torch.cat(made, 1)


def common_prefix(a: Int[Tensor, "N M"], b: Int[Tensor, "N M"]) -> Int[Tensor, " N"]:
    """Tokens before the first that differs."""
    return (a == b).long().cumprod(1).sum(1)


def repetition(tokens: Int[Tensor, "N M"], ngram_tokens: int = NGRAM_TOKENS) -> Float[Tensor, " N"]:
    """Share of a text's n-grams that stood in it before; 0 for a text too short to have any."""
    rates = []
    for row in tokens.tolist():
        grams = [tuple(row[i : i + ngram_tokens]) for i in range(len(row) - ngram_tokens + 1)]
        rates.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return torch.tensor(rates)


def continuation_agreement(a: Int[Tensor, "N M"], b: Int[Tensor, "N M"]) -> dict[str, Any]:
    """How model B's continuations are like model A's of the same prompts.

    Every mean is over prompts, with a 95 % bootstrap interval; differences are paired by prompt.

    Args:
        a: From `continuations`, of the original.
        b: Of the model that is judged.
    """
    values = per_prompt(a, b)
    found: dict[str, Any] = {"prompts": len(a), "new_tokens": a.shape[1]}
    for name, each in values.items():
        found |= {name: float(each.mean()), f"{name}_95": mean_interval(each)}
    return found


def per_prompt(a: Int[Tensor, "N M"], b: Int[Tensor, "N M"]) -> dict[str, Float[Tensor, " N"]]:
    """The measures of `continuation_agreement`, one value a prompt."""
    prefix, (before, after) = common_prefix(a, b).float(), (repetition(a), repetition(b))
    return {
        "prefix_tokens": prefix,
        "prefix_frac": prefix / a.shape[1],
        "agreement_frac": (a == b).float().mean(1),
        "repetition_reference_frac": before,
        "repetition_frac": after,
        "repetition_added_frac": after - before,
    }
