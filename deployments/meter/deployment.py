"""The meter as a Ray Serve replica: MessagePack on the outside, Meter on the inside, nothing else.

The class is plain; serve_app/applications.py applies `serve.deployment(...)` to it. It runs as one replica,
because reservations live in its memory. All methods are coroutines so that Serve keeps them on the one event
loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from deployments.contracts import AdmissionRequest, KeyInfo, Settlement, pack, unpack
from deployments.meter.catalogue import MeteredModel
from deployments.meter.errors import MeterClosed
from deployments.meter.keys import AnyKey, Authenticator, KeyRing, ensure_admin_key, key_digest
from deployments.meter.ledger import Ledger
from deployments.meter.meter import Meter

__all__ = ["MeterDeployment"]


class MeterDeployment:
    """Errors of deployments/meter/errors.py reach the caller as themselves, pickled on the way."""

    def __init__(self, home: str, database_url: str, require_keys: bool) -> None:
        """`home` is MILLSTREAM_HOME: made if missing, holds the admin key. Raises AdminKeyError and as Ledger does."""
        folder = Path(home)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        keys: Authenticator = AnyKey()
        if require_keys:
            admin = KeyInfo(key_id="admin", name="admin", admin=True)
            keys = KeyRing({key_digest(ensure_admin_key(folder)): admin})
        self._meter = Meter(Ledger(database_url), keys)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this at the start and on changes: `{"models": [{"name", "folder", "max_model_len"}]}`."""
        self._meter.set_models(
            MeteredModel(name=model["name"], folder=Path(model["folder"]), max_model_len=model["max_model_len"])
            for model in user_config["models"]
        )

    async def authenticate(self, digest: bytes) -> bytes:
        """The SHA-256 of a key in, packed KeyInfo out; b"" for an unknown key."""
        info = self._meter.authenticate(digest)
        return b"" if info is None else pack(info)

    async def admit(self, requests: bytes) -> bytes:
        """A packed list of AdmissionRequest in, as many packed Admitted or AdmissionRefused out, in order. Raises as
        Meter.admit, for all of them."""
        admissions = (self._meter.admit(request) for request in unpack(requests, list[AdmissionRequest]))
        return pack(await asyncio.gather(*admissions))

    async def settle(self, settlements: bytes) -> None:
        """A packed list of Settlement, durable when this returns. Raises as Meter.settle."""
        await self._meter.settle(unpack(settlements, list[Settlement]))

    async def ping(self) -> None:
        """Raises LedgerUnavailable unless the ledger's database answers."""
        await self._meter.check_reachable()

    async def check_health(self) -> None:
        """For Serve, which replaces a replica that fails this. An unreachable database is `ping`'s matter: a
        new replica would not reach it either, and would have lost its reservations."""
        if self._meter.closed:
            raise MeterClosed("meter")

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve calls this when it stops the replica and awaits what it returns. Not `async def`: the garbage
        collector calls it too, and would leave a coroutine that nobody awaits."""
        meter: Meter | None = getattr(self, "_meter", None)  # None when __init__ failed
        return None if meter is None or meter.closed else meter.close()
