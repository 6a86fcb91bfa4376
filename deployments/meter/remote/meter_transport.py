"""How a meter is called from other processes: the seam, free of Ray; remote_meter.py is its form over a connection."""

from __future__ import annotations

from typing import Protocol

from deployments.meter.remote.meter_connection import MeterUnreachable

__all__ = ["MeterTransport", "MeterUnreachable"]


class MeterTransport(Protocol):
    """One attempt to call one meter. Every method raises MeterUnreachable when there is no answer."""

    async def authenticate(self, digest: bytes) -> bytes:
        """The SHA-256 of a key in, a packed KeyInfo out, or nothing for an unknown key."""

    async def admit(self, request: bytes) -> bytes:
        """A packed AdmissionRequest in, its packed answer out, as soon as it is decided."""

    async def settle(self, settlements: bytes) -> None:
        """A packed list of Settlement, on disk when this returns."""

    async def renew(self, ingress_id: str) -> None:
        """That ingress lives, and will settle what it had admitted."""

    async def administer(self, command: bytes) -> bytes: ...

    async def usage(self, query: bytes) -> bytes: ...

    async def counters(self) -> bytes: ...

    async def ping(self) -> None: ...
