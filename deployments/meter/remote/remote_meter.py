"""Calls to a meter over a connection that Ray Serve leads to."""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import Any

import grpc
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.connections.ticketed_connection import Ticket, connected
from deployments.contracts import unpack
from deployments.meter.errors import MeterError
from deployments.meter.remote.meter_connection import CALL_LIMIT_S, MeterConnection, MeterMethod, MeterUnreachable

__all__ = ["RemoteMeter"]


class RemoteMeter:
    """A MeterTransport over one connection, which is made when it is needed and made anew when it is lost. For use on
    one event loop."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        """`handle` is of the meter's deployment."""
        # The ticket is bytes already; Serve's default, cloudpickle, is several times slower on them than pickle.
        self._handle = handle.options(request_serialization="pickle", response_serialization="pickle")
        self._connection: MeterConnection | None = None
        self._connecting: asyncio.Task[MeterConnection] | None = None

    async def authenticate(self, digest: bytes) -> bytes:
        return await self._call("authenticate", digest)

    async def admit(self, request: bytes) -> bytes:
        return await self._call("admit", request)

    async def settle(self, settlements: bytes) -> None:
        await self._call("settle", settlements)

    async def renew(self, ingress_id: str) -> None:
        await self._call("renew", ingress_id.encode())

    async def administer(self, command: bytes) -> bytes:
        return await self._call("administer", command)

    async def usage(self, query: bytes) -> bytes:
        return await self._call("usage", query)

    async def counters(self) -> bytes:
        return await self._call("counters")

    async def ping(self) -> None:
        await self._call("ping")

    def close(self) -> None:
        """Calls that wait are given up. Safe twice; a later call would connect again."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.close()

    async def _call(self, method: MeterMethod, argument: bytes = b"") -> bytes:
        connection = self._connection
        if connection is None or connection.lost:
            connection = await self._connected()
        return await connection.call(method, argument)

    async def _connected(self) -> MeterConnection:
        """One connection for all that wait for one."""
        if self._connecting is None:
            # In a context of its own: when a client leaves, Serve cancels the calls made in its request's context.
            self._connecting = asyncio.create_task(self._connect(), name="meter-connection", context=Context())
            self._connecting.add_done_callback(self._connect_ended)
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> MeterConnection:
        try:
            async with asyncio.timeout(CALL_LIMIT_S):
                ticket = await self._handle.connect.remote()
                self._connection = await connected(unpack(ticket, Ticket), MeterConnection())
        except (RayError, RayServeException, grpc.RpcError, MeterError, RuntimeError, OSError) as error:
            # RuntimeError is how Serve tells of a gRPC call that ended in an unexpected way.
            raise MeterUnreachable(type(error).__name__) from error
        return self._connection

    def _connect_ended(self, connecting: asyncio.Task[MeterConnection]) -> None:
        self._connecting = None
        if not connecting.cancelled():
            connecting.exception()  # told to those who wait, if there is still anybody
