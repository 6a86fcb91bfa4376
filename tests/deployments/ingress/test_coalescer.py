"""Coalescer: one call at a time, each with all that came while the one before was under way."""

from __future__ import annotations

import asyncio

import pytest

from deployments.ingress.coalescer import Coalescer


class Sender:
    """Answers each item with its double, when let."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.let = asyncio.Event()
        self.called = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, items: list[int]) -> list[int]:
        self.calls.append(items)
        self.called.set()
        await self.let.wait()
        if self.error is not None:
            raise self.error
        return [2 * item for item in items]


async def test_a_call_alone_is_made_at_once() -> None:
    sender = Sender()
    sender.let.set()
    coalescer = Coalescer(sender)
    assert await coalescer.call(1) == 2
    assert await coalescer.call(2) == 4
    assert sender.calls == [[1], [2]]


async def test_calls_made_meanwhile_travel_together_and_each_gets_its_answer() -> None:
    sender = Sender()
    coalescer = Coalescer(sender)
    first = asyncio.create_task(coalescer.call(1))
    await sender.called.wait()
    others = [asyncio.create_task(coalescer.call(item)) for item in (2, 3, 4)]
    await asyncio.sleep(0)  # lets them ask
    sender.let.set()
    assert [await call for call in (first, *others)] == [2, 4, 6, 8]
    assert sender.calls == [[1], [2, 3, 4]]


async def test_an_error_reaches_all_that_travelled_and_none_after() -> None:
    sender = Sender()
    sender.error = ValueError("no")
    sender.let.set()
    coalescer = Coalescer(sender)
    results = await asyncio.gather(coalescer.call(1), coalescer.call(2), return_exceptions=True)
    assert [type(result) for result in results] == [ValueError, ValueError]
    sender.error = None
    assert await coalescer.call(3) == 6


async def test_a_caller_that_is_gone_is_not_sent_and_does_not_disturb_the_others() -> None:
    sender = Sender()
    coalescer = Coalescer(sender)
    first = asyncio.create_task(coalescer.call(1))
    await sender.called.wait()
    gone, stays = asyncio.create_task(coalescer.call(2)), asyncio.create_task(coalescer.call(3))
    await asyncio.sleep(0)  # lets them ask
    gone.cancel()
    first.cancel()
    await asyncio.sleep(0)  # lets them go
    sender.let.set()
    assert await stays == 6
    assert sender.calls == [[1], [3]]


async def test_a_wrong_number_of_answers_is_an_error() -> None:
    async def silent(_items: list[int]) -> list[int]:
        return []

    with pytest.raises(RuntimeError, match="0 answers to 1 items"):
        await Coalescer(silent).call(1)
