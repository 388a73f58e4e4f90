"""Chat templates: foreign jinja2 code, rendered in a sandbox.

A template comes with a model, so it is hostile until proved otherwise: it sees no attribute that
leads out of the sandbox, changes no argument, and its output and repetitions are bounded. It can
still be slow: nothing here stops a loop within a loop.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from respike.errors import DataError

MAX_TEXT = 1 << 26
"""Characters a template may write, and the longest string it may make by repeating one."""


class _Generation(Extension):
    """``{% generation %}``, which marks the assistant's words for training; here it is nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Keep the body, drop the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, with ``*`` bounded and without powers."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply, unless the product is a sequence longer than any chat."""
        if operator == "**":
            raise TemplateError("powers are not available in a chat template")
        for text, times in ((left, right), (right, left)):
            repeated = isinstance(text, str | list | tuple) and isinstance(times, int)
            if repeated and len(text) * times > MAX_TEXT:
                raise TemplateError(f"a repetition makes more than {MAX_TEXT} items")
        return super().call_binop(context, operator, left, right)


class _Namespace(Namespace):
    """jinja2's ``namespace``, without names that Python gives a meaning."""

    def __init__(self, *items: Any, **named: Any) -> None:
        for name in dict(*items, **named):
            _Namespace._check(name)
        super().__init__(*items, **named)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter escapes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _sandbox() -> _Sandbox:
    """The environment that Hugging Face renders templates in."""
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["dict"] = lambda *items, **named: dict(*items, **named)
    sandbox.globals["namespace"] = _Namespace
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    return _sandbox().from_string(template)


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that ``template`` makes of a conversation.

    Args:
        template: jinja2 source.
        variables: What it sees: ``messages``, ``add_generation_prompt``, ``bos_token`` and so on.

    Raises:
        DataError: The template refuses these messages, fails, or tries to get out.
    """
    pieces, size = [], 0
    try:
        for piece in _compiled(template).generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_TEXT:
                raise TemplateError(f"the result is longer than {MAX_TEXT} characters")
    except Exception as error:  # the template is foreign code: whatever it raises, it failed
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"chat template: {reason}",
            hint="check the roles and their order, or use a prompt without a chat template",
        ) from None
    return "".join(pieces)
