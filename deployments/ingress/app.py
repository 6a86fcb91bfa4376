"""The HTTP surface: routes, authentication, and every error in OpenAI's shape, or in that of the caller's dialect."""

# No `from __future__ import annotations`: FastAPI resolves the annotations of the routes at run time, and cannot see
# names that are local to `build_app`.
import asyncio
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import structlog
from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.contracts import IngressCounters, KeyInfo
from deployments.ingress.api.completions.completion import Completion
from deployments.ingress.api.completions.dialects import D3, DIALECTS, Dialect, dialect_of
from deployments.ingress.api.completions.response import CompletionResponse
from deployments.ingress.api.keys import administration_routes, require_admin
from deployments.ingress.api.tokens import Tokenization
from deployments.ingress.api.usage import usage_routes
from deployments.ingress.errors import (
    ApiError,
    BodyTooLarge,
    ClientGone,
    ErrorAnswer,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
    UnsupportedEncoding,
    UnsupportedMediaType,
)
from deployments.ingress.http.connection_middleware import ConnectionMiddleware
from deployments.ingress.http.json_body import parsed
from deployments.ingress.meter_client import MeterClient
from deployments.ingress.metrics import METRICS_TYPE, PoolState, ingress_counters, metrics_text
from deployments.ingress.openapi.pages import documentation_routes
from deployments.ingress.routing.catalog import Catalog, ServedModel
from deployments.meter.remote.meter_transport import MeterUnreachable

__all__ = ["IngressSettings", "build_app"]

log = structlog.get_logger()


@dataclass(frozen=True)
class IngressSettings:
    request_body_limit_bytes: int
    keep_alive_s: float
    request_timeout_s: float | None = None
    upload_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    cors_origins: tuple[str, ...] = ()


async def _no_others() -> list[IngressCounters]:
    return []


