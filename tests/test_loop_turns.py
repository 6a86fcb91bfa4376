"""The watchdog of event loops: what it must see, and what it must not."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import pytest

from tests.loop_turns import loop_turns


def _compute(seconds: float) -> None:
    """On this thread, however much of the CPUs others have."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


async def _beats() -> None:
    """Long enough for a beat before, and the one that was late."""
    await asyncio.sleep(0.05)


async def test_a_turn_that_computes_is_seen_with_its_place() -> None:
    with loop_turns() as turns:
        await _beats()
        _compute(0.1)
        await _beats()
    assert 0.08 < turns.longest_s < 0.2
    assert "_compute" in str(turns)


async def test_many_tasks_of_one_turn_are_one_turn() -> None:
    async def little() -> None:
        _compute(0.001)

    with loop_turns() as turns:
        await _beats()
        await asyncio.gather(*(little() for _ in range(100)))
        await _beats()
    assert turns.longest_s > 0.08


async def test_turns_that_leave_each_other_room_are_not_one() -> None:
    with loop_turns() as turns:
        await _beats()
        for _ in range(20):
            _compute(0.01)
            await asyncio.sleep(0.001)
        await _beats()
    assert turns.longest_s < 0.05


async def test_a_thread_that_holds_the_interpreter_holds_the_loop() -> None:
    text = json.dumps(list(range(3_000_000)))
    with loop_turns() as turns:
        await _beats()
        await asyncio.to_thread(json.loads, text)  # in C, to its end
        await _beats()
    assert turns.longest_s > 0.05


@pytest.mark.slow
async def test_other_processes_hold_no_loop() -> None:
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])  # noqa: ASYNC220  # starts at once
        for _ in range(8)
    ]
    try:
        with loop_turns() as turns:
            for _ in range(100):
                _compute(0.005)
                await asyncio.sleep(0.001)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert turns.longest_s < 0.05
