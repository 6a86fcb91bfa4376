"""The HTTP surface: routes, authentication, request ids, and every error in OpenAI's shape."""

# No `from __future__ import annotations`: FastAPI resolves the annotations of the routes at run time, and cannot see
# names that are local to `build_app`.
from dataclasses import dataclass
from typing import Annotated, Any

import structlog
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.contracts import KeyInfo
from deployments.ingress.catalog import Catalog, ServedModel
from deployments.ingress.completion import Completion
from deployments.ingress.completion_request import parse_completion_request
from deployments.ingress.completion_response import CompletionResponse
from deployments.ingress.errors import (
    ApiError,
    BodyTooLarge,
    InternalError,
    InvalidApiKey,
    MethodNotAllowed,
    PermissionDenied,
    RouteNotFound,
    UnsupportedMediaType,
)
from deployments.ingress.meter_client import MeterClient, MeterUnreachable

__all__ = ["IngressSettings", "build_app"]

log = structlog.get_logger()


@dataclass(frozen=True)
class IngressSettings:
    request_body_limit_bytes: int
    keep_alive_s: float


def build_app(catalog: Catalog, meter: MeterClient, settings: IngressSettings) -> ASGIApp:
    app = FastAPI(title="Millstream", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    async def caller(request: Request) -> KeyInfo:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and key.strip():
            return await meter.authenticate(key.strip())
        try:
            return await meter.authenticate("")  # who it is if the cluster requires no keys
        except InvalidApiKey:
            raise InvalidApiKey(
                "You didn't provide an API key. Send it in the header 'Authorization: Bearer KEY'."
            ) from None

    Caller = Annotated[KeyInfo, Depends(caller)]

    @app.post("/v1/completions")
    async def create_completion(request: Request, key: Caller) -> Response:
        body = await _read_body(request, settings.request_body_limit_bytes)
        parsed = parse_completion_request(body)
        completion = Completion(parsed, catalog.find(parsed.model), key, meter)
        await completion.admit()
        return CompletionResponse(completion, keep_alive_s=settings.keep_alive_s)

    @app.get("/v1/models")
    async def list_models(_key: Caller) -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(model) for model in catalog.models()]}

    @app.get("/v1/models/{model}")
    async def retrieve_model(model: str, _key: Caller) -> dict[str, Any]:
        return _model_card(catalog.find(model))

    @app.get("/admin/v1/replicas")
    async def list_replicas(key: Caller) -> dict[str, Any]:
        """Every engine replica as this ingress sees it, for `millstream status`."""
        if not key.admin:
            raise PermissionDenied("This needs the admin key.")
        return {"object": "list", "data": [card for model in catalog.models() for card in model.pool.cards()]}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process runs."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """The routes are known, the meter answers, and at least one model can be served."""
        try:
            await meter.ping()
            metered = True
        except (MeterUnreachable, TimeoutError):
            metered = False
        models = {model.entry.name: model.pool.ready for model in catalog.models()}
        ready = catalog.known and metered and any(models.values())
        return JSONResponse(
            {
                "status": "ready" if ready else "not ready",
                "routes": catalog.known,
                "meter": metered,
                "models": models,
            },
            status_code=200 if ready else 503,
        )

    @app.exception_handler(ApiError)
    async def on_api_error(_request: Request, error: ApiError) -> Response:
        return _error_response(error)

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 405:
            response = _error_response(MethodNotAllowed(f"{request.method} is not allowed on {path}."))
            response.headers.update(error.headers or {})
            return response
        return _error_response(
            RouteNotFound(f"Unknown request URL: {request.method} {path}. Completions are at POST /v1/completions.")
        )

    # Inside of Starlette's own ServerErrorMiddleware, which would answer first, in plain text.
    app.add_middleware(_Unexpected)
    return _RequestIds(app)


def _model_card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.entry.name,
        "object": "model",
        "created": model.created,
        "owned_by": "millstream",
        "max_model_len": model.entry.max_model_len,
    }


async def _read_body(request: Request, limit_bytes: int) -> bytes:
    """The body, read no further than the limit. Raises UnsupportedMediaType, BodyTooLarge."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise UnsupportedMediaType(
            f"Content-Type is '{content_type or 'missing'}'; expected 'application/json'. With curl, add "
            "-H 'Content-Type: application/json'."
        )
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise BodyTooLarge(f"The body is larger than the limit of {limit_bytes} bytes.")
        chunks.append(chunk)
    return b"".join(chunks)


def _error_response(error: ApiError) -> Response:
    return Response(error.body(), error.status, error.headers(), media_type="application/json")


class _RequestIds:
    """Binds the request id to all log lines of the request. Ray Serve makes it, or takes the caller's x-request-id,
    and puts it on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with structlog.contextvars.bound_contextvars(request_id=Headers(scope=scope).get("x-request-id", "")):
            await self._app(scope, receive, send)


class _Unexpected:
    """Answers what no handler foresaw with a 500 that tells nothing of the inside; the log has the rest."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, note_start)
        except ClientDisconnect:
            log.info("client gone before its body was read")
        except Exception:
            log.exception("request failed")
            if started:
                raise
            await _error_response(InternalError())(scope, receive, send)
