"""What a server allows; every limit in one place."""

from dataclasses import dataclass

from respike.documents.judging import LEAST, Least


@dataclass(frozen=True)
class Settings:
    """Limits of a server.

    Attributes:
        api_key: What clients must send as a bearer token; None asks for none.
        hosts: Names it answers to when no key is asked for, so that no web page reaches it by a
            name of its own; empty: all.
        max_streams: Choices that are made at once.
        max_waiting: Requests that may wait for a place.
        max_state_bytes: Of all sequences at their longest, documents apart.
        max_prompt_tokens: Of one request.
        max_output_tokens: Of one choice.
        max_body_bytes: Of a request, documents apart.
        max_document_bytes: Of one uploaded document.
        max_documents_bytes: States of all documents together.
        prefix_bytes: States of prompts read before.
        timeout_seconds: For a request, from its arrival to its end.
        grace_seconds: For running requests when the server is asked to stop.
        least: What an answer about a document must reach, else it counts as not found.
    """

    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    max_streams: int = 32
    max_waiting: int = 64
    max_state_bytes: int = 4 << 30
    max_prompt_tokens: int = 131_072
    max_output_tokens: int = 16_384
    max_body_bytes: int = 8 << 20
    max_document_bytes: int = 64 << 20
    max_documents_bytes: int = 4 << 30
    prefix_bytes: int = 1 << 30
    timeout_seconds: float = 600.0
    grace_seconds: float = 20.0
    least: Least = LEAST
