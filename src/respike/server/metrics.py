"""Figures of a running server, in Prometheus' words."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one server; each has its own registry, so several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made = self.registry
        self.requests = Counter(
            "respike_requests", "Requests answered.", ["route", "status"], registry=made
        )
        self.prompt_tokens = Counter("respike_prompt_tokens", "Tokens of prompts.", registry=made)
        self.cached_tokens = Counter(
            "respike_cached_tokens",
            "Of these, not read again: their state was known.",
            registry=made,
        )
        self.document_tokens = Counter(
            "respike_document_tokens", "Tokens of documents read.", registry=made
        )
        self.output_tokens = Counter("respike_output_tokens", "Tokens generated.", registry=made)
        self.failures = Counter(
            "respike_failures", "Jobs that ended early.", ["code"], registry=made
        )
        self.running = Gauge("respike_running_sequences", "Choices being made.", registry=made)
        self.waiting = Gauge(
            "respike_waiting_requests", "Requests waiting for a place.", registry=made
        )
        self.state_bytes = Gauge(
            "respike_state_bytes", "Reserved by running requests.", registry=made
        )
        self.prefix_bytes = Gauge("respike_prefix_bytes", "States of known prompts.", registry=made)
        self.documents = Gauge("respike_documents", "Documents held.", registry=made)
        self.first_token = Histogram(
            "respike_first_token_seconds", "From a request's arrival to its first token.",
            buckets=SECONDS, registry=made,
        )  # fmt: skip
        self.step = Histogram(
            "respike_step_seconds", "A decoding step of a batch.", buckets=SECONDS, registry=made
        )

    def text(self) -> bytes:
        """All of them."""
        return bytes(generate_latest(self.registry))
