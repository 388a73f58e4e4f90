"""What the routes call: requests into jobs, documents in and out, figures for the page."""

import asyncio
import time
from pathlib import PurePath
from typing import Any

from respike.account import state_bytes, state_parts
from respike.documents.passages import Attention, Passage, passages
from respike.documents.prompt import after_document, before_document
from respike.documents.reading import Reading, keeps_all
from respike.documents.sources import TokenizedSource, UploadedSource
from respike.errors import RespikeError
from respike.loading import Model
from respike.server.answers import Answer, Mailbox
from respike.server.errors import ApiError
from respike.server.grammar import Grammar, Grammars
from respike.server.jobs import Job
from respike.server.judged import Judged
from respike.server.library import Document
from respike.server.metrics import Metrics
from respike.server.scheduler import Scheduler
from respike.server.schema import ChatRequest, CompletionRequest
from respike.server.settings import Settings
from respike.server.tools import demanded_schema, template_messages, variables

DEFAULT_CHAT_TOKENS = 1024
"""Of an answer, when a request does not say."""
KINDS = {"text/plain": "text", "text/markdown": "text", "text/html": "html",
         "application/pdf": "pdf"}  # fmt: skip
SUFFIXES = {".html": "html", ".htm": "html", ".pdf": "pdf"}
PASSAGES = 3


