"""Asking: an answer from a reading, where it comes from, and whether it is in there at all.

An answer is held back until `JUDGED_TOKENS` of it are there and were judged, see
`respike.documents.judging`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from respike.documents.judging import JUDGED_TOKENS, LEAST, Least, judge, without_document
from respike.documents.passages import (
    OBSERVED_STEPS,
    Attention,
    Passage,
    observing,
    passages,
)
from respike.documents.prompt import NOT_FOUND, Messages, after_document
from respike.documents.reading import Reading, keeps_all
from respike.errors import UsageError
from respike.generation import Sampling, TextStream, stream
from respike.loading import Model

GREEDY = Sampling()


@dataclass
class Answer:
    """What came out.

    Attributes:
        text: The answer, or `NOT_FOUND`.
        found: Whether it reaches ``least``.
        evidence: See `respike.documents.judging.Least`.
        confidence: See `respike.documents.judging.Least`.
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
    assert answer.least is not None
    tokens, logprobs = text.result.tokens, text.result.logprobs
    verdict = judge(answer.least, logprobs, without_document(model, prompt, tokens))
    answer.found = verdict.found
    answer.evidence, answer.confidence = verdict.evidence, verdict.confidence
