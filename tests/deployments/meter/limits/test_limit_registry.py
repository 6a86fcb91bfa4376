from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from deployments.contracts import Limits
from deployments.meter.errors import LedgerUnavailable, MeterClosed
from deployments.meter.ledger.usage import Used
from deployments.meter.limits import limit_registry
from deployments.meter.limits.limit_registry import LimitRegistry
from deployments.meter.limits.limits import LimitDemand, check
from tests.deployments.meter.running_meter import Clock

LIMITS = Limits(tokens_per_day=100, money_per_month=5.0)


class MemoryLedger:
    """Answers when it is allowed to, with what it has by then."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.used = Used(0, 0.0)
        self.error: Exception | None = None
        self.answering = asyncio.Event()
        self.answering.set()
        self.never: str | None = None
        """An owner about whom it never answers."""

    async def used_since(self, since: float, *, key_id: str | None = None, team: str | None = None) -> Used:
        self.asked.append(f"{key_id or team} since {since:.0f}")
        await self.answering.wait()
        if self.never == (key_id or team):
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return self.used


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger()


@pytest.fixture
def clock() -> Clock:
    return Clock(1_709_121_600.0)  # noon of 2024-02-28


@pytest.fixture
async def book(ledger: MemoryLedger, clock: Clock) -> AsyncIterator[LimitRegistry]:
    book = LimitRegistry(ledger, clock)
    for state in book.states("key-1", "mill"):
        state.limits = LIMITS
    yield book
    await book.close()


async def settle_down() -> None:
    """Lets every task go as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_each_owner_is_asked_for_once_a_day_and_a_month(
    book: LimitRegistry, ledger: MemoryLedger, clock: Clock
) -> None:
    await asyncio.gather(*(book.load("key-1", "mill") for _ in range(5)))
    days = [f"{owner} since {begin}" for owner in ("key-1", "mill") for begin in (1_709_078_400, 1_706_745_600)]
    assert ledger.asked == days
    assert not any(state.unloaded(clock.now) for state in book.states("key-1", "mill"))
    ledger.asked.clear()
    clock.now += 86_400.0
    await book.load("key-1", "mill")
    assert ledger.asked == ["key-1 since 1709164800", "mill since 1709164800"]


async def test_nothing_is_loaded_while_something_is_recorded(book: LimitRegistry, ledger: MemoryLedger) -> None:
    async with book.recording():
        loading = asyncio.create_task(book.load("key-1", "mill"))
        await settle_down()
        assert ledger.asked == []
        ledger.used = Used(100, 0.0)
    await loading
    [key] = book.states("key-1", None)
    assert check([key], 1_709_121_600.0, LimitDemand(1, 0.0)) is not None


async def test_nothing_is_recorded_while_something_is_loaded(
    book: LimitRegistry, ledger: MemoryLedger, clock: Clock
) -> None:
    ledger.answering.clear()
    loading = asyncio.create_task(book.load("key-1", "mill"))
    await settle_down()

    async def record() -> bool:
        async with book.recording():
            return not any(state.unloaded(clock.now) for state in book.states("key-1", "mill"))

    recording = asyncio.create_task(record())
    await settle_down()
    assert not recording.done()
    ledger.answering.set()
    assert await recording
    await loading


async def test_who_asks_while_others_are_loaded_does_not_hold_them_up(
    book: LimitRegistry, ledger: MemoryLedger
) -> None:
    ledger.answering.clear()
    first = asyncio.create_task(book.load("key-1", None))
    await settle_down()
    ledger.never = "key-2"
    [other] = book.states("key-2", None)
    other.limits = LIMITS
    second = asyncio.create_task(book.load("key-2", None))
    await settle_down()
    ledger.answering.set()
    await first
    assert not second.done()
    await book.close()
    with pytest.raises(MeterClosed):
        await second


async def test_an_owner_whose_usage_is_not_told_is_nobody_elses_failure(
    book: LimitRegistry, ledger: MemoryLedger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_registry, "_READ_LIMIT_S", 0.05)
    keys = [f"key-{number}" for number in range(30)]
    for key_id in keys:
        book.states(key_id, None)[0].limits = LIMITS
    ledger.never = "key-3"
    outcomes = await asyncio.gather(*(book.load(key_id, None) for key_id in keys), return_exceptions=True)
    assert [number for number, outcome in enumerate(outcomes) if outcome is not None] == [3]
    assert isinstance(outcomes[3], LedgerUnavailable)
    loaded = [not book.states(key_id, None)[0].unloaded(clock.now) for key_id in keys]
    assert loaded == [number != 3 for number in range(30)]


async def test_keys_of_one_team_share_the_reading_of_its_usage(book: LimitRegistry, ledger: MemoryLedger) -> None:
    for key_id in ("key-1", "key-2"):
        for state in book.states(key_id, "mill"):
            state.limits = LIMITS
    await asyncio.gather(*(book.load(key_id, "mill") for key_id in ("key-1", "key-2")))
    assert sorted(asked.split()[0] for asked in ledger.asked) == ["key-1"] * 2 + ["key-2"] * 2 + ["mill"] * 2


async def test_a_failure_is_told_to_all_who_wait_and_not_kept(book: LimitRegistry, ledger: MemoryLedger) -> None:
    ledger.error = LedgerUnavailable("away")
    outcomes = await asyncio.gather(*(book.load("key-1", "mill") for _ in range(3)), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["ledger unavailable: usage not known: away"] * 3
    ledger.error = None
    await book.load("key-1", "mill")
    async with book.recording():
        pass


async def test_a_ledger_that_hangs_holds_up_recording_for_a_bounded_time(
    book: LimitRegistry, ledger: MemoryLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_registry, "_READ_LIMIT_S", 0.01)
    ledger.answering.clear()
    with pytest.raises(LedgerUnavailable):
        await book.load("key-1", "mill")
    async with book.recording():
        pass


async def test_a_caller_that_gives_up_does_not_disturb_the_others(book: LimitRegistry, ledger: MemoryLedger) -> None:
    ledger.answering.clear()
    impatient, patient = (asyncio.create_task(book.load("key-1", "mill")) for _ in range(2))
    await settle_down()
    impatient.cancel()
    ledger.answering.set()
    await patient
    assert impatient.cancelled()


async def test_closing_ends_those_who_wait(book: LimitRegistry, ledger: MemoryLedger) -> None:
    ledger.answering.clear()
    waiting = asyncio.create_task(book.load("key-1", "mill"))
    await settle_down()
    await book.close()
    with pytest.raises(MeterClosed):
        await waiting


async def test_only_what_counts_is_kept(book: LimitRegistry, clock: Clock) -> None:
    key, team = book.states("key-1", "mill")
    hold = key.take(clock.now, LimitDemand(5, 0.0))
    book.forget_idle(clock.now)
    assert len(book) == 1
    assert book.states("key-1", "mill")[0] is key
    assert book.states("key-1", "mill")[1] is not team
    hold.close(LimitDemand(5, 0.0), clock.now)
    book.forget_idle(clock.now + 60.0)
    assert len(book) == 0
