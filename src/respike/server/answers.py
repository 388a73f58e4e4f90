"""Events of a job as OpenAI's answers: whole, or streamed."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from respike.server.errors import ApiError
from respike.server.jobs import End, Event, Failure, Job, Piece, TokenLogprob
from respike.server.tools import Calls
from respike.tokenizer import Tokenizer

POLL_SECONDS = 0.5
"""How often to look whether a client that waits is still there."""


class Mailbox:
    """Carries events from the engine's thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def deliver(self, event: Event) -> None:
        """From any thread; after the loop has closed nobody is there to be told."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(
        self, job: Job, gone: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[Piece | End]:
        """Until every choice has ended. Whoever stops listening cancels the job.

        Raises:
            ApiError: The job failed.
        """
        left, looked = len(job.samplings), time.monotonic()
        try:
            while left:
                if time.monotonic() - looked >= POLL_SECONDS:
                    if await gone():
                        return
                    looked = time.monotonic()
                try:
                    event = await asyncio.wait_for(self._events.get(), POLL_SECONDS)
                except TimeoutError:
                    continue
                if isinstance(event, Failure):
                    raise ApiError(event.status, event.message, event.code)
                left -= isinstance(event, End)
                yield event
        finally:
            job.cancelled = True


@dataclass
class Answer:
    """What belongs to one request: how it is spelled, and what is counted.

    Attributes:
        model: Its name.
        chat: Which of the two endpoints.
        job: What was asked.
        tokenizer: To spell tokens.
        tools: Whether calls are to be found in the text.
        demanded: Whether a call is all there may be.
        usage_wanted: Whether a stream ends with the usage.
        extra: What we add to the last of the answer.
    """

    model: str
    chat: bool
    job: Job
    tokenizer: Tokenizer
    tools: bool = False
    demanded: bool = False
    usage_wanted: bool = False
    extra: Callable[[], dict[str, Any] | None] = lambda: None
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        """Its name."""
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"

    async def whole(self, events: AsyncIterator[Piece | End]) -> dict[str, Any]:
        """All choices in one document."""
        count = len(self.job.samplings)
        texts, reasons = [""] * count, [""] * count
        logprobs: list[list[TokenLogprob]] = [[] for _ in range(count)]
        async for event in events:
            if isinstance(event, Piece):
                texts[event.choice] += event.text
                logprobs[event.choice] += event.logprobs
            else:
                reasons[event.choice] = event.reason
                self.completion_tokens += event.tokens
        choices = [
            self._choice(index, texts[index], reasons[index], logprobs[index])
            for index in range(count)
        ]
        body = self._head("chat.completion" if self.chat else "text_completion", choices)
        body["usage"] = self.usage()
        extra = self.extra()
        return body | ({"respike": extra} if extra else {})

    def _choice(
        self, index: int, text: str, reason: str, logprobs: list[TokenLogprob]
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason}
        choice["logprobs"] = self._logprobs(logprobs)
        if not self.chat:
            return choice | {"text": text}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.tools:
            calls = Calls(self.demanded)
            shown = calls.push(text)
            rest, found = calls.finish()
            message["content"] = (shown + rest) or (None if found else "")
            if found:
                message["tool_calls"] = found
                choice["finish_reason"] = "tool_calls"
        return choice | {"message": message}

    async def stream(self, events: AsyncIterator[Piece | End]) -> AsyncIterator[bytes]:
        """Server-sent events; an error ends them as OpenAI's do."""
        calls = [Calls(self.demanded) for _ in self.job.samplings]
        try:
            if self.chat:
                for index in range(len(calls)):
                    yield self._chunk(index, {"role": "assistant", "content": ""})
            async for event in events:
                index = event.choice
                if isinstance(event, Piece):
                    text = calls[index].push(event.text) if self.tools else event.text
                    if text or event.logprobs:
                        yield self._chunk(index, {"content": text}, logprobs=event.logprobs)
                    continue
                self.completion_tokens += event.tokens
                reason = event.reason
                rest, found = calls[index].finish() if self.tools else ("", [])
                if rest:
                    yield self._chunk(index, {"content": rest})
                if found:
                    reason = "tool_calls"
                    numbered = [{"index": i, **call} for i, call in enumerate(found)]
                    yield self._chunk(index, {"tool_calls": numbered})
                extra = self.extra() if index == 0 else None
                yield self._chunk(index, {}, reason=reason, extra=extra)
            if self.usage_wanted:
                body = self._head(self._chunk_kind, [])
                yield _sse(body | {"usage": self.usage()})
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _sse(error.body())

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        reason: str | None = None,
        logprobs: tuple[TokenLogprob, ...] = (),
        extra: dict[str, Any] | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason}
        choice["logprobs"] = self._logprobs(list(logprobs)) if logprobs else None
        choice |= {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        body = self._head(self._chunk_kind, [choice])
        return _sse(body | ({"respike": extra} if extra else {}))

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def usage(self) -> dict[str, Any]:
        """Tokens; those of a document, and those whose state was known, were not read again."""
        prompt = self.job.start_tokens + len(self.job.prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.job.start_tokens + self.job.cached_tokens
            },
        }

    def _logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        if self.job.top_logprobs is None:
            return None
        if self.chat:
            return {"content": [self._told(entry) for entry in logprobs], "refusal": None}
        tokens = [self._spelled(entry.token) for entry in logprobs]
        offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
        top = [{self._spelled(t): lp for t, lp in entry.top} for entry in logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": top if self.job.top_logprobs else None,
            "text_offset": offsets,
        }

    def _told(self, entry: TokenLogprob) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            text = self._spelled(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        top = [one(token, logprob) for token, logprob in entry.top]
        return one(entry.token, entry.logprob) | {"top_logprobs": top}

    def _spelled(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special=False)


def _sse(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=True).encode() + b"\n\n"
