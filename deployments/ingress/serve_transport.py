"""Replicas and meter reached through Ray Serve handles: the only module of the ingress that makes Ray calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import grpc
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.contracts import SubmissionStatus
from deployments.engine.engine import EngineError
from deployments.engine.replica_directory import ReplicaGone
from deployments.ingress.meter_client import MeterUnreachable
from deployments.ingress.replica_stream import ReplicaLost
from deployments.meter.errors import MeterError

__all__ = ["ServeMeter", "ServeReplica", "listed_applications", "open_pool"]

_UNREACHABLE = (RayError, RayServeException, grpc.RpcError, ReplicaGone, EngineError, MeterError)
"""What a Serve call raises when the other side is gone, going, or failed: gRPC's errors and those of the called method
come through bare."""


def _fast(handle: DeploymentHandle[Any]) -> DeploymentHandle[Any]:
    # The messages are bytes already; Serve's default, cloudpickle, is several times slower on them than pickle.
    return handle.options(request_serialization="pickle", response_serialization="pickle")


class ServeReplica:
    """One engine replica, named by its unique id."""

    def __init__(self, handle: DeploymentHandle[Any], replica_id: str) -> None:
        self._handle = _fast(handle)
        self._stream_handle = self._handle.options(stream=True)
        self._replica_id = replica_id

    async def steps(self, stream_id: str) -> AsyncGenerator[bytes, None]:
        response = self._stream_handle.steps.remote(stream_id, target=self._replica_id)
        try:
            async for message in response:
                yield message
        except _UNREACHABLE as error:
            raise ReplicaLost(type(error).__name__) from error
        finally:
            response.cancel()

    async def submit(self, stream_id: str, submissions: bytes) -> list[SubmissionStatus]:
        try:
            statuses = await self._handle.submit.remote(stream_id, submissions, target=self._replica_id)
        except _UNREACHABLE as error:
            raise ReplicaLost(type(error).__name__) from error
        return cast(list[SubmissionStatus], statuses)

    async def abort(self, stream_id: str, generations: list[int]) -> None:
        try:
            await self._handle.abort.remote(stream_id, generations, target=self._replica_id)
        except _UNREACHABLE as error:
            raise ReplicaLost(type(error).__name__) from error


class ServeMeter:
    """The meter of the same application."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = _fast(handle)

    async def authenticate(self, digest: bytes) -> bytes:
        return cast(bytes, await self._call("authenticate", digest))

    async def admit(self, request: bytes) -> bytes:
        return cast(bytes, await self._call("admit", request))

    async def settle(self, settlements: bytes) -> None:
        await self._call("settle", settlements)

    async def ping(self) -> None:
        await self._call("ping")

    async def _call(self, method: str, *arguments: bytes) -> Any:
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except _UNREACHABLE as error:
            raise MeterUnreachable(type(error).__name__) from error


async def listed_applications() -> frozenset[str]:
    """Names of the applications that Serve knows, whatever their state. Raises RayError without a controller."""
    status = await asyncio.to_thread(serve.status)
    return frozenset(status.applications)


async def open_pool(application: str, deployment: str) -> DeploymentHandle[Any]:
    """A handle to a pool, with its router running, so that `watch_replicas` hears of the replicas."""
    handle: DeploymentHandle[Any] = await asyncio.to_thread(serve.get_deployment_handle, deployment, application)
    # A handle starts its router with the first call; this one goes to nobody.
    handle.load.remote(target="").cancel()
    return handle
