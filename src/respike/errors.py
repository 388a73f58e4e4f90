"""What can go wrong, in words a person can act on.

    RespikeError                 exit code 1, one line, no traceback
    ├── UsageError               exit code 2: the call itself is wrong
    ├── RecipeError              a recipe, or a recipe for another model
    ├── CheckpointError          a model folder or file
    ├── UnsupportedError         valid, but not something respike does (yet)
    ├── BackendError             a device or kernel that was asked for cannot run
    └── DataError                text, token or state files

A message says what is wrong, where, what was got and expected; ``hint`` says what to run next.
Anything else that escapes is a bug and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class RespikeError(Exception):
    """Base of every error a user can cause.

    Args:
        message: One line: what, where, got, expected.
        hint: One line: what to do next. None when the message already says it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(RespikeError):
    """The command or function was called in a way that cannot mean anything."""

    exit_code = 2


class RecipeError(RespikeError):
    """A recipe is malformed, or does not fit the model it was given."""


class CheckpointError(RespikeError):
    """A checkpoint is missing, truncated, corrupt, hostile or not what its config says."""


class UnsupportedError(RespikeError):
    """The request is well-formed but outside what this version does."""


class BackendError(RespikeError):
    """A device, dtype or kernel was asked for that cannot run here."""


class DataError(RespikeError):
    """A text, token or state file cannot be used."""


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint naming the closest known word, or None when nothing is close."""
    close = get_close_matches(word, list(known), n=1)
    return f"did you mean `{close[0]}`?" if close else None
