"""The routes of administration and usage over a database of their own, without the rest of the ingress."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from deployments.contracts import (
    AdministrationAnswer,
    AdministrationCommand,
    KeyInfo,
    UsageQuery,
    UsageRow,
    pack,
    unpack,
    unpack_command,
)
from deployments.ingress.api.keys import administration_routes
from deployments.ingress.api.usage import usage_routes
from deployments.ingress.errors import ApiError
from deployments.meter.keys.administration import administer
from deployments.meter.keys.key_store import KeyStore
from deployments.meter.ledger.database import open_database
from deployments.meter.ledger.schema import USAGE_HOURS
from deployments.meter.ledger.usage import read_usage
from tests.sqlite import new_database

__all__ = ["USER", "Administration", "administration", "record_hour"]

USER = {"authorization": "Bearer user"}
"""Headers of the key `key-user`."""


@dataclass
class Administration:
    store: KeyStore
    engine: sa.Engine
    app: Starlette
    client: httpx.AsyncClient
    """With the admin key."""


@asynccontextmanager
async def administration(folder: Path) -> AsyncIterator[Administration]:
    engine = open_database(new_database(folder / "ledger.db"))
    store = KeyStore(engine)

    async def over_the_wire(command: AdministrationCommand) -> AdministrationAnswer:
        return unpack(pack(administer(store, unpack_command(pack(command)))), AdministrationAnswer)

    async def usage(query: UsageQuery) -> list[UsageRow]:
        with engine.connect() as connection:
            return read_usage(connection, unpack(pack(query), UsageQuery))

    async def caller(request: Request) -> KeyInfo:
        name = request.headers["authorization"].removeprefix("Bearer ")
        return KeyInfo(f"key-{name}", name, admin=name == "admin")

    async def read_body(request: Request) -> bytes:
        return await request.body()

    async def on_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        status, body, headers = error.answer()
        return Response(body, status, headers, media_type="application/json")

    app = Starlette(
        routes=[*administration_routes(over_the_wire, caller, read_body), *usage_routes(usage, caller)],
        exception_handlers={ApiError: on_error},
    )
    try:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://gateway",
            headers={"authorization": "Bearer admin"},
        ) as client:
            yield Administration(store, engine, app, client)
    finally:
        engine.dispose()


def record_hour(
    engine: sa.Engine,
    hour: int,
    *,
    key_id: str = "key-user",
    team: str = "",
    model: str = "m",
    requests: int = 1,
    status: str = "finished",
) -> None:
    """Ten prompt tokens a request, four of them cached, and five completion tokens."""
    with engine.begin() as connection:
        connection.execute(
            sa.insert(USAGE_HOURS).values(
                hour=hour,
                key_id=key_id,
                team=team,
                model=model,
                dialect="D3",
                status=status,
                requests=requests,
                prompt_tokens=10 * requests,
                cached_tokens=4 * requests,
                completion_tokens=5 * requests,
                cost=0.5 * requests,
            )
        )
