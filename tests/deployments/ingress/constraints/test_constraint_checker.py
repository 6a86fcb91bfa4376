"""The processes that check constraints: what they cost, what ends them, and whose turn it is."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deployments.contracts import Constraint, ConstraintCheck, ConstraintKind, Output, OutputCheck
from deployments.ingress.constraints import checker as constraint_checker
from deployments.ingress.constraints.checker import ConstraintChecker
from deployments.ingress.errors import Overloaded, ServiceUnavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

COSTLY = {"properties": {f"p{number}": {"type": "string"} for number in range(2000)}}


@pytest.fixture
async def checker() -> AsyncIterator[ConstraintChecker]:
    checker = ConstraintChecker()
    yield checker
    await checker.close()
    assert not workers()


def workers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "deployments.ingress.constraints.worker" in child.cmdline()
    ]


def check(folder: Path, kind: ConstraintKind, value: Any) -> ConstraintCheck:
    return ConstraintCheck(str(folder), Constraint(kind, value if isinstance(value, str) else json.dumps(value)))


async def test_a_constraint_is_checked_and_its_outputs_too(checker: ConstraintChecker, smollm2: Path) -> None:
    assert not workers()  # until they are needed
    checked = await checker.check("key", check(smollm2, "choice", ["a", "b"]))
    assert checked.grammar
    outputs = [Output([81], True), Output([], False), Output([], True), Output([81, 81], False)]
    conforming = await checker.conforming("key", OutputCheck(str(smollm2), checked.grammar, outputs))
    assert conforming == [True, True, False, False]


@pytest.mark.parametrize(
    ("kind", "value", "bound"),
    [("json", COSTLY, "0.15 s"), ("grammar", "start: " + "(" * 60_000 + '"a"' + ")" * 60_000, "512 MiB")],
    ids=["time", "depth"],
)
async def test_what_takes_too_much_is_refused_and_names_the_bound(
    checker: ConstraintChecker, smollm2: Path, kind: ConstraintKind, value: Any, bound: str
) -> None:
    checked = await checker.check("key", check(smollm2, kind, value))
    assert not checked.grammar
    assert bound in checked.message or "deep" in checked.message
    [worker] = workers()  # the same goes on
    assert (await checker.check("key", check(smollm2, "regex", "a"))).grammar
    assert workers() == [worker]


async def test_the_event_loop_is_free_meanwhile(checker: ConstraintChecker, smollm2: Path) -> None:
    await checker.check("key", check(smollm2, "regex", "a"))
    asked = asyncio.create_task(checker.check("key", check(smollm2, "json", COSTLY)))
    used = time.thread_time()
    await asked
    assert time.thread_time() - used < 0.05


async def test_what_was_checked_is_remembered(checker: ConstraintChecker, smollm2: Path) -> None:
    for value in ({"const": 1}, COSTLY):
        first = await checker.check("key", check(smollm2, "json", value))
        for worker in workers():
            worker.suspend()
        try:
            assert await checker.check("another", check(smollm2, "json", value)) is first
        finally:
            for worker in workers():
                worker.resume()


async def test_one_owners_checks_do_not_hold_up_anothers(checker: ConstraintChecker, smollm2: Path) -> None:
    async def warm(owner: str) -> None:
        await checker.check(owner, check(smollm2, "regex", owner))

    await asyncio.gather(warm("one"), warm("two"))
    ended: list[str] = []

    async def ask(owner: str, kind: ConstraintKind, value: Any) -> None:
        await checker.check(owner, check(smollm2, kind, value))
        ended.append(owner)

    many = [ask("evil", "json", {**COSTLY, "description": "x", f"x-{number}": 1}) for number in range(8)]
    await asyncio.gather(*many, ask("good", "regex", "b"))
    assert ended.index("good") <= 2


async def test_waiting_checks_are_bounded_per_owner(checker: ConstraintChecker, smollm2: Path) -> None:
    asked = [asyncio.create_task(checker.check("key", check(smollm2, "regex", f"a{{{n}}}"))) for n in range(70)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert any(isinstance(answer, Overloaded) for answer in answers)
    assert sum(not isinstance(answer, BaseException) for answer in answers) >= 64


async def test_a_worker_that_was_killed_is_replaced(checker: ConstraintChecker, smollm2: Path) -> None:
    await checker.check("key", check(smollm2, "regex", "a"))
    [worker] = workers()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ServiceUnavailable):
        await checker.check("key", check(smollm2, "regex", "b"))
    assert (await checker.check("key", check(smollm2, "regex", "b"))).grammar


async def test_a_worker_that_hangs_is_replaced(
    checker: ConstraintChecker, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await checker.check("key", check(smollm2, "regex", "a"))
    monkeypatch.setattr(constraint_checker, "_START_LIMIT_S", 0.2)
    [worker] = workers()
    worker.suspend()
    with pytest.raises(ServiceUnavailable):
        await checker.check("key", check(smollm2, "regex", "b"))
    monkeypatch.undo()
    assert (await checker.check("key", check(smollm2, "regex", "b"))).grammar


async def test_a_check_that_fails_in_a_way_that_nobody_foresaw_is_answered_at_once(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*_: object) -> None:
        raise OSError("no process can be started")

    monkeypatch.setattr(constraint_checker, "_answered", failing)
    async with asyncio.timeout(5.0):
        with pytest.raises(ServiceUnavailable):
            await ConstraintChecker().check("key", check(smollm2, "regex", "a"))


async def test_closing_gives_up_what_waits(smollm2: Path) -> None:
    checker = ConstraintChecker()
    asked = [asyncio.create_task(checker.check("key", check(smollm2, "regex", "a" * n))) for n in (1, 2, 3)]
    await asyncio.sleep(0)
    await checker.close()
    await checker.close()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(answer, ServiceUnavailable) for answer in answers)
    assert not workers()
