"""The engine's thread: takes turns between decoding, prompts and documents.

Every turn is one token for all running sequences, then some layers of one chunk of a prompt or of a
document: as many as take about as long as the token took. So a long prompt delays running streams
by `READ_SECONDS` or by a token's time, whatever the machine; and as a chunk is the same chunk
however its layers are spread over turns, it changes no bit of an answer.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch

from respike.account import state_bytes
from respike.documents.sources import TokenizedSource
from respike.errors import RespikeError
from respike.loading import Model
from respike.models.state import DecoderState
from respike.server.batch import Batches
from respike.server.errors import report
from respike.server.jobs import Failure, Job, Sequence
from respike.server.library import Document
from respike.server.metrics import Metrics
from respike.server.prefill import Prefill
from respike.server.prefix_cache import PrefixCache
from respike.server.settings import Settings

READ_SECONDS = 0.05
"""Of reading, between two tokens of those that run, if a token takes no longer itself."""
SPEED_SECONDS = 2.0
DOCUMENT_TURN = 4
"""While prompts wait too, a document gets every fourth turn."""


class Scheduler(threading.Thread):
    """The one thread that runs the model.

    Args:
        model: What runs.
        settings: The limits.
        metrics: The figures.
    """

    def __init__(self, model: Model, settings: Settings, metrics: Metrics) -> None:
        super().__init__(name="respike-engine", daemon=True)
        self.model, self.settings, self.metrics = model, settings, metrics
        self.cache = PrefixCache(settings.prefix_bytes)
        self.batches = Batches(model)
        self._new: queue.SimpleQueue[Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: deque[Prefill] = deque()
        self._prefills: deque[Prefill] = deque()
        self._reading: deque[tuple[Document, Iterator[None]]] = deque()
        self._num_threads = torch.get_num_threads()  # torch counts them for each thread
        self._made: deque[tuple[float, int]] = deque(maxlen=1000)
        self._turn = 0
        self._stopping = False

    # What other threads call.

    def submit(self, job: Job) -> Failure | None:
        """Take a job, or say why not."""
        if self._stopping:
            return Failure(503, "shutting_down", "the server is shutting down")
        if self.load >= self.settings.max_waiting + self.settings.max_streams:
            return Failure(429, "overloaded", "too many requests are waiting; try again later")
        job.reserved_bytes = self._reserve(job)
        if job.reserved_bytes > self.settings.max_state_bytes:
            return Failure(
                400, "context_too_large",
                f"prompt and answer of {job.tokens_at_most} tokens need more state than this "
                "server allows",
            )  # fmt: skip
        self._new.put(job)
        return None

    def read(self, document: Document, source: TokenizedSource) -> None:
        """Read a document when there is time."""
        document.tokens = source.num_tokens
        steps = document.read(self.model, source)
        self._new.put(lambda: self._reading.append((document, steps)))

    def call(self, work: Callable[[], None]) -> None:
        """Have something done in the engine's thread."""
        self._new.put(work)

    def stop(self) -> None:
        """End when running jobs have ended."""
        self._stopping = True
        self._new.put(None)

    @property
    def load(self) -> int:
        """Requests that wait or are read, and sequences that run."""
        return self._new.qsize() + len(self._waiting) + len(self._prefills) + len(self.batches)

    def tokens_per_second(self) -> float:
        """Of all sequences, over the last two seconds."""
        now = time.monotonic()
        recent = [count for at, count in list(self._made) if now - at < SPEED_SECONDS]
        return sum(recent) / SPEED_SECONDS

    def _reserve(self, job: Job) -> int:
        size = self.model.decoder.embedding.element_size()
        return len(job.samplings) * state_bytes(self.model.config, job.tokens_at_most, size)

    # The thread.

    def run(self) -> None:
        """Work until `stop`."""
        torch.set_num_threads(self._num_threads)
        while True:
            if not self._take_new():
                return
            self._expire()
            self._admit()
            began = time.monotonic()
            self._decode()
            self._read_for(max(READ_SECONDS, time.monotonic() - began))
            self._tell()

    def _busy(self) -> bool:
        return bool(self._waiting or self._prefills or self._reading or len(self.batches))

    def _take_new(self) -> bool:
        while True:
            if self._stopping and not (self._waiting or self._prefills or len(self.batches)):
                return False
            try:
                item = self._new.get(block=not self._busy())
            except queue.Empty:
                return True
            if isinstance(item, Job):
                self._waiting.append(Prefill(item, self.model, self.cache))
            elif item is not None:
                self._guard([], item)

    def _running(self) -> list[Job]:
        """Jobs whose state is held, each once."""
        found = {id(prefill.job): prefill.job for prefill in self._prefills}
        found |= {id(row.job): row.job for row in self.batches.members()}
        return list(found.values())

    def _expire(self) -> None:
        now = time.monotonic()
        for job in (*(p.job for p in self._waiting), *self._running()):
            if now > job.deadline and not job.cancelled:
                self._fail(job, Failure(504, "timeout", "the request took too long"))
        for waiting in (self._waiting, self._prefills):
            for prefill in [p for p in waiting if p.job.cancelled]:
                waiting.remove(prefill)
        for reading in [r for r in self._reading if r[0].deleted]:
            self._reading.remove(reading)

    def _admit(self) -> None:
        """Let those that wait begin, first come first served, while there is room."""
        while self._waiting:
            running, job = self._running(), self._waiting[0].job
            places = sum(len(other.samplings) for other in running)
            reserved = sum(other.reserved_bytes for other in running)
            full = places + len(job.samplings) > self.settings.max_streams
            if running and (full or reserved + job.reserved_bytes > self.settings.max_state_bytes):
                return
            self._prefills.append(self._waiting.popleft())

    def _decode(self) -> None:
        for batch in self.batches:
            began = time.monotonic()
            jobs = [row.job for row in batch.members()]
            kept: list[tuple[Sequence, DecoderState]] = []
            before = sum(len(row.tokens) for row in batch.members())
            rows = list(batch.members())
            self._guard(jobs, lambda b=batch, k=kept: k.extend(b.step()))  # type: ignore[misc]
            self.metrics.step.observe(time.monotonic() - began)
            made = sum(len(row.tokens) for row in rows) - before
            self.metrics.output_tokens.inc(made)
            self._made.append((time.monotonic(), made))
            for row, state in kept:
                said = row.job.prompt + row.tokens
                seen = state.num_tokens - row.job.start_tokens
                self.cache.put(row.job.base, said[:seen], state)

    def _read_for(self, seconds: float) -> None:
        """Read prompts and documents for about so long."""
        until = time.monotonic() + seconds
        while (self._prefills or self._reading) and time.monotonic() < until:
            self._read_some()

    def _read_some(self) -> None:
        """A layer of a chunk."""
        self._turn += 1
        documents = self._turn % DOCUMENT_TURN == 0 or not self._prefills
        if self._reading and documents:
            self._read_document()
        elif self._prefills:
            prefill = self._prefills.popleft()
            self._guard([prefill.job], lambda: self._read_prompt(prefill))

    def _read_prompt(self, prefill: Prefill) -> None:
        going = prefill.advance()
        if going is None:
            back = self._prefills.append if prefill.between_chunks else self._prefills.appendleft
            back(prefill)  # others have their turn after a chunk
            return
        self.metrics.first_token.observe(time.monotonic() - prefill.arrived)
        self.metrics.prompt_tokens.inc(len(prefill.job.prompt))
        self.metrics.cached_tokens.inc(prefill.job.cached_tokens)
        for row, state in going:
            self.batches.add(row, state)

    def _read_document(self) -> None:
        document, steps = self._reading[0]
        began, before = time.monotonic(), document.tokens_read
        try:
            next(steps)
        except StopIteration:
            self._reading.popleft()
        except RespikeError as error:
            document.fail(str(error))
            self._reading.popleft()
        except Exception as error:
            document.fail("it could not be read")
            self._reading.popleft()
            report(error)
        document.seconds += time.monotonic() - began
        self.metrics.document_tokens.inc(document.tokens_read - before)

    def _guard(self, jobs: list[Job], work: Callable[[], object]) -> None:
        """Do something; whatever goes wrong ends these jobs and nothing else."""
        try:
            work()
        except RespikeError as error:
            for job in jobs:
                self._fail(job, Failure(400, "invalid_request", str(error)))
        except Exception as error:
            report(error)
            for job in jobs:
                self._fail(job, Failure(500, "internal_error", "the model failed on this request"))

    def _fail(self, job: Job, failure: Failure) -> None:
        if not job.cancelled:
            self.metrics.failures.labels(failure.code).inc()
            job.cancelled = True
            job.deliver(failure)

    def _tell(self) -> None:
        self.metrics.running.set(len(self.batches))
        self.metrics.waiting.set(len(self._waiting) + len(self._prefills))
        self.metrics.state_bytes.set(sum(job.reserved_bytes for job in self._running()))
        self.metrics.prefix_bytes.set(self.cache.held_bytes)
