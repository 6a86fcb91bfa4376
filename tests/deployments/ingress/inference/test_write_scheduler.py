"""Rounds of writes: at once for few streams, together for many."""

from __future__ import annotations

import asyncio

from deployments.ingress.inference.write_scheduler import WriteScheduler
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet


class Streams:
    """Join a round when they are told to; each write takes `write_s` on their clock."""

    def __init__(self, write_s: float) -> None:
        self._write_s = write_s
        self._busy_s = 0.0
        self.rounds = WriteScheduler(self.now)
        self.written: list[tuple[float, str]] = []

    def now(self) -> float:
        return asyncio.get_running_loop().time() + self._busy_s

    def join(self, name: str) -> None:
        event = asyncio.Event()

        async def write() -> None:
            await event.wait()
            self.written.append((self.now(), name))
            self._busy_s += self._write_s

        self._task = asyncio.create_task(write())  # each test waits for all of them
        self.rounds.join(event.set)


@in_virtual_time
async def test_few_streams_are_written_at_once() -> None:
    streams = Streams(write_s=0.0001)
    for step in range(5):
        for name in "abc":
            streams.join(f"{name}{step}")
        await quiet()
        assert len(streams.written) == 3 * (step + 1)


@in_virtual_time
async def test_all_that_join_while_a_round_rests_are_written_together() -> None:
    streams = Streams(write_s=0.001)
    for number in range(8):
        streams.join(f"first {number}")
    await quiet()
    assert len(streams.written) == 8  # which took 8 ms
    streams.join("second")
    await asyncio.sleep(0.004)
    streams.join("third")
    assert len(streams.written) == 8
    await asyncio.sleep(0.0041)
    assert [name for _, name in streams.written[8:]] == ["second", "third"]


@in_virtual_time
async def test_a_rest_has_a_bound_and_ends_by_itself() -> None:
    streams = Streams(write_s=0.01)
    for number in range(100):
        streams.join(str(number))
    await quiet()
    streams.join("next")
    await asyncio.sleep(0.0101)
    assert streams.written[-1][1] == "next"


@in_virtual_time
async def test_after_a_pause_nothing_waits() -> None:
    streams = Streams(write_s=0.001)
    for number in range(8):
        streams.join(str(number))
    await asyncio.sleep(1.0)
    streams.join("next")
    await quiet()
    assert streams.written[-1][1] == "next"
