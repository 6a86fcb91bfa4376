"""The ingress in memory, for errors that a healthy cluster does not give, and what the official client makes of
them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import httpx2
import openai

from deployments.ingress.app import IngressSettings, build_app
from tests.conformance.faces import Face
from tests.deployments.ingress.memory_gateway import BODY_LIMIT_BYTES, Gateway, meter_client_of
from tests.deployments.ingress.memory_meter import USER_KEY

__all__ = ["app_with_deadline", "replayed", "speaking"]


@asynccontextmanager
async def speaking(gate: Gateway, face: Face) -> AsyncIterator[httpx.AsyncClient]:
    """A client of one dialect, with a user's key."""
    transport = httpx.ASGITransport(gate.app)
    headers = face.headers(USER_KEY)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
        yield client


@asynccontextmanager
async def app_with_deadline(gate: Gateway, request_timeout_s: float) -> AsyncIterator[None]:
    """`gate` answers within so many seconds."""
    meter = meter_client_of(gate.meter, gate.folder, "timed")
    await meter.start()
    untimed = gate.app
    gate.app = build_app(gate.catalog, meter, IngressSettings(BODY_LIMIT_BYTES, 15.0, request_timeout_s))
    try:
        yield
    finally:
        gate.app = untimed
        await meter.close()


@contextmanager
def replayed(status: int, body: bytes, headers: dict[str, str]) -> Iterator[openai.OpenAI]:
    """The official client, on a server that gives this answer to everything."""

    def answer(_request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, content=body, headers=headers)

    with (
        httpx2.Client(transport=httpx2.MockTransport(answer)) as http_client,
        openai.OpenAI(base_url="http://x/v1", api_key="k", max_retries=0, http_client=http_client) as client,
    ):
        yield client
