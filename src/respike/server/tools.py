"""Functions a model may call: told to it by its chat template, found in what it writes.

Models of the Qwen and Hermes families write ``<tool_call>{"name": ..., "arguments": {...}}
</tool_call>``. Where a call is demanded, a grammar makes sure of one.
"""

import json
import secrets
from collections.abc import Sequence
from typing import Any

from respike.server.errors import ApiError
from respike.server.schema import ChatRequest, Function, Message, ToolChoice

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them."""
    found = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": message.text}
        if message.tool_calls:
            turn["tool_calls"] = [
                {"type": "function", "function": {"name": call.function.name,
                                                  "arguments": _arguments(call.function.arguments)}}
                for call in message.tool_calls
            ]  # fmt: skip
        for name in ("name", "tool_call_id"):
            if getattr(message, name) is not None:
                turn[name] = getattr(message, name)
        found.append(turn)
    return found


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def variables(request: ChatRequest, template: str | None) -> dict[str, Any]:
    """What the template is told of tools.

    Raises:
        ApiError: There are tools, and the template does not know any.
    """
    if not request.tools or request.tool_choice == "none":
        return {}
    if template is None or "tools" not in template:
        raise ApiError(
            400, "this model's chat template has no tools", "unsupported_parameter", "tools"
        )
    return {"tools": [tool.model_dump(exclude_defaults=False) for tool in request.tools]}


def demanded_schema(request: ChatRequest) -> dict[str, Any] | None:
    """The JSON schema of the call that ``tool_choice`` demands, or None.

    Raises:
        ApiError: It demands a function that is not among the tools.
    """
    choice = request.tool_choice
    functions = [tool.function for tool in request.tools]
    if isinstance(choice, ToolChoice):
        functions = [f for f in functions if f.name == choice.function.name]
        if not functions:
            raise ApiError(400, "tool_choice names no tool", "invalid_request", "tool_choice")
    elif choice != "required":
        return None
    if not functions:
        raise ApiError(400, "tool_choice needs tools", "invalid_request", "tool_choice")
    calls = [_call_schema(function) for function in functions]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _call_schema(function: Function) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "arguments": function.parameters or {"type": "object"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


class Calls:
    """Text of one choice, with the calls in it taken out.

    Args:
        demanded: The whole text is one call, see `demanded_schema`.
    """

    def __init__(self, demanded: bool) -> None:
        self._demanded, self._held = demanded, ""

    def push(self, text: str) -> str:
        """Take text; return what certainly belongs to no call."""
        self._held += text
        if self._demanded:
            return ""
        at = self._held.find(OPEN)
        if at < 0:
            at = len(self._held) - next(
                (n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0
            )
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What is left: text, and the calls as OpenAI spells them. A broken call stays text."""
        parts = [self._held] if self._demanded else self._held.split(OPEN)
        text = "" if self._demanded else parts.pop(0)
        calls = []
        for part in parts:
            call = _parse(part.split(CLOSE)[0])
            if call is None:
                text += part if self._demanded else OPEN + part
            else:
                calls.append(call)
        return text, calls


def _parse(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
        name, arguments = value["name"], value.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
