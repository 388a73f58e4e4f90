"""How far two models' predictions are apart, token by token, on the same contexts.

KL is per token, ``sum_v p(v) (log p(v) - log q(v))`` in nats with p the reference, summed over the
vocabulary and never averaged over it: a wrong model must look wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from respike.errors import UsageError
from respike.evaluation.stats import mean_interval
from respike.models.decoder import PREFILL_CHUNK_TOKENS, Decoder

HEAD_TOKENS = 256
"""Tokens whose logits exist at once."""
BATCH_TOKENS = 8192
"""Tokens that are read side by side."""


@dataclass(frozen=True)
class Distances:
    """Per-token measures, each (N contexts, T - 1); column t - 1 predicts token t from t tokens.

    Attributes:
        nats_reference: Negative log-likelihood of the text under the reference.
        nats: The same under the candidate.
        kl: KL(reference || candidate), nats.
        agree: Both rank the same token first (1.0 or 0.0).
        max_logit_difference: Largest absolute difference of any logit.
    """

    nats_reference: Tensor
    nats: Tensor
    kl: Tensor
    agree: Tensor
    max_logit_difference: float

    def per_context(self, low: int, high: int) -> dict[str, Tensor]:
        """Means of each context (N,) over predictions from ``low`` to ``high - 1`` tokens."""
        part = slice(max(low, 1) - 1, high - 1)
        return {
            "nats_reference": self.nats_reference[:, part].mean(1),
            "nats": self.nats[:, part].mean(1),
            "nats_added": (self.nats - self.nats_reference)[:, part].mean(1),
            "kl_nats": self.kl[:, part].mean(1),
            "top1_agreement_frac": self.agree[:, part].mean(1),
        }

    def bucket(self, low: int, high: int) -> dict[str, object]:
        """Means over predictions made from ``low`` to ``high - 1`` tokens of context."""
        part = slice(max(low, 1) - 1, high - 1)
        each = self.per_context(low, high)
        kl, delta = each["kl_nats"], each["nats_added"]
        return {
            "from_tokens": low,
            "to_tokens": high,
            "predictions": self.kl[:, part].numel(),
            "nats_reference": float(self.nats_reference[:, part].mean()),
            "nats": float(self.nats[:, part].mean()),
            "nats_added": float(delta.mean()),
            "nats_added_95": mean_interval(delta),
            "kl_nats": float(kl.mean()),
            "kl_nats_95": mean_interval(kl),
            "top1_agreement_frac": float(self.agree[:, part].mean()),
        }


def position_buckets(context_tokens: int, first: int = 256) -> list[tuple[int, int]]:
    """[0, first), then doubling: [256, 512), [512, 1024) ... up to the context."""
    edges = [0]
    while edges[-1] < context_tokens:
        edges.append(min(context_tokens, max(first, 2 * edges[-1])))
    return list(pairwise(edges))


class Reference:
    """The reference's hidden states on some contexts, kept to compare many candidates with.

    Args:
        decoder: The reference model.
        contexts: Token ids (N, T).
        progress: Called with (contexts done, contexts).
    """

    def __init__(
        self,
        decoder: Decoder,
        contexts: Tensor,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.decoder, self.contexts = decoder, contexts
        self.hidden = []
        with torch.inference_mode():
            for done, tokens in enumerate(contexts, start=1):
                self.hidden.append(decoder.hidden(tokens[None].to(decoder.embedding.device))[0])
                if progress:
                    progress(done, len(contexts))

    def compare(
        self,
        candidate: Decoder,
        progress: Callable[[int, int], None] | None = None,
        *,
        chunk_tokens: int = PREFILL_CHUNK_TOKENS,
        last_tokens: int | None = None,
    ) -> Distances:
        """Measure ``candidate`` (same vocabulary) against the reference.

        Args:
            candidate: The model to measure.
            progress: Called with (contexts done, contexts).
            chunk_tokens: Of the candidate's prefill; another size shows the floor of rounding.
            last_tokens: Show the candidate at most this many tokens, see `hidden_of_last`.
        """
        rows: list[list[Tensor]] = []
        largest = 0.0
        with torch.inference_mode():
            for done, (tokens, mine) in enumerate(
                zip(self.contexts, self.hidden, strict=True), start=1
            ):
                tokens = tokens[None].to(candidate.embedding.device)
                if last_tokens is None:
                    theirs, _ = candidate.hidden(tokens, chunk_tokens=chunk_tokens)
                else:
                    theirs = hidden_of_last(candidate, tokens[0], last_tokens)
                pieces = []
                for begin in range(0, tokens.shape[1] - 1, HEAD_TOKENS):
                    part = slice(begin, min(begin + HEAD_TOKENS, tokens.shape[1] - 1))
                    target = tokens[0, part.start + 1 : part.stop + 1]
                    a = self.decoder.head(mine[:, part])[0].float()
                    b = candidate.head(theirs[:, part])[0].float()
                    largest = max(largest, float((a - b).abs().max()))
                    pieces.append(_token_distances(a, b, target))
                rows.append([torch.cat(column) for column in zip(*pieces, strict=True)])
                if progress:
                    progress(done, len(self.contexts))
        a, b, kl, agree = (torch.stack(column).cpu() for column in zip(*rows, strict=True))
        return Distances(a, b, kl, agree, largest)


def hidden_of_last(decoder: Decoder, tokens: Tensor, last_tokens: int) -> Tensor:
    """Hidden states (1, T, D) of a decoder that sees only what it has read last.

    The text (T,) is read in pieces of ``last_tokens``, each as a text of its own, that begin
    ``last_tokens / 4`` apart. A piece after the first counts for its last quarter, so that every
    prediction there comes from 3/4 ``last_tokens`` to ``last_tokens`` tokens, as in
    `respike.evaluation.recall.truncated`.

    Raises:
        UsageError: ``last_tokens`` is less than 4.
    """
    if last_tokens < 4:
        raise UsageError(f"last_tokens is {last_tokens}, expected at least 4")
    step, total = last_tokens // 4, len(tokens)
    begins = [0, *range(step, total - last_tokens + step, step)]
    rows = torch.stack([_padded(tokens[b : b + last_tokens], last_tokens) for b in begins])
    parts = []
    for some in torch.split(rows, max(1, BATCH_TOKENS // last_tokens)):
        parts.append(decoder.hidden(some)[0])
    pieces = torch.cat(parts)
    first, rest = pieces[0], pieces[1:, last_tokens - step :].flatten(0, 1)
    return torch.cat((first, rest))[None, :total]


def _padded(tokens: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, length - len(tokens)))


def _token_distances(a: Tensor, b: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Measures of logits a, b (T, V) on tokens ``target`` (T,), in the order of `Distances`."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    pick = target[:, None]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    agree = (a.argmax(-1) == b.argmax(-1)).float()
    return -log_p.gather(1, pick)[:, 0], -log_q.gather(1, pick)[:, 0], kl, agree


def negative_log_likelihood(
    decoder: Decoder, contexts: Tensor, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Nats per token (N, T - 1) of a model alone; for distances use `Reference`."""
    rows = []
    with torch.inference_mode():
        for done, tokens in enumerate(contexts, start=1):
            tokens = tokens.to(decoder.embedding.device)
            hidden = decoder.hidden(tokens[None])[0][0]
            parts = [
                torch.nn.functional.cross_entropy(
                    decoder.head(hidden[None, i : i + HEAD_TOKENS])[0].float()[: len(t)],
                    t,
                    reduction="none",
                )
                for i in range(0, len(tokens) - 1, HEAD_TOKENS)
                if len(t := tokens[i + 1 : i + 1 + HEAD_TOKENS])
            ]
            rows.append(torch.cat(parts).cpu())
            if progress:
                progress(done, len(contexts))
    return torch.stack(rows)