class Service:
    """A model and everything around it.

    Args:
        model: What answers.
        name: What clients call it.
        settings: The limits.
    """

    def __init__(self, model: Model, name: str, settings: Settings) -> None:
        self.model, self.name, self.settings = model, name, settings
        self.metrics = Metrics()
        self.scheduler = Scheduler(model, settings, self.metrics)
        self.grammars = Grammars(model.tokenizer)
        self.documents: dict[str, Document] = {}
        self.created = int(time.time())
        self.look: Attention | None = None

    # Requests.

    async def chat(self, request: ChatRequest) -> tuple[Answer, Mailbox]:
        """Begin a chat completion.

        Raises:
            ApiError: It cannot be done.
        """
        self._check_model(request.model)
        document = self._ready_document(request.document)
        prompt, grammar, demanded = await asyncio.to_thread(self._prepare_chat, request, document)
        limit = request.max_completion_tokens or request.max_tokens
        job, mailbox = self._job(request, prompt, limit or DEFAULT_CHAT_TOKENS)
        job.grammar = grammar
        job.top_logprobs = request.top_logprobs if request.logprobs else None
        job.keep = request.n == 1
        answer = Answer(self.name, True, job, self.model.tokenizer)
        answer.extra = lambda: self._figures(job)
        answer.tools = bool(request.tools) and request.tool_choice != "none"
        answer.demanded = demanded
        answer.usage_wanted = request.stream_options.include_usage
        if document is not None:
            if request.free and request.abstain is not False:
                without = before_document(self.model.tokenizer) + prompt
                job.judged = Judged(self.settings.least, without)
            self._read_from(job, answer, document)
        self._submit(job)
        return answer, mailbox

    def _prepare_chat(
        self, request: ChatRequest, document: Document | None
    ) -> tuple[list[int], Grammar | None, bool]:
        tokenizer = self.model.tokenizer
        told = variables(request, tokenizer.chat_template)
        messages = template_messages(request.messages)
        if document is not None:
            prompt = after_document(tokenizer, messages, told)
        else:
            prompt = tokenizer.chat(messages, variables=told)
        schema = demanded_schema(request)
        demanded = schema is not None
        if schema is None and request.response_format.type == "json_object":
            schema = {"type": "object"}
        if schema is None and request.response_format.type == "json_schema":
            wanted = request.response_format.json_schema
            if wanted is None:
                raise ApiError(400, "response_format needs a json_schema", param="response_format")
            schema = wanted.schema_
        return prompt, None if schema is None else self.grammars.of_schema(schema), demanded

    def _read_from(self, job: Job, answer: Answer, document: Document) -> None:
        """Let a job go on from a document's state, and say where it looked."""
        reading = document.reading
        assert reading is not None
        job.base, job.start_tokens = document.id, reading.num_tokens
        job.start = reading.state.clone
        if keeps_all(self.model.config):
            job.look = self.look = Attention(reading.begin_token, reading.num_tokens)
        answer.extra = lambda: self._leaned(reading, job)

    def _leaned(self, reading: Reading, job: Job) -> dict[str, Any]:
        look, judged = job.look, job.judged
        refused = judged is not None and judged.verdict is not None and not judged.verdict.found
        found: list[Passage] = []
        if look is not None and not refused:
            found = passages(reading, look, self.model.tokenizer, PASSAGES)
        return {
            **(judged.facts() if judged else {"found": None}),
            "retrieval": look is not None,
            "passages": [vars(p) | {"source": PurePath(p.source).name} for p in found],
            "document_share": look.document_share if look else 0.0,
            "layer_shares": look.layer_shares() if look else {},
            **self._figures(job),
        }

    def _figures(self, job: Job) -> dict[str, Any]:
        sizes = self.sizes(job.start_tokens + len(job.prompt))
        return {**sizes, "tokens_per_second": job.pace.tokens_per_second}

    async def complete(self, request: CompletionRequest) -> list[tuple[Answer, Mailbox]]:
        """Begin a completion for each prompt.

        Raises:
            ApiError: It cannot be done.
        """
        self._check_model(request.model)
        prompts = request.prompts()
        if request.stream and len(prompts) > 1:
            raise ApiError(400, "a stream has one prompt", param="prompt")
        if not 1 <= len(prompts) * request.n <= self.settings.max_streams:
            raise ApiError(
                400, f"between 1 and {self.settings.max_streams} answers at once", param="prompt"
            )
        begun = []
        for text in prompts:
            prompt = await asyncio.to_thread(self._ids, text)
            job, mailbox = self._job(request, prompt, request.max_tokens)
            job.top_logprobs = request.logprobs
            answer = Answer(self.name, False, job, self.model.tokenizer)
            answer.usage_wanted = request.stream_options.include_usage
            begun.append((answer, mailbox))
        for answer, _ in begun:
            self._submit(answer.job)
        return begun

    def _ids(self, text: str | list[int]) -> list[int]:
        if isinstance(text, str):
            return self.model.tokenizer.encode(text)
        if not all(0 <= token < self.model.config.vocab_size for token in text):
            raise ApiError(400, "a token id is not of this vocabulary", param="prompt")
        return text

    def _job(
        self, request: ChatRequest | CompletionRequest, prompt: list[int], max_tokens: int
    ) -> tuple[Job, Mailbox]:
        settings = self.settings
        if not prompt:
            raise ApiError(400, "the prompt is empty", param="prompt")
        if len(prompt) > settings.max_prompt_tokens:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, {settings.max_prompt_tokens} are allowed",
                "context_length_exceeded",
            )
        if max_tokens > settings.max_output_tokens:
            raise ApiError(
                400, f"max_tokens is more than {settings.max_output_tokens}", param="max_tokens"
            )
        if request.n > settings.max_streams:
            raise ApiError(400, f"n is more than {settings.max_streams}", param="n")
        mailbox = Mailbox()
        deadline = time.monotonic() + settings.timeout_seconds
        job = Job(prompt, request.samplings(), max_tokens, mailbox.deliver, deadline)
        job.stop = request.stops
        return job, mailbox

    def _submit(self, job: Job) -> None:
        failure = self.scheduler.submit(job)
        if failure is not None:
            raise ApiError(failure.status, failure.message, failure.code)

    def _check_model(self, name: str) -> None:
        if name not in ("", self.name):
            raise ApiError(
                404, f"this server has one model: {self.name}", "model_not_found", "model"
            )

    # Documents.

    async def add_document(self, name: str, content: bytes, kind: str) -> Document:
        """Take a document and have it read.

        Args:
            name: What the client calls it; a name and no path.
            content: All of it.
            kind: Its media type.

        Raises:
            ApiError: It cannot be read, or there is no room for it.
        """
        suffix = "." + name.rsplit(".", 1)[-1].lower()
        known = SUFFIXES.get(suffix) or KINDS.get(kind.split(";")[0].strip().lower(), "text")
        source = UploadedSource(name, content, known)
        tokenized = await asyncio.to_thread(TokenizedSource, source, self.model.tokenizer)
        if not tokenized.num_tokens:
            raise ApiError(400, "there is no text in the document", "empty_document")
        held = sum(self._document_bytes(d.tokens) for d in self.documents.values())
        if held + self._document_bytes(tokenized.num_tokens) > self.settings.max_documents_bytes:
            raise ApiError(413, "no room for this document: delete others first", "documents_full")
        document = Document(name, len(content))
        self.scheduler.read(document, tokenized)
        self.documents[document.id] = document
        self.metrics.documents.set(len(self.documents))
        return document

    def add_reading(self, name: str, reading: Reading) -> Document:
        """Offer what `respike read` has read."""
        document = Document(name, sum(source.num_bytes for source in reading.sources))
        document.reading, document.status = reading, "ready"
        document.tokens = document.tokens_read = reading.num_tokens
        document.state_bytes = reading.state.nbytes()
        self.documents[document.id] = document
        self.metrics.documents.set(len(self.documents))
        return document

    def document(self, id: str) -> Document:
        """One of them.

        Raises:
            ApiError: There is none of this name.
        """
        if id not in self.documents:
            raise ApiError(404, "no such document", "document_not_found", "document")
        return self.documents[id]

    def _ready_document(self, id: str | None) -> Document | None:
        if id is None:
            return None
        document = self.document(id)
        if document.status != "ready":
            raise ApiError(
                409, f"the document is not ready: {document.status}", "not_ready", "document"
            )
        return document

    def delete_document(self, id: str) -> None:
        """Forget a document and all states that follow it; running answers end as they would."""
        document = self.document(id)
        document.deleted = True
        del self.documents[id]
        self.scheduler.call(lambda: self.scheduler.cache.forget(id))
        self.metrics.documents.set(len(self.documents))

    def _document_bytes(self, tokens: int) -> int:
        size = self.model.decoder.embedding.element_size()
        return state_bytes(self.model.config, tokens, size)

    # Figures.

    def sizes(self, tokens: int) -> dict[str, int]:
        """Bytes of state after ``tokens``, and what a KV cache of every group would hold."""
        config, size = self.model.config, self.model.decoder.embedding.element_size()
        pair = 2 * config.head_dim * size
        whole = config.num_hidden_layers * config.num_key_value_heads * pair * tokens
        return {"state_bytes": state_bytes(config, tokens, size), "kv_bytes": whole}

    def activity(self) -> dict[str, Any]:
        """The model at work, for the page."""
        look, config = self.look, self.model.config
        size = self.model.decoder.embedding.element_size()
        return {
            "model": self.name,
            "running": len(self.scheduler.batches),
            "tokens_per_second": self.scheduler.tokens_per_second(),
            "layers": config.num_hidden_layers,
            "groups": config.num_key_value_heads,
            "retrieval_groups": retrieval_groups(self.model),
            "layer_shares": look.layer_shares() if look else {},
            "parts": state_parts(config, 1, size),
        }


def retrieval_groups(model: Model) -> dict[int, int]:
    """How many groups of each layer keep all they have read."""
    found: dict[int, int] = {}
    for layer, part in model.config.mixers():
        if part.mixer in ("full", "blocks"):
            found[layer] = found.get(layer, 0) + len(part.groups)
    return found


def told(error: RespikeError) -> ApiError:
    """An error of the library, as a client sees it: its message quotes the request at most."""
    return ApiError(400, str(error))
