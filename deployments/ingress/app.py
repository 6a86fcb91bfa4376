"""The HTTP surface put together: the endpoints, and every error that they leave in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import cache

import msgspec
import structlog
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.contracts import IngressCounters
from deployments.ingress.api.description.endpoint import Endpoint
from deployments.ingress.api.endpoints import ENDPOINTS
from deployments.ingress.api.services import IngressSettings, Services
from deployments.ingress.errors import ApiError, ClientGone, InternalError, MethodNotAllowed, RouteNotFound
from deployments.ingress.http.connection_middleware import ConnectionMiddleware
from deployments.ingress.http.json_response import error_response
from deployments.ingress.meter_client import MeterClient
from deployments.ingress.metrics import ResponseCounts
from deployments.ingress.openapi.document import openapi_document
from deployments.ingress.routing.catalog import Catalog

__all__ = ["IngressSettings", "build_app"]

log = structlog.get_logger()


async def _no_others() -> list[IngressCounters]:
    return []


def build_app(
    catalog: Catalog,
    meter: MeterClient,
    settings: IngressSettings,
    others: Callable[[], Awaitable[list[IngressCounters]]] = _no_others,
    endpoints: Sequence[Endpoint] = ENDPOINTS,
    responses: ResponseCounts | None = None,
) -> ASGIApp:
    """`others` tells the counters of all other ingress replicas. Counts in `responses`."""
    responses = ResponseCounts() if responses is None else responses
    app = FastAPI(title="Millstream", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    @cache
    def document() -> bytes:
        return msgspec.json.encode(openapi_document(endpoints))

    app.state.services = Services(catalog, meter, settings, others, responses, document)
    for endpoint in endpoints:
        app.include_router(endpoint.router)
    _answer_head(app)

    @app.exception_handler(ApiError)
    async def on_api_error(_request: Request, error: ApiError) -> Response:
        return error_response(error.answer())

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 405:
            answer = error_response(MethodNotAllowed(f"{request.method} is not allowed on {path}.").answer())
            answer.headers["allow"] = ", ".join(_allowed(app, request))
            return answer
        unknown = f"Unknown request URL: {request.method} {path}. Completions are at POST /v1/completions."
        return error_response(RouteNotFound(unknown).answer())

    # Inside of Starlette's own ServerErrorMiddleware, which would answer first, in plain text.
    app.add_middleware(_Responses, counts=responses)
    return ConnectionMiddleware(
        app,
        upload_timeout_s=settings.upload_timeout_s,
        write_timeout_s=settings.write_timeout_s,
        cors_origins=settings.cors_origins,
    )


def _answer_head(app: FastAPI) -> None:
    """HEAD wherever GET is, as Starlette's own routes have it: FastAPI's do not. The server drops the body."""
    for route in app.routes:
        if isinstance(route, Route) and "GET" in (methods := route.methods or set()):
            methods.add("HEAD")


def _allowed(app: FastAPI, request: Request) -> list[str]:
    """The methods that the path has; Starlette tells those of the first of its routes."""
    return sorted(
        {
            method
            for route in app.routes
            if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
            for method in route.methods or ()
        }
    )


class _Responses:
    """Counts them, and answers what no handler foresaw with a 500 that tells nothing of the inside; the log has the
    rest."""

    def __init__(self, app: ASGIApp, counts: ResponseCounts) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                route = scope.get("route")
                self._counts[route.path_format if isinstance(route, APIRoute) else "", message["status"]] += 1
            await send(message)

        try:
            await self._app(scope, receive, note_start)
        except (ClientDisconnect, ClientGone):
            log.info("client gone before its body was read")
        except Exception:
            log.exception("request failed")
            if started:
                raise
            await error_response(InternalError().answer())(scope, receive, note_start)
