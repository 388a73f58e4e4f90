"""Errors as OpenAI's clients expect them: ``{"error": {message, type, param, code}}``."""

import sys
import traceback
from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """Something a client is told.

    Args:
        status: Of HTTP.
        message: What people read.
        code: What programs look at.
        param: Which parameter is meant.
    """

    def __init__(
        self, status: int, message: str, code: str = "invalid_request", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """The JSON document."""
        kind = TYPES.get(self.status, "server_error")
        message, param = _clean(self.message), self.param and _clean(self.param)
        error = {"message": message, "type": kind, "param": param, "code": self.code}
        return {"error": error}


def _clean(text: str) -> str:
    """What a client sent may hold half a surrogate pair, which no answer can."""
    return text.encode("utf-8", "replace").decode("utf-8")


def validation_error(errors: list[dict[str, Any]]) -> ApiError:
    """The first thing that is wrong with a body, without quoting it."""
    first = errors[0]
    where = ".".join(str(part) for part in first.get("loc", ()) if part != "body")[:200]
    what = str(first.get("msg", "invalid"))[:300]
    known = first.get("type") == "extra_forbidden"
    message = f"unknown parameter: {where}" if known else f"{where or 'body'}: {what}"
    code = "unknown_parameter" if known else "invalid_request"
    return ApiError(400, message, code, where or None)


def report(error: BaseException) -> None:
    """Where something went wrong, without its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{f.filename}:{f.lineno} {f.name}" for f in reversed(frames))
    print(f"error: {type(error).__name__} at {places}", file=sys.stderr, flush=True)  # noqa: T201
