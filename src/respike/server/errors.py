"""Errors as OpenAI's clients expect them: ``{"error": {message, type, param, code}}``."""

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
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def validation_error(errors: list[dict[str, Any]]) -> ApiError:
    """The first thing that is wrong with a body, without quoting it."""
    first = errors[0]
    where = ".".join(str(part) for part in first.get("loc", ()) if part != "body")[:200]
    what = str(first.get("msg", "invalid"))[:300]
    known = first.get("type") == "extra_forbidden"
    message = f"unknown parameter: {where}" if known else f"{where or 'body'}: {what}"
    code = "unknown_parameter" if known else "invalid_request"
    return ApiError(400, message, code, where or None)
