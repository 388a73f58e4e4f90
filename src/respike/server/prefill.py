"""A prompt on its way into a state, a layer of a chunk at a time."""

import time
from collections.abc import Iterator

import torch

from respike.loading import Model
from respike.models.state import DecoderState
from respike.server.jobs import Job, Sequence
from respike.server.prefix_cache import PrefixCache

CHUNK_TOKENS = 256
"""Of a prompt. Chunks end at multiples of this."""
SNAPSHOT_TOKENS = 2048
"""Prompts leave their state in the cache at multiples of this, and at their last whole chunk."""

Turn = tuple[torch.Tensor, DecoderState | None]


class Chunks:
    """Tokens into a state.

    Args:
        model: Reads.
        ids: What is read; at least one after ``done``.
        state: After ``done`` of them; consumed.
        done: How many are known.

    Attributes:
        state: After ``done`` of them, while no chunk is begun.
        done: How many were read, with those of a chunk that is begun.
        hidden: What came out of the last chunk (1, T, D).
    """

    def __init__(self, model: Model, ids: list[int], state: DecoderState, done: int = 0) -> None:
        self._decoder, self._ids = model.decoder, ids
        self.state, self.done = state, done
        self.hidden = torch.empty(0)
        self._turns: Iterator[Turn] | None = None

    @property
    def between(self) -> bool:
        """Whether no chunk is begun."""
        return self._turns is None

    @property
    def finished(self) -> bool:
        """Whether all is read."""
        return self.between and self.done == len(self._ids)

    def advance(self) -> bool:
        """A layer; whether it was a chunk's last."""
        if self._turns is None:
            begin, step = self.done, CHUNK_TOKENS - self.state.num_tokens % CHUNK_TOKENS
            self.done = min(len(self._ids), begin + step)
            device = self._decoder.embedding.device
            ids = torch.tensor([self._ids[begin : self.done]], device=device)
            self._turns = self._decoder.turns(ids, self.state, 1)
        with torch.inference_mode():
            hidden, state = next(self._turns)
        if state is None:
            return False
        self.hidden, self.state, self._turns = hidden, state, None
        return True


class Prefill:
    """A prompt being read."""

    def __init__(self, job: Job, model: Model, cache: PrefixCache) -> None:
        self.job, self._model, self._cache = job, model, cache
        self.arrived = time.monotonic()
        self._chunks: Chunks | None = None
        self._without: Chunks | None = None
        if job.judged is not None and len(job.judged.prompt) > 1:
            self._without = Chunks(model, job.judged.prompt[:-1], model.decoder.init_state())

    def advance(self) -> list[tuple[Sequence, DecoderState]] | None:
        """Read a layer of a chunk. At the end: the sequences that go on, with states; else None."""
        if self._without is not None and not self._without.finished:
            self._without.advance()
            return None
        if self._chunks is None:
            self._chunks = self._begin()
        if not self._chunks.advance():
            return None
        if not self._chunks.finished:
            self._snapshot(self._chunks)
            return None
        with torch.inference_mode():
            logits = self._model.decoder.head(self._chunks.hidden[:, -1:])
        if self.job.judged is not None:
            init = self._model.decoder.init_state
            self.job.judged.state = self._without.state if self._without else init()
        return self._sequences(logits[0, 0].float().cpu(), self._chunks.state)

    @property
    def between_chunks(self) -> bool:
        """Whether no chunk is begun."""
        return all(part is None or part.between for part in (self._chunks, self._without))

    def _begin(self) -> Chunks:
        found = self._cache.find(self.job.base, self.job.prompt)
        if found is not None:
            self.job.cached_tokens, state = found
            return Chunks(self._model, self.job.prompt, state, found[0])
        start = self.job.start or self._model.decoder.init_state
        return Chunks(self._model, self.job.prompt, start())

    def _snapshot(self, chunks: Chunks) -> None:
        left = len(self.job.prompt) - chunks.done
        if chunks.state.num_tokens % SNAPSHOT_TOKENS == 0 or left <= CHUNK_TOKENS:
            self._cache.put(self.job.base, self.job.prompt[: chunks.done], chunks.state)

    def _sequences(
        self, logits: torch.Tensor, state: DecoderState
    ) -> list[tuple[Sequence, DecoderState]]:
        rows = [Sequence(self.job, index, self._model) for index in range(len(self.job.samplings))]
        for row in rows:
            row.take(logits)
        going = [row for row in rows if not row.ended]
        return [(row, state if row is going[-1] else state.clone()) for row in going]
