"""Whether an answer is the documents': by its evidence and its confidence.

Evidence is how much likelier the model finds the words with the documents before them than without,
confidence how likely it finds them at all. Where either is too low the answer is not the
documents', and what is said is that it was not found in them.
"""

from dataclasses import dataclass

import torch

from respike.documents.prompt import before_document
from respike.loading import Model
from respike.models.state import DecoderState

JUDGED_TOKENS = 16
"""The beginning of an answer that is looked at."""


@dataclass(frozen=True)
class Least:
    """What an answer must reach to count; the defaults were measured by benchmarks/abstain.py.

    Attributes:
        evidence: Nats a token by which the documents make its beginning likelier.
        confidence: Mean log-probability of its beginning, in nats a token.
    """

    evidence: float = 0.5
    confidence: float = -0.32


LEAST = Least()


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        found: Whether both reach what they must.
        evidence: See `Least`; 0 for no tokens.
        confidence: Likewise.
    """

    found: bool
    evidence: float
    confidence: float


def judge(least: Least, logprobs: list[float], without: list[float]) -> Verdict:
    """Judge the first `JUDGED_TOKENS` tokens of an answer.

    Args:
        least: What they must reach.
        logprobs: Of the tokens, with the documents.
        without: Likewise, without them: see `without_document`.
    """
    inside, outside = logprobs[:JUDGED_TOKENS], without[:JUDGED_TOKENS]
    count = max(1, len(inside))
    confidence = sum(inside) / count
    evidence = (sum(inside) - sum(outside)) / count
    found = evidence >= least.evidence and confidence >= least.confidence
    return Verdict(found, evidence, confidence)


def without_document(model: Model, prompt: list[int], tokens: list[int]) -> list[float]:
    """Log-probabilities of the first tokens of an answer if there had been no documents.

    Args:
        model: The one that answered.
        prompt: What followed the documents.
        tokens: Of the answer.
    """
    tokens = tokens[:JUDGED_TOKENS]
    return score(model, before_document(model.tokenizer) + prompt, tokens) if tokens else []


def score(
    model: Model, prompt: list[int], tokens: list[int], state: DecoderState | None = None
) -> list[float]:
    """Log-probabilities of ``tokens`` after ``prompt``.

    Args:
        model: The model.
        prompt: At least one token.
        tokens: At least one.
        state: What came before the prompt; consumed.
    """
    decoder = model.decoder
    ids = torch.tensor([prompt + tokens[:-1]], device=decoder.embedding.device)
    with torch.inference_mode():
        hidden, _ = decoder.hidden(ids, state)
        logits = decoder.head(hidden[:, len(prompt) - 1 :]).float().log_softmax(-1)[0]
    return logits[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
