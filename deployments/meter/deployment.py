"""The meter as a Ray Serve replica: its start, its end, and the way to it.

The class is plain; serve_app/applications.py applies `serve.deployment(...)` to it. Each deployment runs as one
replica, because limits and reservations live in its memory. All methods are coroutines so that Serve keeps them on the
one event loop. What it is for is called over connections (meter_connection.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from ray.util import get_node_ip_address

from deployments.connections._serve_listener import listen_at_node_address
from deployments.contracts import pack
from deployments.logging import configure_logging
from deployments.meter.admission.model_catalog import MeteredModel
from deployments.meter.errors import MeterClosed
from deployments.meter.keys.keys import ensure_admin_key, key_digest
from deployments.meter.meter import Meter, MeterSettings
from deployments.meter.remote.meter_connection import MeterServer
from deployments.meter.service import MeterService

__all__ = ["MeterDeployment"]

_PREDECESSOR_S: Final = 30.0
_PREDECESSOR_POLL_S: Final = 0.1


class MeterDeployment:
    def __init__(
        self,
        home: str,
        database_url: str,
        require_keys: bool,
        *,
        shard: int = 0,
        shards: int = 1,
        lost_after_s: float = 60.0,
        record_refusals: bool = False,
    ) -> None:
        """`home` is MILLSTREAM_HOME: made if missing, holds the admin key and the meter's files. This is the meter
        number `shard` of `shards`. Raises AdminKeyError."""
        configure_logging()
        listen_at_node_address()
        folder = Path(home)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._settings = MeterSettings(
            folder=folder / "meter",
            database_url=database_url,
            admin_digest=key_digest(ensure_admin_key(folder)),
            require_keys=require_keys,
            shard=shard,
            shards=shards,
            lost_after_s=lost_after_s,
            record_refusals=record_refusals,
        )
        self._opened: Meter | None = None
        self._server: MeterServer | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this before the first request and on changes: `{"models": [{"name", "aliases", "folder",
        "max_model_len", "prompt_price", "completion_price"}]}`. Raises as Meter, TimeoutError when its predecessor does
        not end."""
        if self._opened is None:
            self._opened = await self._open()
            await self._opened.start()
            server = MeterServer(MeterService(self._opened).answer)
            await server.start(get_node_ip_address())
            self._server = server
        self._opened.set_models(
            MeteredModel(
                name=model["name"],
                folder=Path(model["folder"]),
                max_model_len=model["max_model_len"],
                prompt_price=model["prompt_price"],
                completion_price=model["completion_price"],
                aliases=tuple(model.get("aliases", ())),
            )
            for model in user_config["models"]
        )

    async def _open(self) -> Meter:
        """Two processes must not decide on the same limits: waits for the one before to let go of its files."""
        async with asyncio.timeout(_PREDECESSOR_S):
            while True:
                try:
                    return Meter(self._settings)
                except BlockingIOError:
                    await asyncio.sleep(_PREDECESSOR_POLL_S)

    async def connect(self) -> bytes:
        """A packed Ticket for one connection. Raises MeterClosed when the meter is not open."""
        if self._server is None:
            raise MeterClosed("meter")
        return pack(self._server.ticket())

    async def check_health(self) -> None:
        """For Serve, which replaces a replica that fails this. An unreachable database is `ping`'s matter: a new
        replica would not reach it either."""
        if self._opened is not None and self._opened.closed:
            raise MeterClosed("meter")

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve calls this when it stops the replica and awaits what it returns. Not `async def`: the garbage
        collector calls it too, and would leave a coroutine that nobody awaits."""
        meter: Meter | None = getattr(self, "_opened", None)  # missing when __init__ failed
        return None if meter is None or meter.closed else self._shut_down(meter)

    async def _shut_down(self, meter: Meter) -> None:
        if self._server is not None:
            await self._server.close()
            self._server = None
        await meter.close()
