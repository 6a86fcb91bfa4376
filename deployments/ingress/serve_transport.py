"""Replicas reached through Ray Serve handles: the only module of the ingress that makes Ray calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, cast

import grpc
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.contracts import SubmissionStatus, unpack
from deployments.engine.engine import EngineError
from deployments.engine.replica_directory import ReplicaGone
from deployments.ingress.replica_stream import ReplicaLost
from deployments.step_connection import StepTicket, received_steps

__all__ = ["ServePools", "ServeReplica"]

_UNREACHABLE = (RayError, RayServeException, grpc.RpcError, ReplicaGone, EngineError, OSError)
"""What a Serve call raises when the other side is gone, going, or failed: gRPC's errors and those of the called method
come through bare; and a connection."""


_PROBE_LIMIT_S = 0.2


class ServeReplica:
    """One engine replica, named by its unique id."""

    def __init__(self, handle: DeploymentHandle[Any], replica_id: str) -> None:
        # The messages are bytes already; Serve's default, cloudpickle, is several times slower on them than pickle.
        self._handle = handle.options(request_serialization="pickle", response_serialization="pickle")
        self._stream_handle = self._handle.options(stream=True)
        self._replica_id = replica_id

    async def steps(self, stream_id: str) -> AsyncGenerator[bytes, None]:
        response = self._stream_handle.steps.remote(stream_id, target=self._replica_id)
        try:
            ticket = await anext(response, None)
            if ticket is None:
                raise ReplicaLost("no ticket")
            async with aclosing(received_steps(unpack(ticket, StepTicket))) as steps:
                async for message in steps:
                    yield message
        except _UNREACHABLE as error:
            raise ReplicaLost(type(error).__name__) from error
        finally:
            response.cancel()

    async def submit(self, stream_id: str, submissions: bytes, released: list[str]) -> list[SubmissionStatus]:
        return cast(list[SubmissionStatus], await self._call("submit", stream_id, submissions, released))

    async def abort(self, stream_id: str, generations: list[int], released: list[str]) -> None:
        await self._call("abort", stream_id, generations, released)

    async def _call(self, method: str, stream_id: str, argument: bytes | list[int], released: list[str]) -> Any:
        try:
            return await getattr(self._handle, method).remote(stream_id, argument, released, target=self._replica_id)
        except _UNREACHABLE as error:
            raise ReplicaLost(type(error).__name__) from error


class ServePools:
    """The engine pools of this cluster, by application. A handle is made once and survives the application's deletion
    and redeployment; its router runs from the first call on and tells replica_directory.py of the replicas."""

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment
        self._handles: dict[str, DeploymentHandle[Any]] = {}

    async def existing(self, applications: Iterable[str]) -> frozenset[str]:
        """Those of `applications` that Serve knows, whatever their state.

        `serve.status` would tell it too, but takes 50 ms of this process for a handful of replicas.
        """
        return frozenset([application for application in applications if await self._exists(application)])

    def replica(self, application: str, replica_id: str) -> ServeReplica:
        """`application` must have been found to exist before."""
        return ServeReplica(self._handles[application], replica_id)

    async def _exists(self, application: str) -> bool:
        if application not in self._handles:
            try:
                handle = await asyncio.to_thread(serve.get_deployment_handle, self._deployment, application)
            except (KeyError, RayServeException):
                return False
            self._handles[application] = handle
        try:
            # A call to nobody: the router answers it in this process, unless the pool is empty or gone.
            async with asyncio.timeout(_PROBE_LIMIT_S):
                await self._handles[application].load.remote(target="")
        except DeploymentUnavailableError:
            return False
        except (ReplicaGone, TimeoutError):
            return True
        return True
