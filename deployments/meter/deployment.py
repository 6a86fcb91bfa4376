"""The meter as a Ray Serve replica: MessagePack on the outside, Meter on the inside, nothing else.

The class is plain; serve_app/applications.py applies `serve.deployment(...)` to it. Each deployment runs as one
replica, because limits and reservations live in its memory. All methods are coroutines so that Serve keeps them on the
one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from deployments._serve_listener import listen_at_node_address
from deployments.contracts import AdmissionRequest, Settlement, UsageQuery, pack, unpack, unpack_command
from deployments.logging import configure_logging
from deployments.meter.catalogue import MeteredModel
from deployments.meter.errors import MeterClosed
from deployments.meter.keys import ensure_admin_key, key_digest
from deployments.meter.meter import Meter, MeterSettings

__all__ = ["MeterDeployment"]

_PREDECESSOR_S: Final = 30.0
_PREDECESSOR_POLL_S: Final = 0.1


class MeterDeployment:
    """Errors of deployments/meter/errors.py reach the caller as themselves, pickled on the way."""

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

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this before the first request and on changes: `{"models": [{"name", "folder", "max_model_len",
        "prompt_price", "completion_price"}]}`. Raises as Meter, TimeoutError when its predecessor does not end."""
        if self._opened is None:
            self._opened = await self._open()
            await self._opened.start()
        self._opened.set_models(
            MeteredModel(
                name=model["name"],
                folder=Path(model["folder"]),
                max_model_len=model["max_model_len"],
                prompt_price=model["prompt_price"],
                completion_price=model["completion_price"],
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

    @property
    def _meter(self) -> Meter:
        if self._opened is None:
            raise MeterClosed("the meter is not open yet")
        return self._opened

    async def authenticate(self, digest: bytes) -> bytes:
        """The SHA-256 of a key in, packed KeyInfo out; b"" for an unknown key. Raises as Meter.authenticate."""
        info = await self._meter.authenticate(digest)
        return b"" if info is None else pack(info)

    async def admit(self, requests: bytes) -> bytes:
        """A packed list of AdmissionRequest in, as many packed Admitted or AdmissionRefused out, in order. Raises as
        Meter.admit, for all of them."""
        return pack(await self._meter.admit(unpack(requests, list[AdmissionRequest])))

    async def settle(self, settlements: bytes) -> None:
        """A packed list of Settlement, durable when this returns. Raises as Meter.settle."""
        await self._meter.settle(unpack(settlements, list[Settlement]))

    async def renew(self, ingress_id: str) -> None:
        """That ingress lives."""
        self._meter.renew(ingress_id)

    async def administer(self, command: bytes) -> bytes:
        """A packed AdministrationCommand in, a packed AdministrationAnswer out. Raises as Meter.administer."""
        return pack(await self._meter.administer(unpack_command(command)))

    async def usage(self, query: bytes) -> bytes:
        """A packed UsageQuery in, a packed list of UsageRow out. Raises as Meter.usage."""
        return pack(await self._meter.usage(unpack(query, UsageQuery)))

    async def counters(self) -> bytes:
        """Packed MeterCounters."""
        return pack(self._meter.counters())

    async def ping(self) -> None:
        """Raises LedgerUnavailable unless the ledger's database answers."""
        await self._meter.check_reachable()

    async def check_health(self) -> None:
        """For Serve, which replaces a replica that fails this. An unreachable database is `ping`'s matter: a new
        replica would not reach it either."""
        if self._opened is not None and self._opened.closed:
            raise MeterClosed("meter")

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve calls this when it stops the replica and awaits what it returns. Not `async def`: the garbage
        collector calls it too, and would leave a coroutine that nobody awaits."""
        meter: Meter | None = getattr(self, "_opened", None)  # missing when __init__ failed
        return None if meter is None or meter.closed else meter.close()
