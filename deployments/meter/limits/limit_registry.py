"""The limits that one meter decides on: a LimitState per key and per team, and what each used before this process.

The ledger is asked once per owner, day and month. While it is, nothing is recorded, and it is not asked while something
is: else nobody could tell whether its answer includes that.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, Protocol

from deployments.contracts import Limits
from deployments.meter.errors import LedgerUnavailable, MeterClosed
from deployments.meter.ledger.periods import period_at
from deployments.meter.ledger.usage import Used
from deployments.meter.limits.limits import LimitState
from deployments.meter.limits.quotas import Quota

__all__ = ["LimitRegistry", "UsageSource"]

_READ_LIMIT_S: Final = 2.0
"""For all that is read at a time: nothing is recorded meanwhile."""
_AT_A_TIME: Final = 8
"""Owners whose quotas are read side by side, so that a slow one does not hold up the others."""

_Wanted = dict[tuple[str, str | None], asyncio.Future[None]]
"""Keys with their teams, and who is told once they are loaded."""


class UsageSource(Protocol):
    """The ledger, as far as it is needed here."""

    async def used_since(self, since: float, *, key_id: str | None = None, team: str | None = None) -> Used: ...


class LimitRegistry:
    """For use on one event loop. `clock` gives Unix time in seconds."""

    def __init__(self, ledger: UsageSource, clock: Callable[[], float]) -> None:
        self._ledger = ledger
        self._clock = clock
        self._keys: dict[str, LimitState] = {}
        self._teams: dict[str, LimitState] = {}
        self._gate = asyncio.Lock()
        """First come, first served: neither recording nor loading can starve the other."""
        self._recording = 0
        self._recorded = asyncio.Event()
        self._wanted: _Wanted = {}
        self._next_loader: asyncio.Task[None] | None = None
        self._loaders: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._keys) + len(self._teams)

    def states(self, key_id: str, team: str | None) -> tuple[LimitState, ...]:
        """Of a key and, if it has one, of its team; made if missing. Not to be kept over an `await`."""
        if (key := self._keys.get(key_id)) is None:
            key = self._keys[key_id] = LimitState("this key", Limits())
        if team is None:
            return (key,)
        if (of_team := self._teams.get(team)) is None:
            of_team = self._teams[team] = LimitState(f"the team {team}", Limits())
        return key, of_team

    def recount(self, key_id: str, team: str | None) -> None:
        """The ledger has changed in a way that is not known here."""
        for state in self.states(key_id, team):
            state.recount()

    def forget_idle(self, now: float) -> None:
        """Drop what the ledger knows as well."""
        self._keys = {key_id: state for key_id, state in self._keys.items() if not state.is_idle(now)}
        self._teams = {team: state for team, state in self._teams.items() if not state.is_idle(now)}

    # --- what was used before ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def recording(self) -> AsyncIterator[None]:
        """While something is recorded in the ledger and then counted here."""
        async with self._gate:
            self._recording += 1
        try:
            yield
        finally:
            self._recording -= 1
            if not self._recording:
                self._recorded.set()

    async def load(self, key_id: str, team: str | None) -> None:
        """Ask the ledger for the quotas that are limited and not known. Raises LedgerUnavailable, MeterClosed."""
        if self._next_loader is None:
            self._wanted = {}
            self._next_loader = asyncio.create_task(self._load_all(self._wanted), name="quota-loader")
            self._loaders.add(self._next_loader)
            self._next_loader.add_done_callback(partial(self._loader_ended, self._wanted))
        if (told := self._wanted.get((key_id, team))) is None:
            told = self._wanted[key_id, team] = asyncio.get_running_loop().create_future()
        await asyncio.shield(told)

    async def _load_all(self, wanted: _Wanted) -> None:
        async with self._gate:
            while self._recording:
                self._recorded.clear()
                await self._recorded.wait()
            self._next_loader = None  # who asks from here on is not among these
            deadline = asyncio.get_running_loop().time() + _READ_LIMIT_S  # for all: recording waits for them
            at_a_time = asyncio.Semaphore(_AT_A_TIME)
            of_team: defaultdict[str | None, asyncio.Lock] = defaultdict(asyncio.Lock)
            await asyncio.gather(
                *(
                    self._tell(told, self._load(key_id, team, at_a_time, of_team[team]), deadline)
                    for (key_id, team), told in wanted.items()
                )
            )

    async def _tell(self, told: asyncio.Future[None], loading: Awaitable[None], deadline: float) -> None:
        """One owner's failure is nobody else's."""
        try:
            async with asyncio.timeout_at(deadline):
                await loading
        except Exception as error:
            why = error.reason if isinstance(error, LedgerUnavailable) else repr(error)
            told.set_exception(LedgerUnavailable(f"usage not known: {why}"))
            told.exception()  # is for those who wait; none may be left, and then nobody else retrieves it
        else:
            told.set_result(None)

    def _loader_ended(self, wanted: _Wanted, loader: asyncio.Task[None]) -> None:
        self._loaders.discard(loader)
        if self._next_loader is loader:
            self._next_loader = None
        for told in wanted.values():
            if not told.done():
                told.set_exception(MeterClosed("the meter is closed"))
                told.exception()  # likewise
        if not loader.cancelled():
            loader.exception()  # `_tell` has told it

    async def _load(self, key_id: str, team: str | None, at_a_time: asyncio.Semaphore, of_team: asyncio.Lock) -> None:
        async with at_a_time:
            now = self._clock()
            key, *states = self.states(key_id, team)
            for quota in key.unloaded(now):
                await self._fill(quota, now, key_id=key_id)
            async with of_team:  # which another of its keys may load just now
                for quota in (quota for state in states for quota in state.unloaded(now)):
                    await self._fill(quota, now, team=team)

    async def _fill(self, quota: Quota, now: float, *, key_id: str | None = None, team: str | None = None) -> None:
        period = period_at(quota.name, now)
        used = await self._ledger.used_since(period.begins_at, key_id=key_id, team=team)
        quota.load(period, used.tokens, used.cost)

    async def close(self) -> None:
        """Those who wait get MeterClosed. Safe twice."""
        for loader in self._loaders:
            loader.cancel()
        if self._loaders:
            await asyncio.wait(self._loaders)
