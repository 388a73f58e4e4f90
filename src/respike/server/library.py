"""Documents that clients sent: read in the background, held in memory, never written anywhere."""

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from respike.documents.reader import reading_steps, start_reading
from respike.documents.reading import Reading
from respike.documents.sources import TokenizedSource
from respike.loading import Model


@dataclass
class Document:
    """One of them.

    Attributes:
        name: As the client calls it.
        num_bytes: Of what was sent.
        id: As we call it.
        status: reading, ready or failed.
        tokens: Of the whole; 0 while it is not known.
        tokens_read: Up to now.
        reading: When it is ready.
        error: Why it failed.
    """

    name: str
    num_bytes: int
    id: str = field(default_factory=lambda: f"doc-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    status: str = "reading"
    tokens: int = 0
    tokens_read: int = 0
    seconds: float = 0.0
    state_bytes: int = 0
    reading: Reading | None = None
    error: str | None = None
    deleted: bool = False

    def facts(self) -> dict[str, Any]:
        """As clients see it."""
        return {
            "id": self.id,
            "object": "document",
            "name": self.name,
            "bytes": self.num_bytes,
            "created_at": self.created,
            "status": self.status,
            "tokens": self.tokens,
            "tokens_read": self.tokens_read,
            "seconds": self.seconds,
            "state_bytes": self.state_bytes,
            "error": self.error,
        }

    def read(self, model: Model, source: TokenizedSource) -> Iterator[None]:
        """Read it a layer of a chunk at a time; its facts follow."""
        work = start_reading(model, layers=1)
        for _ in reading_steps(work, [source]):
            self.tokens_read = min(self.tokens, work.seen)
            self.state_bytes = work.reading.state.nbytes()
            yield
        self.reading = work.as_is()
        self.tokens_read = self.tokens
        self.status = "ready"

    def fail(self, reason: str) -> None:
        """It cannot be read."""
        self.status, self.error = "failed", reason
