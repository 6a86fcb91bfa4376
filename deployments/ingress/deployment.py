"""What Ray Serve runs per ingress replica: puts catalog, meter client and HTTP app together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from deployments.connections._serve_listener import listen_at_node_address
from deployments.contracts import IngressCounters, pack
from deployments.engine.replica_directory import watch_replicas
from deployments.ingress.app import IngressSettings, build_app
from deployments.ingress.inference.write_scheduler import WriteScheduler
from deployments.ingress.meter_client import MeterClient
from deployments.ingress.metrics import ResponseCounts, ingress_counters
from deployments.ingress.routing.catalog import Catalog, CatalogEntry
from deployments.ingress.routing.engine_pool import EnginePool
from deployments.ingress.routing.serve_pools import ServePeers, ServePools
from deployments.logging import configure_logging
from deployments.meter.remote.remote_meter import RemoteMeter
from deployments.scaling.ingress_demand import demand_values

__all__ = ["IngressDeployment"]


@serve.ingress()
class _Ingress:
    def __init__(
        self,
        *meters: DeploymentHandle[Any],
        home: str,
        engine_deployment: str,
        request_body_limit_bytes: int,
        keep_alive_s: float,
        request_timeout_s: float | None,
        admission_timeout_s: float,
        upload_timeout_s: float,
        write_timeout_s: float,
        cors_origins: list[str],
    ) -> None:
        configure_logging()
        listen_at_node_address()
        self._pools = ServePools(engine_deployment)
        context = serve.get_replica_context()
        self._peers = ServePeers(context.deployment, context.app_name)
        self._ingress_id = context.replica_id.unique_id
        self._meters = [self._reach(meter) for meter in meters]
        self._meter = MeterClient(
            self._meters,
            ingress_id=self._ingress_id,
            outbox_folder=Path(home) / "outbox",
            admission_timeout_s=admission_timeout_s,
        )
        self._writes = WriteScheduler()
        self._catalog = Catalog(self._pools.existing, self._open_pool, self._pools.forget_others)
        self._settings = IngressSettings(
            request_body_limit_bytes,
            keep_alive_s,
            request_timeout_s,
            upload_timeout_s=upload_timeout_s,
            write_timeout_s=write_timeout_s,
            cors_origins=tuple(cors_origins),
        )
        self._responses = ResponseCounts()
        self._running = False

    @staticmethod
    def _reach(meter: DeploymentHandle[Any]) -> RemoteMeter:
        return RemoteMeter(meter)

    def __serve_build_asgi_app__(self) -> ASGIApp:  # Serve's hook for apps made per replica
        return build_app(self._catalog, self._meter, self._settings, self._others, responses=self._responses)

    async def counters(self) -> bytes:
        """Packed `IngressCounters`, for the replica that is asked for the metrics of all."""
        return pack(ingress_counters(self._catalog, self._meter, self._responses))

    async def _others(self) -> list[IngressCounters]:
        return [each for each in await self._peers.counters() if each.ingress_id != self._ingress_id]

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this before the first request and on every change of the models."""
        if not self._running:
            self._running = True
            await self._meter.start()
            await self._catalog.start()
        await self._catalog.replace([CatalogEntry.model_validate(entry) for entry in user_config["models"]])

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve calls this about twice a second for deployments/scaling/ingress_policy.py."""
        return demand_values(
            {model.entry.name: model.pool.demand() for model in self._catalog.models()}, self._catalog.loop_lag_s
        )

    async def _open_pool(self, entry: CatalogEntry) -> EnginePool:
        pool = EnginePool(
            entry.name,
            lambda replica_id: self._pools.replica(entry.application, replica_id),
            ingress_id=self._ingress_id,
            limits=entry.limits,
            writes=self._writes,
            checkpoint=self._meter.checkpoint,
        )
        watch_replicas(entry.application, pool.replicas_changed)
        return pool

    async def _close(self) -> None:
        if self._running:
            self._running = False
            await self._catalog.close()
            await self._meter.close()
            for meter in self._meters:
                meter.close()


class IngressDeployment(_Ingress):
    """One HTTP front end. `user_config` carries the catalog, so that models come and go without a restart."""

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve calls this when it stops the replica and awaits what it returns. Not `async def`, as what `ingress`
        puts there: the garbage collector calls it too, and would leave a coroutine that nobody awaits."""
        made = self.__dict__.pop("_settings", None) is not None  # missing when __init__ failed
        return self._shut_down(super().__del__) if made else None  # type: ignore[misc]

    async def _shut_down(self, end_app: Callable[[], Awaitable[None]]) -> None:
        """`end_app` is Serve's own, of the ASGI app."""
        await end_app()
        await self._close()
