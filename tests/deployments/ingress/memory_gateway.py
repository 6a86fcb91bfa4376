"""The whole ingress in memory: its HTTP app, a meter, and pools of simulated engines. And a client that can hang up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp, Message
from structlog.testing import capture_logs

from deployments.contracts import Settlement
from deployments.engine.simulator import SimulatorSettings
from deployments.ingress.app import IngressSettings, build_app
from deployments.ingress.meter_client import MeterClient
from deployments.ingress.routing.catalog import Catalog, CatalogEntry
from deployments.ingress.routing.engine_pool import EnginePool, PoolLimits
from tests.deployments.ingress.letter_tokenizer import letter_tokenizer, save_letter_tokenizer
from tests.deployments.ingress.memory_meter import USER_KEY, MemoryMeter
from tests.deployments.ingress.memory_replicas import LIMITS, SETTINGS, MemoryReplica, replicas_of
from tests.deployments.ingress.virtual_time import write_scheduler

__all__ = ["BODY_LIMIT_BYTES", "Exchange", "Gateway", "events", "gateway", "meter_client_of"]

BODY_LIMIT_BYTES = 4096
AUTHORIZED = {"authorization": f"Bearer {USER_KEY}"}


@dataclass
class Gateway:
    app: ASGIApp
    meter: MemoryMeter
    catalog: Catalog
    replicas: dict[str, MemoryReplica]
    """Of every model the same."""
    client: httpx.AsyncClient
    """With a user's key."""
    folder: Path

    @property
    def pool(self) -> EnginePool:
        return self.catalog.find("m").pool

    @property
    def sequences(self) -> int:
        return sum(replica.sequences for replica in self.replicas.values())

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": "m", "prompt": "hello", **fields})

    async def stream(self, **fields: Any) -> list[Any]:
        """The events of a streamed completion."""
        response = await self.complete(stream=True, **fields)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return events(response.content)

    def request(self, **fields: Any) -> Exchange:
        """A completion request under way."""
        return Exchange(self.app, json.dumps({"model": "m", "prompt": "hello", **fields}).encode())

    async def settlement(self) -> Settlement:
        """The only one there is."""
        await asyncio.sleep(1)
        [settlement] = self.meter.settlements
        return settlement


def meter_client_of(meter: MemoryMeter, folder: Path, ingress_id: str = "i") -> MeterClient:
    """With an outbox below `folder`."""
    return MeterClient([meter], ingress_id=ingress_id, outbox_folder=folder / "outbox", admission_timeout_s=10.0)


@asynccontextmanager
async def gateway(
    folder: Path,
    *,
    models: tuple[str, ...] = ("m",),
    aliases: tuple[str, ...] = (),
    replicas: int = 1,
    settings: SimulatorSettings = SETTINGS,
    max_waiting: int = 1000,
    limits: PoolLimits = LIMITS,
    keep_alive_s: float = 15.0,
) -> AsyncIterator[Gateway]:
    save_letter_tokenizer(folder)
    meter = MemoryMeter(dict.fromkeys(models, letter_tokenizer()))

    async def existing(_applications: Iterable[str]) -> frozenset[str]:
        return frozenset(f"model-{name}" for name in models)

    async with AsyncExitStack() as stack:
        stack.enter_context(capture_logs())  # tracebacks take their time to be written
        engines = await stack.enter_async_context(replicas_of(replicas, settings, max_waiting=max_waiting))

        async def open_pool(entry: CatalogEntry) -> EnginePool:
            pool = EnginePool(
                entry.name,
                engines.__getitem__,
                ingress_id="i",
                limits=entry.limits,
                writes=write_scheduler(),
                checkpoint=meter_client.checkpoint,
            )
            pool.replicas_changed(frozenset(engines))
            return pool

        catalog = Catalog(existing, open_pool)
        meter_client = meter_client_of(meter, folder)
        await meter_client.start()
        stack.push_async_callback(meter_client.close)
        await catalog.start()
        stack.push_async_callback(catalog.close)
        await catalog.replace(
            [
                CatalogEntry(
                    name=name,
                    aliases=aliases if name == models[0] else (),
                    application=f"model-{name}",
                    folder=folder,
                    max_model_len=2048,
                    fingerprint="fp_1",
                    limits=limits,
                )
                for name in models
            ]
        )
        app = build_app(catalog, meter_client, IngressSettings(BODY_LIMIT_BYTES, keep_alive_s))
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://gateway", headers=AUTHORIZED, timeout=None
        )
        await stack.enter_async_context(client)
        await asyncio.sleep(0.001)
        yield Gateway(app, meter, catalog, engines, client, folder)


class Exchange:
    """One POST to /v1/completions as the server sees it: message by message, with a client that may hang up."""

    def __init__(
        self, app: ASGIApp, body: bytes, *, headers: dict[str, str] | None = None, whole_body: bool = True
    ) -> None:
        """Without `whole_body` the client sends `body` and then nothing."""
        self.status: int | None = None
        self.body = b""
        self.complete = False
        self.asked = 0
        """How often the app asked for what the client sends."""
        self._incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": not whole_body}]
        self._gone = asyncio.Event()
        self._changed = asyncio.Event()
        fields = {"content-type": "application/json", **(AUTHORIZED if headers is None else headers)}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    @property
    def events(self) -> list[Any]:
        return events(self.body)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def hang_up(self) -> None:
        self._gone.set()

    async def _receive(self) -> Message:
        self.asked += 1
        if self._incoming:
            return self._incoming.pop(0)
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert self.status is None, "answered twice"
            self.status = message["status"]
        else:
            assert not self.complete, "something after the end"
            self.body += message.get("body", b"")
            self.complete = not message.get("more_body", False)
        self._changed.set()


def events(body: bytes) -> list[Any]:
    """Server-sent events: the JSON of each, `[DONE]` and comments as text. Fails on anything else."""
    parsed: list[Any] = []
    blocks = body.split(b"\n\n")
    assert blocks.pop() == b"", "the last event is not complete"
    for block in blocks:
        assert b"\n" not in block
        if block.startswith(b": "):
            parsed.append(block.decode())
            continue
        assert block.startswith(b"data: ")
        data = block.removeprefix(b"data: ")
        parsed.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return parsed
