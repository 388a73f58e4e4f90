"""What the engine is asked for, and what it answers: plain data, no HTTP and no threads."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from respike.documents.passages import Attention
from respike.documents.prompt import NOT_FOUND
from respike.generation import Sampling, Writer, choose
from respike.loading import Model
from respike.models.state import DecoderState
from respike.server.grammar import Grammar
from respike.server.judged import Judged


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the likeliest there were, by the model alone.

    Attributes:
        token: Its id.
        logprob: In nats.
        top: (id, logprob) of the likeliest, most first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """Some more text of a choice; perhaps none yet, when a token makes no whole character."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class End:
    """A choice is complete: stop or length."""

    choice: int
    reason: str
    tokens: int


@dataclass(frozen=True)
class Failure:
    """Nothing more will come.

    Attributes:
        status: Of HTTP.
        code: What programs look at.
        message: What people read.
    """

    status: int
    code: str
    message: str


Event = Piece | End | Failure


@dataclass
class Pace:
    """When tokens of the first choice were made, by `time.monotonic`; not when they were sent."""

    first: float = 0.0
    last: float = 0.0
    tokens: int = 0

    def mark(self) -> None:
        """One more."""
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.tokens += 1

    @property
    def tokens_per_second(self) -> float:
        """After the first; 0 where there are none."""
        passed = self.last - self.first
        return (self.tokens - 1) / passed if passed > 0 else 0.0


@dataclass
class Job:
    """One request to the model.

    Attributes:
        prompt: Token ids; at least one.
        samplings: One for each choice.
        max_tokens: Of each choice.
        deliver: Called from the engine's thread with each event.
        deadline: When to give up, by `time.monotonic`.
        stop: Strings that end a choice.
        top_logprobs: How many of the likeliest tokens to tell; None tells no logprobs.
        grammar: What every choice has to fit.
        start: Makes the state that the prompt follows; None: the beginning.
        start_tokens: How many tokens that state has seen.
        base: Names that state, for the cache.
        look: Adds up where the first choice looks.
        judged: Whether the answer, then the only one, is the document's; it is held back till then.
        keep: Whether the end of the first choice may be the beginning of another prompt.
        cancelled: Set it, and the job ends without another event.
        cached_tokens: Tokens of the prompt that did not have to be read.
        reserved_bytes: Of state that it may come to need.
        pace: How fast the first choice was made.
    """

    prompt: list[int]
    samplings: list[Sampling]
    max_tokens: int
    deliver: Callable[[Event], None]
    deadline: float
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    grammar: Grammar | None = None
    start: Callable[[], DecoderState] | None = None
    start_tokens: int = 0
    base: str = ""
    look: Attention | None = None
    judged: Judged | None = None
    keep: bool = False
    cancelled: bool = False
    cached_tokens: int = 0
    reserved_bytes: int = 0
    pace: Pace = field(default_factory=Pace)

    @property
    def tokens_at_most(self) -> int:
        """How long its state may get."""
        return self.start_tokens + len(self.prompt) + self.max_tokens


@dataclass
class Sequence:
    """One choice of a job, being made.

    Attributes:
        job: Of which.
        index: Which choice.
        tokens: Made so far.
        ended: Whether nothing more will come.
    """

    job: Job
    index: int
    model: Model
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        """Its own randomness and its own text."""
        self.sampling = self.job.samplings[self.index]
        self._draw = torch.Generator().manual_seed(self.sampling.seed)
        self._writer = Writer(self.model, self.job.stop)
        self._grammar = self.job.grammar.copy() if self.job.grammar else None
        self._held: list[Event] | None = [] if self.job.judged else None

    def take(self, logits: Tensor) -> None:
        """Choose the next token from logits (V,), and tell what it makes."""
        job, plain = self.job, logits
        if self.index == 0:
            job.pace.mark()
        if self._grammar is not None:
            logits = self._grammar.mask(logits)
        seen = job.prompt + self.tokens if self.sampling.repetition_penalty != 1 else []
        token = choose(logits, seen, self.sampling, self._draw)
        if self._grammar is not None:
            self._grammar.take(token)
        text = self._writer.push(token)
        if self._writer.stopped and token in self._writer.end_ids:
            self._end()
            return
        self.tokens.append(token)
        told = () if job.top_logprobs is None else (_logprobs(plain, token, job.top_logprobs),)
        if text or told:
            self._deliver(Piece(self.index, text, told))
        if self._held is not None and self._enough(token, plain):
            self._judge()
        over = self._writer.stopped or (self._grammar is not None and self._grammar.ended)
        if not self.ended and (over or len(self.tokens) >= job.max_tokens):
            self._end(over)

    def _end(self, over: bool = True) -> None:
        rest = self._writer.finish()
        if rest:
            self._deliver(Piece(self.index, rest))
        if self._held is not None:
            self._judge()
        if not self.ended:
            reason = "stop" if over or self._writer.stopped else "length"
            self._deliver(End(self.index, reason, len(self.tokens)))
        self.ended = True

    def _deliver(self, event: Event) -> None:
        if self._held is None:
            self.job.deliver(event)
        else:
            self._held.append(event)

    def _enough(self, token: int, plain: Tensor) -> bool:
        judged = self.job.judged
        assert judged is not None
        return judged.take(token, float(plain.float().log_softmax(-1)[token]))

    def _judge(self) -> None:
        """Let go what was held back, or end with other words."""
        judged, held = self.job.judged, self._held or []
        assert judged is not None
        self._held = None
        if not judged.judge(self.model).found:
            judged.withheld = "".join(e.text for e in held if isinstance(e, Piece)).strip()
            self.job.keep, self.ended = False, True
            held = [Piece(self.index, NOT_FOUND), End(self.index, "stop", len(self.tokens))]
        for event in held:
            self.job.deliver(event)


def _logprobs(logits: Tensor, token: int, count: int) -> TokenLogprob:
    logprobs = logits.float().log_softmax(-1)
    top = logprobs.topk(min(count, len(logprobs))) if count else None
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True) if top else ()
    return TokenLogprob(token, float(logprobs[token]), tuple(pairs))
