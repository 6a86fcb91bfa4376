"""What the router tells about replicas reaches the watcher, on the watcher's own event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from deployments.engine import replica_directory
from deployments.engine.replica_directory import replicas_changed, watch_replicas

APP = "model-test-replica-directory"
ONE, TWO = frozenset({"one"}), frozenset({"one", "two"})


@pytest.fixture(autouse=True)
def _a_directory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_directory, "_watchers", {})
    monkeypatch.setattr(replica_directory, "_known", {})


async def heard(told: asyncio.Queue[frozenset[str]]) -> frozenset[str]:
    async with asyncio.timeout(10):
        return await told.get()


async def test_a_watcher_hears_every_change_in_order() -> None:
    told: asyncio.Queue[frozenset[str]] = asyncio.Queue()
    watch_replicas(APP, told.put_nowait)
    for replicas in (ONE, TWO, frozenset[str]()):
        replicas_changed(APP, replicas)
    assert [await heard(told) for _ in range(3)] == [ONE, TWO, frozenset()]


async def test_a_watcher_hears_at_once_what_is_known_already() -> None:
    replicas_changed(APP, TWO)
    told: list[frozenset[str]] = []
    watch_replicas(APP, told.append)
    assert told == [TWO]


async def test_a_change_told_on_another_thread_arrives_on_the_watchers_loop() -> None:
    arrived: asyncio.Queue[tuple[frozenset[str], threading.Thread]] = asyncio.Queue()
    watch_replicas(APP, lambda replicas: arrived.put_nowait((replicas, threading.current_thread())))
    await asyncio.to_thread(replicas_changed, APP, ONE)
    async with asyncio.timeout(10):
        assert await arrived.get() == (ONE, threading.current_thread())


async def test_a_watcher_hears_of_its_own_application_only() -> None:
    told: asyncio.Queue[frozenset[str]] = asyncio.Queue()
    watch_replicas(APP, told.put_nowait)
    replicas_changed(f"{APP}-other", TWO)
    replicas_changed(APP, ONE)
    assert await heard(told) == ONE


async def test_a_new_watcher_takes_the_place_of_the_one_before() -> None:
    before: list[frozenset[str]] = []
    told: asyncio.Queue[frozenset[str]] = asyncio.Queue()
    watch_replicas(APP, before.append)
    watch_replicas(APP, told.put_nowait)
    replicas_changed(APP, ONE)
    assert await heard(told) == ONE
    assert before == []
