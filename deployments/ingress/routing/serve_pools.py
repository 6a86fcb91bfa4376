"""Replicas reached through Ray Serve handles: the only module of the ingress that makes Ray calls."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.connections.step_connection import StepLine, step_line
from deployments.connections.ticketed_connection import Ticket
from deployments.contracts import IngressCounters, unpack
from deployments.engine.engine import EngineError
from deployments.engine.replica_directory import ReplicaGone, forget_replicas, replicas_of
from deployments.ingress.routing.replica_stream import ReplicaLost

__all__ = ["ServePeers", "ServePools", "ServeReplica"]

log = structlog.get_logger()

_UNREACHABLE = (RayError, RayServeException, grpc.RpcError, ReplicaGone, EngineError, OSError)
"""What a Serve call raises when the other side is gone, going, or failed: gRPC's errors and those of the called method
come through bare; and a connection."""


_PROBE_LIMIT_S = 0.2
_PROBES_AT_ONCE = 16
"""Each may take all of its time, and the list of models is looked through every second."""
_CLOSE_LIMIT_S = 2.0
_COUNTERS_LIMIT_S = 2.0
_STATUS_PERIOD_S = 5.0
"""How often Serve's status is asked for while pools are empty."""


class ServeReplica:
    """One engine replica, named by its unique id."""

    def __init__(self, handle: DeploymentHandle[Any], replica_id: str) -> None:
        self._handle = handle.options(stream=True)
        self._replica_id = replica_id

    @asynccontextmanager
    async def open(self, stream_id: str) -> AsyncIterator[StepLine]:
        response = self._handle.steps.remote(stream_id, target=self._replica_id)
        try:
            ticket = await anext(response, None)
            if ticket is None:
                raise ReplicaLost("no ticket")
            async with step_line(unpack(ticket, Ticket)) as line:
                yield line
        except _UNREACHABLE as error:
            raise ReplicaLost(type(error).__name__) from error
        finally:
            response.cancel()


class ServePools:
    """The engine pools of this cluster, by application. A handle is made once and survives the application's deletion
    and redeployment, until the model is no longer listed; its router tells replica_directory.py of the replicas."""

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._known: frozenset[str] = frozenset()
        """The applications of Serve when its status was last asked for."""
        self._asked_at = -math.inf
        self._asking = asyncio.Lock()
        self._turns = asyncio.Semaphore(_PROBES_AT_ONCE)

    async def existing(self, applications: Iterable[str]) -> frozenset[str]:
        """Those of `applications` that Serve knows, whatever their state."""
        asked = list(applications)
        found = await asyncio.gather(*map(self._exists_in_turn, asked))
        return frozenset(application for application, exists in zip(asked, found, strict=True) if exists)

    async def forget_others(self, applications: frozenset[str]) -> None:
        """Closes the handles, and with each its router, of all applications but these: nobody has a stream there."""
        for application in self._handles.keys() - applications:
            handle = self._handles.pop(application)
            forget_replicas(application)
            try:
                async with asyncio.timeout(_CLOSE_LIMIT_S):
                    await handle.shutdown_async()
            except (*_UNREACHABLE, TimeoutError) as error:
                log.warning("handle not closed", application=application, reason=repr(error))

    def replica(self, application: str, replica_id: str) -> ServeReplica:
        """`application` must have been found to exist before."""
        return ServeReplica(self._handles[application], replica_id)

    async def _exists_in_turn(self, application: str) -> bool:
        async with self._turns:
            return await self._exists(application)

    async def _exists(self, application: str) -> bool:
        if application not in self._handles:
            try:
                handle = await asyncio.to_thread(serve.get_deployment_handle, self._deployment, application)
            except (KeyError, RayServeException):
                return False
            # The messages are bytes already; Serve's default, cloudpickle, is several times slower on them than pickle.
            # Making options starts the router, which tells replica_directory.py of the replicas. So would a call, but
            # one that waits for a replica is a request to Serve, and starts the first replica of a pool at zero.
            self._handles[application] = handle.options(request_serialization="pickle", response_serialization="pickle")
            self._asked_at = -math.inf
        if not replicas_of(application):
            return await self._in_status(application)
        try:
            # A call to nobody: the router answers it in this process, unless the pool has just become empty or gone.
            async with asyncio.timeout(_PROBE_LIMIT_S):
                await self._handles[application].load.remote(target="")
        except DeploymentUnavailableError:
            return False
        except (ReplicaGone, TimeoutError):
            return True
        return True

    async def _in_status(self, application: str) -> bool:
        """Whether Serve has the application, as its status said lately. Costs 50 ms of this process, and no call to the
        pool, which is empty."""
        async with self._asking:  # the others wait for the answer to one
            now = time.monotonic()
            if now - self._asked_at >= _STATUS_PERIOD_S:
                self._asked_at = now
                self._known = frozenset((await asyncio.to_thread(serve.status)).applications)
            return application in self._known


class ServePeers:
    """All ingress replicas that Serve runs."""

    def __init__(self, deployment: str, application: str) -> None:
        self._names = deployment, application
        self._handle: DeploymentHandle[Any] | None = None

    async def counters(self) -> list[IngressCounters]:
        """Of each that answers. None of them when one hangs: Serve's broadcast answers as a whole."""
        try:
            if self._handle is None:  # not before the first scrape: until then Serve may not know this application
                handle = await asyncio.to_thread(serve.get_deployment_handle, *self._names)
                self._handle = handle.options(request_serialization="pickle", response_serialization="pickle")
            response = self._handle.broadcast("counters")
            answers = await response.results_async(timeout_s=_COUNTERS_LIMIT_S, return_exceptions=True)
        except (*_UNREACHABLE, KeyError, TimeoutError) as error:
            log.warning("counters of the ingress replicas not told", reason=repr(error))
            return []
        return [unpack(answer, IngressCounters) for answer in answers if isinstance(answer, bytes)]
