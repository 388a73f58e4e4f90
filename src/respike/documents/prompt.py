"""How a document and a question stand in a model's prompt: before, document, after.

What is before the document never depends on the question, so a document is read once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from respike.errors import DataError
from respike.tokenizer import HOLE, Tokenizer

INTRODUCTION = "Document:\n\n"
REQUEST = "\n\nQuestion: "
SEPARATOR = "\n\n"
"""Between documents."""
NOT_FOUND = "not found in the document"

Messages = Sequence[Mapping[str, Any]]


def before_document(tokenizer: Tokenizer) -> list[int]:
    """Token ids of what stands before any document."""
    return _around(tokenizer, [{"role": "user", "content": "?"}], None)[0]


def after_document(
    tokenizer: Tokenizer, messages: Messages, variables: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of what follows the document: the conversation about it, up to the answer.

    Args:
        tokenizer: Of the model.
        messages: The first of the user is the first question. System messages come after the
            document too, in front of that question: what is before the document is fixed.
        variables: For the chat template.

    Raises:
        DataError: There is no question, or the template refuses the conversation.
    """
    before, after = _around(tokenizer, messages, variables)
    if before != before_document(tokenizer):
        raise DataError("the chat template changes what is before the document with what follows")
    return after


def _around(
    tokenizer: Tokenizer, messages: Messages, variables: Mapping[str, Any] | None
) -> tuple[list[int], list[int]]:
    system = [str(m.get("content") or "") for m in messages if m.get("role") == "system"]
    rest = [dict(m) for m in messages if m.get("role") != "system"]
    if not rest or rest[0].get("role") != "user":
        raise DataError("a conversation about a document begins with a question of the user")
    question = REQUEST + "".join(f"{line}\n\n" for line in system) + str(rest[0]["content"])
    if tokenizer.chat_template is None:
        text = INTRODUCTION, f"{question}\n\nAnswer:"
        return tokenizer.encode(text[0]), tokenizer.encode(text[1], bos=False)
    rest[0]["content"] = INTRODUCTION + HOLE + question
    return tokenizer.chat_around(rest, variables=variables)
