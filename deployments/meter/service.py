"""What a meter does for other processes: MessagePack on the outside, Meter on the inside."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from deployments.contracts import AdmissionRequest, Settlement, UsageQuery, pack, unpack, unpack_command
from deployments.meter.errors import NotAdmitted
from deployments.meter.meter import Meter
from deployments.meter.remote.meter_connection import MeterMethod

__all__ = ["MeterService"]


class MeterService:
    """The methods of deployments/meter/remote/meter_transport.py. Each raises as that of Meter, but a refusal of
    `admit` is an answer."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._methods: dict[MeterMethod, Callable[[bytes], Awaitable[bytes]]] = {
            "authenticate": self._authenticate,
            "admit": self._admit,
            "settle": self._settle,
            "renew": self._renew,
            "administer": self._administer,
            "usage": self._usage,
            "counters": self._counters,
            "ping": self._ping,
        }

    async def answer(self, method: MeterMethod, argument: bytes) -> bytes:
        return await self._methods[method](argument)

    async def _authenticate(self, digest: bytes) -> bytes:
        info = await self._meter.authenticate(digest)
        return b"" if info is None else pack(info)

    async def _admit(self, request: bytes) -> bytes:
        try:
            return pack(await self._meter.admit(unpack(request, AdmissionRequest)))
        except NotAdmitted as refused:
            return pack(refused.refusal)

    async def _settle(self, settlements: bytes) -> bytes:
        await self._meter.settle(unpack(settlements, list[Settlement]))
        return b""

    async def _renew(self, ingress_id: bytes) -> bytes:
        self._meter.renew(ingress_id.decode())
        return b""

    async def _administer(self, command: bytes) -> bytes:
        return pack(await self._meter.administer(unpack_command(command)))

    async def _usage(self, query: bytes) -> bytes:
        return pack(await self._meter.usage(unpack(query, UsageQuery)))

    async def _counters(self, _nothing: bytes) -> bytes:
        return pack(self._meter.counters())

    async def _ping(self, _nothing: bytes) -> bytes:
        await self._meter.check_reachable()
        return b""
