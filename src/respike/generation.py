"""Text out: sampling, streaming, stopping. One sequence at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from respike.errors import UsageError
from respike.loading import Model
from respike.models.state import DecoderState


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy.

    Applied in this order: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: 0 is greedy; 1 samples from the model's distribution.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the fewest tokens whose probabilities reach top_p.
        min_p: Keep tokens at least min_p times as likely as the likeliest.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen before.
        seed: Equal seeds give equal text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        checks = [
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("seed", 0 <= self.seed < 1 << 63, "from 0 to 2^63 - 1"),
        ]
        for name, good, expected in checks:
            if not good:
                raise UsageError(f"{name} is {getattr(self, name)}, expected {expected}")


def choose(logits: Tensor, seen: Sequence[int], sampling: Sampling, draw: torch.Generator) -> int:
    """The next token from logits (V,), given the tokens ``seen`` so far."""
    logits = logits.float().cpu()
    if sampling.repetition_penalty != 1 and seen:
        index = torch.tensor(sorted(set(seen)))
        old = logits[index]
        p = sampling.repetition_penalty
        logits = logits.index_put((index,), torch.where(old > 0, old / p, old * p))
    if sampling.temperature == 0:
        return int(logits.argmax())
    # From the largest down and in float64: no temperature, however small, overflows.
    scaled = (logits - logits.max()).double() / sampling.temperature
    values, order = _likeliest(scaled, sampling)
    probs = values.softmax(-1) if sampling.top_k else values.exp() / scaled.exp().sum()
    if sampling.top_p < 1:
        probs = probs.where(probs.cumsum(-1) - probs < sampling.top_p, 0)
    if sampling.min_p:
        probs = probs.where(probs >= sampling.min_p * probs.max(), 0)
    at = _drawn(probs, draw)
    return at if order is None else int(order[at])


NUCLEUS_TOKENS = 512
"""Ranked first for top-p: to rank a whole vocabulary takes longer than a step of a small model."""


def _likeliest(scaled: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Those of logits (V,) that may be kept, likeliest first, and their ids; or all as they are."""
    count = min(sampling.top_k, len(scaled))
    if not count:
        if sampling.top_p == 1:
            return scaled, None
        weights = scaled.exp()
        count = min(NUCLEUS_TOKENS, len(scaled))
        if float(weights.topk(count).values.sum() / weights.sum()) < sampling.top_p:
            count = len(scaled)
    # Equal ones in the order of their ids, which topk alone does not promise.
    index = torch.nonzero(scaled >= scaled.topk(count).values[-1])[:, 0]
    values, rank = scaled[index].sort(descending=True, stable=True)
    return values[:count], index[rank[:count]]


def _drawn(weights: Tensor, draw: torch.Generator) -> int:
    """An index by its weight, float64 (N,), from one random number."""
    reached = weights.cumsum(-1)
    wanted = torch.rand(1, dtype=torch.float64, generator=draw) * reached[-1]
    at = int(torch.searchsorted(reached, wanted, right=True))
    return at if at < len(weights) else int(torch.nonzero(weights)[-1])  # rounded up to the sum


@dataclass
class Generation:
    """What came out, and how it ended."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of each token, by the model alone: before penalties, temperature and the like."""
    text: str = ""
    finish_reason: str = "length"
    """length: max_tokens reached. stop: an end token or a stop string."""
    state: DecoderState | None = None
    """State after every token but the last chosen one, to continue from."""


class TextStream:
    """Iterate over pieces of text; afterwards `result` holds the whole.

    Pieces are whole UTF-8 characters. Text that might be the beginning of a stop string is held
    back until it is known not to be.
    """

    def __init__(self, pieces: Iterator[str], result: Generation) -> None:
        self._pieces, self.result = pieces, result

    def __iter__(self) -> Iterator[str]:
        """The pieces, as they come."""
        return self._pieces


def stream(
    model: Model,
    prompt: Sequence[int],
    *,
    max_tokens: int = 256,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    state: DecoderState | None = None,
) -> TextStream:
    """Generate text token by token.

    Args:
        model: From `respike.load`.
        prompt: Token ids, at least one.
        max_tokens: Most tokens to generate.
        sampling: How to choose them.
        stop: Strings that end the text and are not part of it.
        state: What came before the prompt; consumed.

    Raises:
        UsageError: An empty prompt, or an empty stop string.
    """
    if not prompt:
        raise UsageError("the prompt is empty: there is nothing to continue")
    if "" in stop:
        raise UsageError("an empty stop string would stop before the first token")
    result = Generation(state=state)
    return TextStream(_pieces(model, list(prompt), max_tokens, sampling, stop, result), result)


class Writer:
    """Tokens in, text out: whole characters, nothing of a stop string, ended by one.

    Args:
        model: Whose tokens they are.
        stop: Strings that end the text and are not part of it.
    """

    def __init__(self, model: Model, stop: Sequence[str]) -> None:
        self._decoding, self._stop = model.tokenizer.stream(), stop
        self.end_ids = {*model.tokenizer.eos_token_ids, *model.config.eos_token_ids}
        self._held, self._cut = "", False
        self.stopped = False
        """Whether an end token or a stop string came."""

    def push(self, token: int) -> str:
        """Take a token; return what can be shown by now."""
        if token in self.end_ids:
            self.stopped = True
            return ""
        self._held += self._decoding.push(token)
        cut = _first_stop(self._held, self._stop)
        if cut is not None:
            self.stopped = self._cut = True
            self._held = self._held[:cut]
            return ""
        safe = len(self._held) - _may_begin_stop(self._held, self._stop)
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def finish(self) -> str:
        """What is left when no further token comes."""
        if not self._cut:
            self._held += self._decoding.flush()
            cut = _first_stop(self._held, self._stop)
            if cut is not None:
                self.stopped, self._held = True, self._held[:cut]
        shown, self._held = self._held, ""
        return shown


def _pieces(
    model: Model,
    seen: list[int],
    max_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    result: Generation,
) -> Iterator[str]:
    decoder, writer = model.decoder, Writer(model, stop)
    draw = torch.Generator().manual_seed(sampling.seed)
    new = seen
    for _ in range(max_tokens):
        with torch.inference_mode():
            tokens = torch.tensor([new], device=decoder.embedding.device)
            logits, result.state = decoder(tokens, result.state, logits="last")
            token = choose(logits[0, 0], seen, sampling, draw)
            logprob = float(logits[0, 0].float().log_softmax(-1)[token])
        shown = writer.push(token)
        if writer.stopped and token in writer.end_ids:
            break
        new = [token]
        seen.append(token)
        result.tokens.append(token)
        result.logprobs.append(logprob)
        if writer.stopped:
            break
        if shown:
            result.text += shown
            yield shown
    shown = writer.finish()
    if writer.stopped:
        result.finish_reason = "stop"
    result.text += shown
    yield shown


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string in ``text`` begins."""
    return min((at for s in stop if (at := text.find(s)) >= 0), default=None)


def _may_begin_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that begins a stop string."""
    lengths = (n for s in stop for n in range(len(s) - 1, 0, -1) if text.endswith(s[:n]))
    return max(lengths, default=0)


def generate(model: Model, prompt: str, **options: object) -> str:
    """The text that follows ``prompt``; options as for `stream`."""
    text = stream(model, model.tokenizer.encode(prompt), **options)  # type: ignore[arg-type]
    return "".join(text)
