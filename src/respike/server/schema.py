"""What clients may send: OpenAI's requests, as far as they are honoured.

A parameter that is known and cannot be honoured is refused, never dropped. Those that only matter
to OpenAI's own service are taken and mean nothing here: `IGNORED`.
"""

import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from respike.generation import Sampling

IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "parallel_tool_calls", "prompt_cache_retention", "verbosity", "reasoning_effort",
    }
)  # fmt: skip
MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if k not in IGNORED and v is not None}


class StreamOptions(_Request):
    """Of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Sampled(_Request):
    """What both endpoints share."""

    model: str = Field(default="", max_length=1000)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] = Field(default_factory=list, max_length=10_000)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = Field(default=1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, ge=0.0, le=1.0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0, le=1 << 31)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0, allow_inf_nan=False)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=100.0, allow_inf_nan=False)
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logit_bias: dict[str, float] = Field(default_factory=dict, max_length=0)

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a choice."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @model_validator(mode="after")
    def _check_stops(self) -> "_Sampled":
        if len(self.stops) > MAX_STOPS or not all(0 < len(s) <= 1000 for s in self.stops):
            raise ValueError(f"stop: at most {MAX_STOPS} strings, none empty or over 1000 long")
        return self

    def samplings(self) -> list[Sampling]:
        """One for each choice, with seeds that follow one another."""
        seed = secrets.randbits(62) if self.seed is None else abs(self.seed) & ((1 << 62) - 1)
        return [
            Sampling(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=max(self.top_p, 1e-9),
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                seed=seed + choice,
            )
            for choice in range(self.n)
        ]


class TextPart(_Request):
    """Part of a message; only text is known here."""

    type: Literal["text"]
    text: str


class FunctionCall(_Request):
    """A call the assistant made before."""

    name: str = Field(max_length=200)
    arguments: str = "{}"


class ToolCall(_Request):
    """Likewise."""

    id: str = Field(default="", max_length=200)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Request):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str | None = Field(default=None, max_length=200)
    tool_calls: list[ToolCall] = Field(default_factory=list, max_length=100)
    tool_call_id: str | None = Field(default=None, max_length=200)
    refusal: str | None = None

    @property
    def text(self) -> str:
        """Its content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Function(_Request):
    """A function the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class Tool(_Request):
    """Likewise."""

    type: Literal["function"]
    function: Function


class FunctionName(_Request):
    """Which function to call."""

    name: str = Field(max_length=200)


class ToolChoice(_Request):
    """Likewise."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(_Request):
    """What an answer has to fit."""

    name: str = Field(default="", max_length=200)
    description: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool = False


class ResponseFormat(_Request):
    """Likewise."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class ChatRequest(_Sampled):
    """``/v1/chat/completions``; ``document`` and ``abstain`` are ours."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] = Field(default_factory=list, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    response_format: ResponseFormat = ResponseFormat()
    modalities: list[Literal["text"]] = Field(default_factory=list)
    document: str | None = Field(default=None, max_length=200)
    abstain: bool | None = None

    @property
    def free(self) -> bool:
        """Whether an answer may be any words: one choice, no tools, no format."""
        return self.n == 1 and not self.tools and self.response_format.type == "text"

    @model_validator(mode="after")
    def _check_abstain(self) -> "ChatRequest":
        if self.abstain and not (self.document is not None and self.free):
            raise ValueError("abstain: needs a document, n 1, and neither tools nor a format")
        return self


class CompletionRequest(_Sampled):
    """``/v1/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]] = Field(max_length=4_000_000)
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: Literal[False] = False
    best_of: Literal[1] = 1
    suffix: Literal[""] = ""

    def prompts(self) -> list[str | list[int]]:
        """One or several."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and all(isinstance(item, int) for item in prompt):
            return [[int(item) for item in prompt]]  # type: ignore[arg-type]
        return list(prompt)  # type: ignore[arg-type]
