"""Reading: sources through a model into a `Reading`, in bounded memory, resumable after a kill.

Tokens are worked on in chunks that end at multiples of `PREFILL_CHUNK_TOKENS`, and a reading is
only ever kept between two chunks. So one that was interrupted and taken up again is the same, bit
for bit, as one that was not.
"""

import hashlib
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from respike.documents.prompt import SEPARATOR, before_document
from respike.documents.reading import Read, Reading, keeps_all, load_reading, made_by
from respike.documents.sources import Source
from respike.errors import DataError
from respike.loading import Model
from respike.models.decoder import PREFILL_CHUNK_TOKENS

KEEP_SHARE = 20
"""Keeping a reading may take one part in this many of the time."""

Step = Callable[[int, int], None]
"""Called with (tokens read, bytes of state) after each chunk."""


def read(
    model: Model,
    sources: Sequence[Source],
    *,
    base: Reading | None = None,
    kept: Reading | None = None,
    keep: "Keeper | None" = None,
    step: Step | None = None,
) -> Reading:
    """Read sources to their ends.

    Args:
        model: What reads.
        sources: What is read.
        base: A reading to go on from; consumed.
        kept: What `keep` left of an interrupted call with the same arguments; consumed.
        keep: Writes the reading to disk every now and then.
        step: Told about progress.

    Raises:
        DataError: A source cannot be read; nothing is in any; or ``kept`` is not of these.
    """
    work = _Work(model, base, kept)
    for done in reading_steps(work, sources):
        if done and keep is not None:
            keep(work.as_is())
        if done and step is not None:
            step(work.seen, work.reading.state.nbytes())
    return work.as_is()


def reading_steps(work: "_Work", sources: Sequence[Source]) -> Iterator[bool]:
    """Read chunk by chunk: yields True when there is more to keep, after a chunk's last layer.

    False: the chunk was known already, or these were some of its layers.
    """
    tokenizer = work.model.tokenizer
    yield from work.run_whole_chunks()
    for number, source in enumerate(sources, start=len(work.reading.sources)):
        if number:
            work.waiting += tokenizer.encode(SEPARATOR, bos=False)
        begin = work.end
        for tokens in source.tokens(tokenizer):
            for index, byte, place in tokens.points:
                work.reading.points.extend((work.end + index, number, byte, place))
            work.waiting += tokens.ids
            yield from work.run_whole_chunks()
        if work.end == begin:
            raise DataError(f"{source.name}: there is no text in it")
        work.reading.sources.append(
            Read(
                source.name, source.unit, source.num_bytes, source.sha256, source.text_bytes,
                begin, work.end,
            )
        )  # fmt: skip
    yield from work.run_rest()


def start_reading(model: Model, layers: int) -> "_Work":
    """For `reading_steps`, from the beginning, with a pause after so many layers of a chunk."""
    return _Work(model, None, None, layers)


class _Work:
    """Tokens on their way into the state."""

    def __init__(
        self, model: Model, base: Reading | None, kept: Reading | None, layers: int | None = None
    ) -> None:
        self.model, self.kept = model, kept
        self.layers = layers or len(model.decoder.layers)
        self.digest = hashlib.sha256()
        self.waiting: list[int] = []
        self.seen = 0
        if base is None:
            self.waiting = before_document(model.tokenizer)
            tokens: array[int] | None = array("i") if keeps_all(model.config) else None
            state = model.decoder.init_state()
            self.reading = Reading(state, made_by(model), len(self.waiting), tokens=tokens)
        else:
            self.reading, self.seen = base, base.num_tokens
            self.digest.update(base.stream.encode())
        if kept is not None and kept.num_tokens <= self.seen:
            self.kept = None  # the base got that far

    @property
    def end(self) -> int:
        """The number of the next token."""
        return self.seen + len(self.waiting)

    def run_whole_chunks(self) -> Iterator[bool]:
        """Work on as many whole chunks as are waiting; see `reading_steps`."""
        while len(self.waiting) >= (
            room := PREFILL_CHUNK_TOKENS - self.seen % PREFILL_CHUNK_TOKENS
        ):
            chunk, self.waiting = self.waiting[:room], self.waiting[room:]
            yield from self._run(chunk)

    def run_rest(self) -> Iterator[bool]:
        """Work on what is left."""
        if self.waiting:
            chunk, self.waiting = self.waiting, []
            yield from self._run(chunk)
        if self.kept is not None:
            raise DataError(
                f"an interrupted reading of {self.kept.num_tokens} tokens is longer than these "
                f"sources of {self.seen}", hint=OTHER_SOURCES,
            )  # fmt: skip

    def _run(self, chunk: list[int]) -> Iterator[bool]:
        ids = torch.tensor([chunk], dtype=torch.int64)
        self.digest.update(ids.to(torch.int32).numpy().tobytes())
        if self.reading.tokens is not None:
            self.reading.tokens.extend(chunk)
        self.seen += len(chunk)
        if self.kept is not None:
            self._skip(self.kept)
            yield False
            return
        decoder = self.model.decoder
        tokens = ids.to(decoder.embedding.device)
        turns, after = decoder.turns(tokens, self.reading.state, self.layers), None
        while after is None:
            with torch.inference_mode():
                _, after = next(turns)
            self.reading.state = after or self.reading.state
            yield after is not None

    def _skip(self, kept: Reading) -> None:
        """These tokens were read before the interruption."""
        if self.seen < kept.num_tokens:
            return
        if self.seen > kept.num_tokens or self.digest.hexdigest() != kept.stream:
            raise DataError(
                f"an interrupted reading of {kept.num_tokens} tokens is of other sources than "
                f"these, or they were changed since", hint=OTHER_SOURCES,
            )  # fmt: skip
        self.reading.state, self.kept = kept.state, None

    def as_is(self) -> Reading:
        """What was read up to now."""
        return replace(self.reading, stream=self.digest.hexdigest())


OTHER_SOURCES = "name the same sources again, or remove the .partial file to start anew"


@dataclass
class Keeper:
    """Writes a reading beside its file-to-be, as often as it is cheap.

    Args:
        path: Of the finished file; see `partial`.
        fingerprint: Of the model.
        every_seconds: At least this long between two.
    """

    path: Path
    fingerprint: str
    every_seconds: float = 30.0

    def __post_init__(self) -> None:
        """The first is due after the first pause."""
        self.due = time.monotonic() + self.every_seconds

    @property
    def partial(self) -> Path:
        """Where the reading is kept until it is finished."""
        return self.path.with_name(f"{self.path.name}.partial")

    def __call__(self, reading: Reading) -> None:
        """Write, if it is time."""
        began = time.monotonic()
        if began < self.due:
            return
        reading.save(self.partial, self.fingerprint)
        now = time.monotonic()
        self.due = now + max(self.every_seconds, KEEP_SHARE * (now - began))

    def take_up(self, model: Model) -> Reading | None:
        """What an interrupted run left, or None."""
        return load_reading(self.partial, model) if self.partial.exists() else None

    def finish(self, reading: Reading) -> None:
        """Write the finished file and remove what was kept for it."""
        reading.save(self.path, self.fingerprint)
        self.partial.unlink(missing_ok=True)
