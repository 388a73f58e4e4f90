"""What every request has to pass before anything looks at it: host, key, size."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from respike.server.errors import ApiError, report
from respike.server.metrics import Metrics
from respike.server.settings import Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/favicon.ico")
"""Paths that need no key."""
DOCUMENTS = "/v1/documents"


class Limits:
    """An ASGI application around another.

    Args:
        inner: The other.
        settings: What is allowed.
        metrics: Counts requests.
    """

    def __init__(self, inner: Application, settings: Settings, metrics: Metrics) -> None:
        self._inner, self._settings, self._metrics = inner, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value for key, value in scope["headers"]}
        error = self._refused(scope, headers)
        limit = self._limit(scope)
        if error is None and _length(headers) > limit:
            error = _too_large(limit)
        seen, status = 0, 0

        async def counting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise HTTPException(413, _too_large(limit).message)
            return message

        try:
            if error is None:
                await self._inner(scope, counted, counting)
            else:
                await JSONResponse(error.body(), error.status)(scope, receive, counting)
        except Exception as failure:
            report(failure)
            if not status:
                error = ApiError(500, "the server failed on this request", "internal_error")
                await JSONResponse(error.body(), 500)(scope, receive, counting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()

    def _refused(self, scope: Scope, headers: dict[str, bytes]) -> ApiError | None:
        settings = self._settings
        if settings.hosts:
            host = headers.get("host", b"").decode("latin-1")
            name = host.rsplit(":", 1)[0] if host.count(":") == 1 or "]:" in host else host
            if name.strip("[]").lower() not in settings.hosts:
                return ApiError(421, "this server does not answer to that host name", "wrong_host")
        if settings.api_key is None or scope["path"] in OPEN:
            return None
        given = headers.get("authorization", b"").removeprefix(b"Bearer ")
        if hmac.compare_digest(given, settings.api_key.encode()):
            return None
        return ApiError(401, "the API key is missing or wrong", "invalid_api_key")

    def _limit(self, scope: Scope) -> int:
        if scope["path"] == DOCUMENTS:
            return self._settings.max_document_bytes
        return self._settings.max_body_bytes


def _length(headers: dict[str, bytes]) -> int:
    text = headers.get("content-length", b"0").decode("latin-1")
    return int(text) if text.isdecimal() else 0


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", "too_large")
