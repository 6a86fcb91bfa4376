"""What Ray Serve runs per engine replica: builds the engine from its settings and carries bytes in and out.

Every call names its replica by the keyword `target`, which TargetedRouter (router.py) reads in the calling process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import structlog
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from deployments.connections._serve_listener import listen_at_node_address
from deployments.connections.step_connection import StepServer
from deployments.contracts import Settlement, pack
from deployments.engine.engine import Engine
from deployments.engine.model_source import prepare_model
from deployments.engine.orphans import OrphanedRequests
from deployments.engine.replica import EngineReplica
from deployments.engine.settings import ReplicaSettings, SimulatedEngineSettings
from deployments.engine.simulated_engine import SimulatedEngine, vocabulary_of
from deployments.engine.simulator import SimulatorSettings
from deployments.engine.vllm_engine import VllmEngine
from deployments.logging import configure_logging, log_targets_kept
from deployments.meter.remote.meter_transport import MeterUnreachable
from deployments.meter.remote.remote_meter import RemoteMeter
from deployments.meter.remote.shards import GATEWAY, meter_names
from deployments.settlement.outbox import SettlementOutbox

__all__ = ["EngineDeployment", "build_engine"]

log = structlog.get_logger()


def build_engine(settings: ReplicaSettings, folder: Path) -> Engine:
    """The engine that is asked for, not yet started, on the prepared model in `folder`."""
    engine = settings.engine
    if isinstance(engine, SimulatedEngineSettings):
        first_token, vocabulary_tokens = vocabulary_of(folder)
        return SimulatedEngine(
            SimulatorSettings(
                vocabulary_tokens=vocabulary_tokens,
                first_token=first_token,
                **engine.model_dump(exclude={"kind", "max_model_len", "start_up_s"}),
            ),
            max_waiting=settings.max_waiting,
            start_up_s=engine.start_up_s,
        )
    return VllmEngine(
        engine,
        folder,
        served_model_name=settings.name,
        max_waiting=settings.max_waiting,
        stall_timeout_s=settings.stall_timeout_s,
    )


def _find_meter(name: str) -> DeploymentHandle[Any]:
    """The meter of that name, or the first if there is none any more. Raises MeterUnreachable when there is no
    gateway."""
    for each in (name, *meter_names(1)):
        try:
            return serve.get_deployment_handle(each, GATEWAY)
        except (KeyError, RayServeException):
            log.warning("no such meter", meter=each)
    raise MeterUnreachable(name)


class EngineDeployment:
    """One replica of a model's engine pool."""

    async def __init__(self, settings: dict[str, object], home: str) -> None:  # type: ignore[misc]  # Serve awaits it
        configure_logging()
        listen_at_node_address()
        began = time.monotonic()
        asked = ReplicaSettings.model_validate(settings)
        folder = await asyncio.to_thread(prepare_model, asked.source, Path(home), report=log.info)
        engine = build_engine(asked, folder)
        with log_targets_kept():
            await engine.start()
        self._meters: dict[str, RemoteMeter] = {}
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._outbox = SettlementOutbox(Path(home) / "outbox", replica_id, self._settle)
        await self._outbox.start()
        start_up_s = time.monotonic() - began
        self._replica = EngineReplica(engine, OrphanedRequests(self._outbox), start_up_s=start_up_s)
        self._step_server = StepServer(self._replica.steps, self._replica.take_commands)
        await self._step_server.start(get_node_ip_address())

    async def _settle(self, meter: str, settlements: list[Settlement]) -> None:
        if meter not in self._meters:
            self._meters[meter] = RemoteMeter(await asyncio.to_thread(_find_meter, meter))
        try:
            await self._meters[meter].settle(pack(settlements))
        except MeterUnreachable:
            if (unreachable := self._meters.pop(meter, None)) is not None:  # looked up again: there may be fewer now
                unreachable.close()
            raise

    async def steps(self, stream_id: str, *, target: str) -> AsyncGenerator[bytes, None]:
        """Yields a packed `Ticket`, and lasts as long as the stream that it leads to: Serve does not stop a replica
        that has calls under way."""
        async with aclosing(self._step_server.line(stream_id)) as tickets:
            async for ticket in tickets:
                yield pack(ticket)

    async def load(self, *, target: str) -> bytes:
        """Packed `EngineLoad`."""
        return pack(self._replica.load())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve calls this about twice a second for deployments/scaling/engine_policy.py."""
        return self._replica.signals()._asdict()

    async def check_health(self) -> None:
        await self._replica.check_health()

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve calls this when it stops the replica and awaits what it returns. Not `async def`: the garbage
        collector calls it too, and would leave a coroutine that nobody awaits."""
        replica: EngineReplica | None = self.__dict__.pop("_replica", None)  # None when __init__ failed
        return None if replica is None else self._shut_down(replica)

    async def _shut_down(self, replica: EngineReplica) -> None:
        self._step_server.close()
        await replica.shutdown()
        await self._outbox.close()
        for meter in self._meters.values():
            meter.close()
