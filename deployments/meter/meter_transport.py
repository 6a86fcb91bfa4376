"""How a meter is called from other processes: the seam, and its form over Ray Serve."""

from __future__ import annotations

from typing import Any, Protocol, cast

import grpc
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.meter.errors import MeterError

__all__ = ["MeterTransport", "MeterUnreachable", "ServeMeter"]


class MeterUnreachable(Exception):
    """The meter gave no answer; it may or may not have acted."""


class MeterTransport(Protocol):
    """One attempt to call one meter. Every method raises MeterUnreachable when there is no answer."""

    async def authenticate(self, digest: bytes) -> bytes:
        """The SHA-256 of a key in, a packed KeyInfo out, or nothing for an unknown key."""

    async def admit(self, requests: bytes) -> bytes:
        """A packed list of AdmissionRequest in, as many packed answers out."""

    async def settle(self, settlements: bytes) -> None:
        """A packed list of Settlement, on disk when this returns."""

    async def renew(self, ingress_id: str) -> None:
        """That ingress lives, and will settle what it had admitted."""

    async def administer(self, command: bytes) -> bytes: ...

    async def usage(self, query: bytes) -> bytes: ...

    async def counters(self) -> bytes: ...

    async def ping(self) -> None: ...


class ServeMeter:
    """A MeterTransport over the handle of a meter's deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        # The messages are bytes already; Serve's default, cloudpickle, is several times slower on them than pickle.
        self._handle = handle.options(request_serialization="pickle", response_serialization="pickle")

    async def authenticate(self, digest: bytes) -> bytes:
        return cast(bytes, await self._call("authenticate", digest))

    async def admit(self, requests: bytes) -> bytes:
        return cast(bytes, await self._call("admit", requests))

    async def settle(self, settlements: bytes) -> None:
        await self._call("settle", settlements)

    async def renew(self, ingress_id: str) -> None:
        await self._call("renew", ingress_id)

    async def administer(self, command: bytes) -> bytes:
        return cast(bytes, await self._call("administer", command))

    async def usage(self, query: bytes) -> bytes:
        return cast(bytes, await self._call("usage", query))

    async def counters(self) -> bytes:
        return cast(bytes, await self._call("counters"))

    async def ping(self) -> None:
        await self._call("ping")

    async def _call(self, method: str, *arguments: bytes | str) -> Any:
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except (RayError, RayServeException, grpc.RpcError, MeterError, RuntimeError) as error:
            # RuntimeError is how Serve tells of a gRPC call that ended in an unexpected way.
            raise MeterUnreachable(type(error).__name__) from error