def build_app(
    catalog: Catalog,
    meter: MeterClient,
    settings: IngressSettings,
    others: Callable[[], Awaitable[list[IngressCounters]]] = _no_others,
) -> ASGIApp:
    """`others` tells the counters of all other ingress replicas."""
    app = FastAPI(title="Millstream", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    tokenization = Tokenization(catalog)

    async def read_body(request: Request) -> bytes:
        return await _read_body(request, settings.request_body_limit_bytes)

    async def authenticated(request: Request, dialect: Dialect) -> KeyInfo:
        key = dialect.key(request.headers)
        if key:
            return await meter.authenticate(key)
        try:
            return await meter.authenticate("")  # who it is if the cluster requires no keys
        except InvalidApiKey:
            raise dialect.missing_key(request.headers) from None

    async def caller(request: Request) -> KeyInfo:
        return await authenticated(request, dialect_of(D3.path, request.headers))

    Caller = Annotated[KeyInfo, Depends(caller)]

    def completions_at(path: str) -> Callable[[Request], Awaitable[Response]]:
        async def create_completion(request: Request) -> Response:
            dialect = dialect_of(path, request.headers)
            try:
                key = await authenticated(request, dialect)
                body = await read_body(request)
                asked = await parsed(body, partial(dialect.parse, query_model=request.query_params.get("model")))
                completion = Completion(
                    asked,
                    catalog.find(asked.model),
                    key,
                    meter,
                    catalog.constraints,
                    dialect=dialect.name,
                    caller_request_id=request.state.request_id,
                )
                await completion.admit()
            except ApiError as error:
                return _error_response(dialect.answer(error))
            return CompletionResponse(
                completion,
                keep_alive_s=settings.keep_alive_s,
                deadline_s=settings.request_timeout_s,
                answer_error=dialect.answer,
                extras=dialect.extras(str(request.base_url).rstrip("/")),
            )

        return create_completion

    for path in {dialect.path for dialect in DIALECTS}:
        app.add_route(path, completions_at(path), methods=["POST"])

    @app.post("/tokenize")
    async def tokenize(request: Request, _key: Caller) -> Response:
        body = await read_body(request)
        return Response(await tokenization.tokenize(body), media_type="application/json")

    @app.post("/detokenize")
    async def detokenize(request: Request, _key: Caller) -> Response:
        body = await read_body(request)
        return Response(await tokenization.detokenize(body), media_type="application/json")

    @app.get("/v1/models")
    async def list_models(key: Caller) -> dict[str, Any]:
        usable = [model for model in catalog.models() if _usable(model, key)]
        return {"object": "list", "data": [_model_card(model, name) for model in usable for name in model.entry.names]}

    @app.get("/v1/models/{model:path}")  # names have slashes
    async def retrieve_model(model: str, _key: Caller) -> dict[str, Any]:
        return _model_card(catalog.find(model), model)

    @app.get("/admin/v1/replicas")
    async def list_replicas(request: Request) -> dict[str, Any]:
        """Every engine replica as this ingress sees it, for `millstream status`."""
        await require_admin(caller, request)
        return {"object": "list", "data": [card for model in catalog.models() for card in model.pool.cards()]}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        await require_admin(caller, request)
        meters, others_counted = await asyncio.gather(meter.counters(), others())
        ingresses = [ingress_counters(catalog, meter), *others_counted]
        pools = [
            PoolState(model.entry.name, model.entry.min_replicas, model.entry.max_replicas, model.pool.cards())
            for model in catalog.models()
        ]
        return Response(metrics_text(meters, ingresses, pools), media_type=METRICS_TYPE)

    @app.get("/health")  # vLLM's name, at which GuideLLM, aiperf and container images look
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

    app.router.routes.extend(administration_routes(meter.administer, caller, read_body))
    app.router.routes.extend(usage_routes(meter.usage, caller))
    app.router.routes.extend(documentation_routes())
    _answer_head(app)

    @app.exception_handler(ApiError)
    async def on_api_error(_request: Request, error: ApiError) -> Response:
        return _error_response(error.answer())

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 405:
            response = _error_response(MethodNotAllowed(f"{request.method} is not allowed on {path}.").answer())
            response.headers.update(error.headers or {})
            return response
        return _error_response(
            RouteNotFound(
                f"Unknown request URL: {request.method} {path}. Completions are at POST /v1/completions."
            ).answer()
        )

    # Inside of Starlette's own ServerErrorMiddleware, which would answer first, in plain text.
    app.add_middleware(_Unexpected)
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


def _usable(model: ServedModel, key: KeyInfo) -> bool:
    """The meter decides on requests in the same way (deployments/meter/admission/admission.py)."""
    return key.models is None or any(name in key.models for name in model.entry.names)


def _model_card(model: ServedModel, name: str) -> dict[str, Any]:
    """Under `name`, one of its names, in the shape of vLLM's, on whose fields its own clients insist."""
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "millstream",
        "root": model.entry.root or model.entry.name,
        "parent": None if name == model.entry.name else model.entry.name,
        "max_model_len": model.entry.max_model_len,
        "permission": [
            {
                "id": f"modelperm-{name}",
                "object": "model_permission",
                "created": model.created,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }


async def _read_body(request: Request, limit_bytes: int) -> bytes:
    """The body, read and unpacked no further than the limit. Raises UnsupportedMediaType, BodyTooLarge, InvalidRequest,
    RequestTimeout."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise UnsupportedMediaType(
            f"Content-Type is '{content_type or 'missing'}'; expected 'application/json'. With curl, add "
            "-H 'Content-Type: application/json'."
        )
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", *_GZIP):
        raise UnsupportedEncoding(
            f"Content-Encoding is '{encoding[:100]}'; expected 'gzip', or none: send the body as it is."
        )
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise BodyTooLarge(f"The body is larger than the limit of {limit_bytes} bytes.")
        chunks.append(chunk)
    body = b"".join(chunks)
    # On a thread: a body at the limit takes tens of milliseconds.
    return await run_sync(_gunzipped, body, limit_bytes) if encoding in _GZIP else body


_GZIP = ("gzip", "x-gzip")
_MAX_MEMBERS = 8


def _gunzipped(body: bytes, limit_bytes: int) -> bytes:
    """Unpacked no further than the limit, whatever is packed. Raises InvalidRequest, BodyTooLarge."""
    unpacked = bytearray()
    members = 0
    while body:
        members += 1
        if members > _MAX_MEMBERS:  # each copies what is behind it
            raise InvalidRequest(f"The body has more than {_MAX_MEMBERS} pieces that gzip made. Pack it in one.")
        member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        try:
            unpacked += member.decompress(body, limit_bytes + 1 - len(unpacked))
        except zlib.error:
            raise InvalidRequest("The body is not what gzip makes, which Content-Encoding says.") from None
        if len(unpacked) > limit_bytes:
            raise BodyTooLarge(f"The body is larger than the limit of {limit_bytes} bytes, once it is unpacked.")
        if not member.eof:
            raise InvalidRequest("The body ends before what gzip has packed does.")
        body = member.unused_data
    return bytes(unpacked)


def _error_response(answer: ErrorAnswer) -> Response:
    return Response(answer.body, answer.status, answer.headers, media_type="application/json")


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
        except (ClientDisconnect, ClientGone):
            log.info("client gone before its body was read")
        except Exception:
            log.exception("request failed")
            if started:
                raise
            await _error_response(InternalError().answer())(scope, receive, send)
