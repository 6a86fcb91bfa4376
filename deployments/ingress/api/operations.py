"""For those who run the server: is it up, what are its replicas and its metrics."""

from __future__ import annotations

import asyncio
from typing import Any, Final, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.responses import Response

from deployments.ingress.api.description.answers import Answer, Count
from deployments.ingress.api.description.endpoint import Endpoint
from deployments.ingress.api.description.operations import (
    ADMIN_SECURITY,
    ANY_WITH_KEY,
    PUBLIC,
    answered,
    json_content,
    operation,
)
from deployments.ingress.api.services import Admin, ServicesOf
from deployments.ingress.metrics import METRICS_TYPE, PoolState, ingress_counters, metrics_text
from deployments.meter.remote.meter_transport import MeterUnreachable

__all__ = ["OPERATIONS"]


class Replica(Answer):
    id: str
    model: str
    in_rotation: bool
    draining: bool
    running: Count
    waiting: Count
    waiting_prefill_tokens: Count
    kv_blocks_free: Count
    kv_blocks_total: Count
    finished_per_s: float
    start_up_s: float
    """How long it took to start."""
    kv_block_tokens: Count
    max_num_seqs: Count
    unsettled: Count


class ReplicaList(Answer):
    object: Literal["list"]
    data: list[Replica]


class Health(Answer):
    status: Literal["ok"]


class Readiness(Answer):
    status: Literal["ready", "not ready"]
    routes: bool
    """The list of models is known."""
    meter: bool
    """Keys can be checked and usage recorded."""
    models: dict[str, bool]
    """Which of them have a replica."""


_router = APIRouter()
OPERATIONS: Final = Endpoint("operation", "For those who run the server.", _router, (Health, Readiness, ReplicaList))


@_router.get(
    "/admin/v1/replicas",
    openapi_extra=operation(
        "List the engine replicas",
        "listReplicas",
        answered("All, as this server sees them.", json_content("ReplicaList")),
        *ANY_WITH_KEY,
        403,
        security=ADMIN_SECURITY,
    ),
)
async def list_replicas(services: ServicesOf, _key: Admin) -> dict[str, Any]:
    """Every engine replica as this ingress sees it, for `millstream status`."""
    return {"object": "list", "data": [card for model in services.catalog.models() for card in model.pool.cards()]}


@_router.get(
    "/metrics",
    openapi_extra=operation(
        "Tell Prometheus of the cluster",
        "metrics",
        answered("In Prometheus' text format.", {"text/plain": {"schema": {"type": "string"}}}),
        *ANY_WITH_KEY,
        403,
        security=ADMIN_SECURITY,
    ),
)
async def metrics(services: ServicesOf, _key: Admin) -> Response:
    catalog, meter = services.catalog, services.meter
    meters, others = await asyncio.gather(meter.counters(), services.other_counters())
    pools = [
        PoolState(model.entry.name, model.entry.min_replicas, model.entry.max_replicas, model.pool.cards())
        for model in catalog.models()
    ]
    text = metrics_text(meters, [ingress_counters(catalog, meter, services.responses), *others], pools)
    return Response(text, media_type=METRICS_TYPE)


def _health(operation_id: str) -> dict[str, Any]:
    answer = answered("It does.", json_content("Health"))
    return operation("Tell whether the process runs", operation_id, answer, 500, security=PUBLIC)


@_router.get("/healthz", openapi_extra=_health("health"))
@_router.get("/health", openapi_extra=_health("healthAsInVllm"))  # at which GuideLLM, aiperf and images look
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


_READINESS: Final = operation(
    "Tell whether requests can be served",
    "readiness",
    answered("They can.", json_content("Readiness")),
    500,
    security=PUBLIC,
)
_READINESS["responses"]["503"] = answered("They cannot.", json_content("Readiness"))


@_router.get("/readyz", openapi_extra=_READINESS)
async def readyz(services: ServicesOf) -> JSONResponse:
    """The routes are known, the meter answers, and at least one model can be served."""
    catalog = services.catalog
    try:
        await services.meter.ping()
        metered = True
    except (MeterUnreachable, TimeoutError):
        metered = False
    models = {model.entry.name: model.pool.ready for model in catalog.models()}
    ready = catalog.known and metered and any(models.values())
    return JSONResponse(
        {"status": "ready" if ready else "not ready", "routes": catalog.known, "meter": metered, "models": models},
        status_code=200 if ready else 503,
    )
