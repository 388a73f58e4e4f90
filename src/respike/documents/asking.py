"""Asking: an answer from a reading, where it comes from, and whether it is in there at all.

An answer is held back until `JUDGED_TOKENS` of it are there. By then two things are known: its
evidence, how much likelier the model finds these words with the documents before them than without,
and its confidence, how likely it finds them at all. Where either is too low the answer is not the
documents', and what is said is that it was not found in them.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from respike.documents.passages import (
    OBSERVED_STEPS,
    Attention,
    Passage,
    observing,
    passages,
)
from respike.documents.prompt import NOT_FOUND, Messages, after_document, before_document
from respike.documents.reading import Reading, keeps_all
from respike.errors import UsageError
from respike.generation import Sampling, TextStream, stream
from respike.loading import Model
from respike.models.state import DecoderState

GREEDY = Sampling()
JUDGED_TOKENS = 16


@dataclass(frozen=True)
class Least:
    """What an answer must reach to count; the defaults were measured by benchmarks/abstain.py.

    Attributes:
        evidence: Nats a token by which the documents make its beginning likelier.
        confidence: Mean log-probability of its beginning, in nats a token.
    """

    evidence: float = 1.0
    confidence: float = -0.5


LEAST = Least()


@dataclass
class Answer:
    """What came out.

    Attributes:
        text: The answer, or `NOT_FOUND`.
        found: Whether it reaches ``least``.
        evidence: See `Least`.
        confidence: See `Least`.
        least: What it must reach; None: it was not judged.
        withheld: What the model would have said, if it was not found.
        passages: Where it looked, see `respike.documents.passages`.
        layer_shares: Share of each layer's retrieval groups' attention that went to the documents.
        document_share: The mean over these.
        retrieval: Whether the model has groups that can point to passages.
        prompt_tokens: Of the question, with what the template puts around it.
        completion_tokens: Of the answer.
        finish_reason: stop, length, or not_found.
    """

    text: str = ""
    found: bool = True
    evidence: float = 0.0
    confidence: float = 0.0
    least: Least | None = None
    withheld: str = ""
    passages: list[Passage] = field(default_factory=list)
    document_share: float = 0.0
    layer_shares: dict[int, float] = field(default_factory=dict)
    retrieval: bool = True
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "length"

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class Asking:
    """Iterate over pieces of the answer; afterwards `answer` holds all."""

    def __init__(self, pieces: Iterator[str], answer: Answer) -> None:
        self._pieces, self.answer = pieces, answer

    def __iter__(self) -> Iterator[str]:
        """The pieces, as they come."""
        return self._pieces


def ask(
    model: Model,
    reading: Reading,
    question: str | Messages,
    *,
    max_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop: tuple[str, ...] = (),
    least: Least | None = LEAST,
    num_passages: int = 3,
) -> Asking:
    """Answer a question from what was read. The reading stays as it is.

    Args:
        model: The one that read.
        reading: From `respike.documents.read` or `load_reading`.
        question: Text, or a conversation that begins with a question.
        max_tokens: Of the answer.
        sampling: How tokens are chosen.
        stop: Strings that end the answer.
        least: What an answer must reach, else it counts as not found; None judges nothing and
            holds nothing back.
        num_passages: How many to name; 0 does not look.

    Raises:
        UsageError: An empty question.
    """
    if isinstance(question, str):
        if not question.strip():
            raise UsageError("the question is empty")
        question = [{"role": "user", "content": question}]
    prompt = after_document(model.tokenizer, question)
    answer = Answer(least=least, retrieval=keeps_all(model.config), prompt_tokens=len(prompt))
    text = stream(
        model,
        prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop,
        state=reading.state.clone(),
    )
    look = Attention(reading.begin_token, reading.num_tokens)
    steps = _observed(model, text, look) if num_passages and answer.retrieval else iter(text)
    return Asking(
        _pieces(model, reading, prompt, text, steps, (answer, look, num_passages)), answer
    )


def _observed(model: Model, text: TextStream, look: Attention) -> Iterator[str]:
    """The pieces of ``text``, looked at while the first are made."""
    pieces = iter(text)
    while len(text.result.tokens) < OBSERVED_STEPS:
        with observing(model.decoder, look):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece
    yield from pieces


def _pieces(
    model: Model,
    reading: Reading,
    prompt: list[int],
    text: TextStream,
    steps: Iterator[str],
    about: tuple[Answer, Attention, int],
) -> Iterator[str]:
    answer, look, num_passages = about
    held: list[str] = []
    judged = answer.least is None
    result = text.result
    for piece in steps:
        held.append(piece)
        if not judged and len(result.tokens) >= JUDGED_TOKENS:
            judged = True
            _judge(model, prompt, text, answer)
            if not answer.found:
                break
        if judged:
            yield from held
            held = []
    if not judged:
        _judge(model, prompt, text, answer)
    answer.completion_tokens = len(result.tokens)
    answer.document_share, answer.layer_shares = look.document_share, look.layer_shares()
    if answer.found:
        yield from held
        answer.text, answer.finish_reason = result.text.strip(), result.finish_reason
        answer.passages = passages(reading, look, model.tokenizer, num_passages)
    else:
        answer.withheld = "".join(held).strip()
        answer.text, answer.finish_reason = NOT_FOUND, "not_found"
        yield NOT_FOUND


def _judge(model: Model, prompt: list[int], text: TextStream, answer: Answer) -> None:
    least, result = answer.least, text.result
    assert least is not None
    logprobs = result.logprobs[:JUDGED_TOKENS]
    answer.evidence = evidence(model, prompt, result.tokens, result.logprobs)
    answer.confidence = sum(logprobs) / max(1, len(logprobs))
    answer.found = answer.evidence >= least.evidence and answer.confidence >= least.confidence


def evidence(model: Model, prompt: list[int], tokens: list[int], logprobs: list[float]) -> float:
    """Nats a token by which the documents make the beginning of an answer likelier.

    Args:
        model: The one that answered.
        prompt: What followed the documents.
        tokens: Of the answer.
        logprobs: Of these, with the documents.

    Returns:
        0 for no tokens.
    """
    tokens, logprobs = tokens[:JUDGED_TOKENS], logprobs[:JUDGED_TOKENS]
    if not tokens:
        return 0.0
    without = score(model, before_document(model.tokenizer) + prompt, tokens)
    return (sum(logprobs) - sum(without)) / len(tokens)


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
