"""What TargetedRouter relies on in Ray Serve: these tests notice when Ray changes it. They need no cluster."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID

from deployments.engine import replica_directory
from deployments.engine.replica_directory import ReplicaGone, watch_replicas
from deployments.engine.router import TargetedRouter
from tests.conftest import ROOT

APP = "model-test-router"
DEPLOYMENT = DeploymentID(name="Engine", app_name=APP)


class Replica:
    """A replica as Serve shows it to routers. Its queue is never asked for, nor does it matter how full it is."""

    max_ongoing_requests = 0
    multiplexed_model_ids: frozenset[str] = frozenset()

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 1_000_000


class GuardedRouter(TargetedRouter):
    """Breaks off when Serve asks for ever, which would starve the event loop and with it every timeout."""

    asked = 0

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: PendingRequest | None = None
    ) -> list[list[Any]]:
        self.asked += 1
        if self.asked > 100:
            raise AssertionError("Serve asks the router again and again")
        chosen: list[list[Any]] = await super().choose_replicas(candidate_replicas, pending_request)
        return chosen


@pytest.fixture(autouse=True)
def _a_directory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_directory, "_watchers", {})
    monkeypatch.setattr(replica_directory, "_known", {})


def router(*replicas: str) -> Any:
    made = GuardedRouter(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        self_actor_id="test",
        use_replica_queue_len_cache=True,
    )
    made.initialize_state()  # as Serve does before anything else
    made.update_replicas([Replica(name) for name in replicas])
    return made


def call(internal_request_id: str = "call", **keywords: Any) -> PendingRequest:
    metadata = RequestMetadata(request_id="request", internal_request_id=internal_request_id)
    return PendingRequest(args=[], kwargs=keywords, metadata=metadata)


async def routed(router: Any, *calls: PendingRequest) -> list[str]:
    """The replicas that Serve's own routing loop finds for calls that are made at once."""
    async with asyncio.timeout(10):
        replicas = await asyncio.gather(*(router._choose_replica_for_request(each) for each in calls))
    return [replica.replica_id.unique_id for replica in replicas]


async def test_a_call_goes_to_the_replica_it_names_however_busy_that_is() -> None:
    serve_router = router("one", "two", "three")
    for name in ("two", "one", "three", "two"):
        assert await routed(serve_router, call(target=name)) == [name]


async def test_calls_made_at_once_for_one_http_request_each_go_to_their_replica() -> None:
    """They share Serve's internal request id, by which Serve would mix them up."""
    targets = ["two", "one", "two", "three"]
    serve_router = router("one", "two", "three")
    assert await routed(serve_router, *(call("same", target=name) for name in targets)) == targets


async def test_a_call_to_a_replica_that_is_gone_fails_and_the_next_one_finds_another() -> None:
    serve_router = router("one")
    with pytest.raises(ReplicaGone, match="two"):
        await routed(serve_router, call("same", target="two"))
    assert await routed(serve_router, call("same", target="one")) == ["one"]


async def test_a_call_to_a_replica_that_left_fails() -> None:
    serve_router = router("one", "two")
    serve_router.update_replicas([Replica("one")])
    with pytest.raises(ReplicaGone, match="two"):
        await routed(serve_router, call(target="two"))


async def test_a_replica_that_was_not_reached_fails_one_call_instead_of_being_tried_for_ever() -> None:
    serve_router = router("one", "two")
    serve_router.on_replica_actor_unavailable(Replica("one").replica_id)
    assert await routed(serve_router, call(target="two")) == ["two"]
    with pytest.raises(ReplicaGone, match="one"):
        await routed(serve_router, call(target="one"))
    assert await routed(serve_router, call(target="one")) == ["one"]


async def test_a_call_that_names_no_replica_fails() -> None:
    with pytest.raises(ReplicaGone):
        await routed(router("one"), call())


async def test_a_call_is_retried_at_the_replica_it_names() -> None:
    serve_router = router("one", "two")
    request = call(target="two")
    assert await routed(serve_router, request) == ["two"]
    replica = await serve_router._choose_replica_for_request(request, is_retry=True)
    assert replica.replica_id.unique_id == "two"


async def test_calls_that_were_answered_leave_nothing_behind() -> None:
    serve_router = router("one")
    await routed(serve_router, *(call(f"call-{number}", target="one") for number in range(10)))
    with pytest.raises(ReplicaGone):
        await routed(serve_router, call("gone", target="two"))
    await asyncio.gather(*serve_router._routing_tasks)
    assert serve_router._pending_requests_by_id == {}
    assert serve_router.num_pending_requests == 0


async def test_a_cancelled_call_is_left_alone() -> None:
    request = call(target="one")
    request.future.cancel()
    await router("one").choose_replicas([Replica("one")], request)
    assert request.future.cancelled()


async def test_the_directory_learns_every_change_of_the_pool() -> None:
    told: asyncio.Queue[frozenset[str]] = asyncio.Queue()
    watch_replicas(APP, told.put_nowait)
    serve_router = router("one", "two")
    serve_router.update_replicas([Replica("two")])
    async with asyncio.timeout(10):
        assert [await told.get() for _ in range(2)] == [{"one", "two"}, {"two"}]


RECEIVING_PROCESS = """
import asyncio, sys
from ray import cloudpickle
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID

shipped = cloudpickle.loads(sys.stdin.buffer.read())

from deployments.engine import replica_directory
from deployments.engine.router import TargetedRouter

class Replica:
    replica_id = ReplicaID(unique_id="one", deployment_id=DeploymentID(name="Engine", app_name="app"))
    multiplexed_model_ids = ()

async def main():
    print(shipped is TargetedRouter)
    told = asyncio.Queue()
    replica_directory.watch_replicas("app", told.put_nowait)
    router = shipped(
        deployment_id=Replica.replica_id.deployment_id,
        handle_source=DeploymentHandleSource.REPLICA,
        self_actor_id="test",
    )
    router.initialize_state()
    router.update_replicas([Replica()])
    print(sorted(await told.get()))
    request = PendingRequest(args=[], kwargs={"target": "two"}, metadata=RequestMetadata("r", "i"))
    await router.choose_replicas([Replica()], request)
    print(isinstance(request.future.exception(), replica_directory.ReplicaGone))

asyncio.run(main())
"""


def test_the_class_that_serve_ships_by_value_uses_the_directory_of_the_process_it_arrives_in() -> None:
    """A copy of the directory would tell the ingress nothing, and it would not catch a copy of ReplicaGone."""
    shipped = RequestRouterConfig(request_router_class=TargetedRouter).get_serialized_request_router_cls()
    receiver = subprocess.run(
        [sys.executable, "-c", RECEIVING_PROCESS], input=shipped, capture_output=True, cwd=ROOT, timeout=50, check=False
    )
    assert receiver.returncode == 0, receiver.stderr.decode()
    assert receiver.stdout.decode().split("\n")[:3] == ["False", "['one']", "True"]
