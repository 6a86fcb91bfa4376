"""The routes of administration and usage over a database of their own, without the rest of the ingress."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import httpx
import sqlalchemy as sa
from starlette.types import ASGIApp

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
from deployments.ingress.api.keys.endpoint import KEYS
from deployments.ingress.api.usage import USAGE
from deployments.ingress.app import IngressSettings, build_app
from deployments.ingress.meter_client import MeterClient
from deployments.ingress.routing.catalog import Catalog
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
    app: ASGIApp
    client: httpx.AsyncClient
    """With the admin key."""


class _Meter:
    """What these routes ask of a meter."""

    def __init__(self, store: KeyStore, engine: sa.Engine) -> None:
        self._store = store
        self._engine = engine

    async def authenticate(self, key: str) -> KeyInfo:
        return KeyInfo(f"key-{key}", key, admin=key == "admin")

    async def administer(self, command: AdministrationCommand) -> AdministrationAnswer:
        return unpack(pack(administer(self._store, unpack_command(pack(command)))), AdministrationAnswer)

    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        with self._engine.connect() as connection:
            return read_usage(connection, unpack(pack(query), UsageQuery))


@asynccontextmanager
async def administration(folder: Path) -> AsyncIterator[Administration]:
    engine = open_database(new_database(folder / "ledger.db"))
    store = KeyStore(engine)

    meter = cast(MeterClient, _Meter(store, engine))
    settings = IngressSettings(request_body_limit_bytes=2**20, keep_alive_s=15.0)
    app = build_app(cast(Catalog, None), meter, settings, endpoints=(USAGE, KEYS))
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
