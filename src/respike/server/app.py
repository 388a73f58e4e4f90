"""The routes."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from respike import __version__
from respike.errors import RespikeError
from respike.server.errors import ApiError, validation_error
from respike.server.form import FORM, file_of, is_form
from respike.server.limits import Limits
from respike.server.schema import ChatRequest, CompletionRequest
from respike.server.service import KINDS, Service, told

PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
DOCUMENT_BODY = {
    "requestBody": {
        "required": True,
        "description": "The document: as it is, with its media type, or as the file of a form.",
        "content": {
            **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in KINDS},
            FORM: {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}
"""For the OpenAPI document; the route takes the body itself."""
SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def make_app(service: Service) -> Limits:
    """The ASGI application; its lifespan starts and stops the engine's thread."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        service.scheduler.stop()
        await run_in_threadpool(service.scheduler.join, service.settings.grace_seconds)

    app = FastAPI(
        title="respike", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    _add_errors(app)
    _add_models(app, service)
    _add_completions(app, service)
    _add_documents(app, service)
    _add_figures(app, service)
    return Limits(app, service.settings, service.metrics)


def _add_errors(app: FastAPI) -> None:
    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers=headers)

    async def respike_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RespikeError)
        return await api_error(request, told(error))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return await api_error(request, ApiError(error.status_code, str(error.detail)))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await api_error(request, validation_error(list(error.errors())))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RespikeError, respike_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid)


def _add_models(app: FastAPI, service: Service) -> None:
    def model() -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "respike",
        }

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name}")
    async def get_model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(404, "no such model", "model_not_found", "model")
        return model()


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        answer, mailbox = await service.chat(body)
        events = mailbox.events(answer.job, request.is_disconnected)
        if body.stream:
            return StreamingResponse(
                answer.stream(events), media_type="text/event-stream", headers=SSE_HEADERS
            )
        return JSONResponse(await answer.whole(events))

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        begun = await service.complete(body)
        listening = [m.events(a.job, request.is_disconnected) for a, m in begun]
        if body.stream:
            return StreamingResponse(
                begun[0][0].stream(listening[0]),
                media_type="text/event-stream",
                headers=SSE_HEADERS,
            )
        found: list[dict[str, Any]] = []
        try:
            for (answer, _), events in zip(begun, listening, strict=True):
                found.append(await answer.whole(events))
        finally:
            for answer, _ in begun:
                answer.job.cancelled = True
        return JSONResponse(_joined(found))


def _joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The answers to several prompts as one."""
    first, *rest = found
    for other in rest:
        first["choices"] += other["choices"]
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            first["usage"][name] += other["usage"][name]
    for index, choice in enumerate(first["choices"]):
        choice["index"] = index
    return first


def _add_documents(app: FastAPI, service: Service) -> None:
    @app.post("/v1/documents", status_code=201, openapi_extra=DOCUMENT_BODY)
    async def add(
        request: Request, name: str | None = Query(default=None, max_length=200)
    ) -> dict[str, Any]:
        content = await request.body()
        kind = request.headers.get("content-type", "text/plain")
        if is_form(kind):
            part = await run_in_threadpool(file_of, kind, content)
            name, content, kind = name or part.filename, part.content, part.kind
        clean = re.sub(r"[^\w .,()+-]", "_", (name or "document.txt")[:200]).strip() or "document"
        document = await service.add_document(clean, content, kind)
        return document.facts()

    @app.get("/v1/documents")
    async def list_all() -> dict[str, Any]:
        return {"object": "list", "data": [d.facts() for d in service.documents.values()]}

    @app.get("/v1/documents/{id}")
    async def get(id: str) -> dict[str, Any]:
        return service.document(id).facts()

    @app.delete("/v1/documents/{id}")
    async def delete(id: str) -> dict[str, Any]:
        service.delete_document(id)
        return {"id": id, "object": "document", "deleted": True}


def _add_figures(app: FastAPI, service: Service) -> None:
    page = files("respike.server").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if not service.scheduler.is_alive():
            raise ApiError(503, "the engine is not running", "unhealthy")
        return {"status": "ok", "model": service.name, "version": __version__}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/activity")
    async def activity() -> dict[str, Any]:
        return service.activity()

    @app.get("/", response_model=None, include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)
