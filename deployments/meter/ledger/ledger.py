"""The ledger: one row per request, durable before anyone is told so.

All writing goes through one thread, one transaction at a time (group commit): what arrives while a transaction runs
waits and becomes the next one. So a loaded ledger pays for few large transactions, an idle one for a small one at once,
and no timer is involved. Reading has a thread of its own, so that a slow commit does not look like an outage.

When the database fails, settlements go to the spool instead (deployments/meter/ledger/spool.py), which is as durable,
until a background task finds that the database is back and has moved there what was spooled.

Which row a settlement becomes is the matter of deployments/meter/ledger/rows.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Final, NamedTuple, TypeVar

import sqlalchemy as sa
import structlog

from deployments.contracts import Settlement, UsageQuery, UsageRow
from deployments.meter.errors import LedgerBusy, LedgerUnavailable, MeterClosed, MeterError
from deployments.meter.ledger.database import is_unstorable, open_database, reason
from deployments.meter.ledger.migrations import SchemaTooNew, migrate
from deployments.meter.ledger.rows import RowChange, known_ids, write_settlements
from deployments.meter.ledger.schema import REQUESTS
from deployments.meter.ledger.spool import Spool
from deployments.meter.ledger.usage import Used, read_usage, used_since
from deployments.meter.worker_threads import WorkerThreads

__all__ = ["Ledger"]

T = TypeVar("T")

log = structlog.get_logger()

_RETRY_FIRST_S: Final = 0.2
_RETRY_MAX_S: Final = 2.0


class _Waiter(NamedTuple):
    settlements: list[Settlement]
    durable: asyncio.Future[None]


class Ledger:
    """Records settlements in a SQLite or PostgreSQL database. For use on one event loop.

    The database is migrated when it is first needed, so that one that is down at the start is an error of the calls
    that need it and not of the meter.
    """

    def __init__(
        self,
        database_url: str,
        spool: Spool,
        *,
        on_committed: Callable[[list[RowChange]], None] | None = None,
        max_queued: int = 10_000,
        attempt_limit_s: float = 10.0,
    ) -> None:
        """Owns `spool` from now on. `on_committed` is called on the event loop after each transaction that changed
        something, before `record` returns. `max_queued` bounds the settlements that wait or are being written,
        `attempt_limit_s` what one transaction may take before the database counts as away.

        Raises sqlalchemy.exc.ArgumentError for a malformed URL, ValueError for one of another database or of SQLite in
        memory. Does not connect.
        """
        self._engine = open_database(database_url)
        self._spool = spool
        self._on_committed = on_committed
        self._max_queued = max_queued
        self._attempt_limit_s = attempt_limit_s
        self._migrated = False
        self._writes = WorkerThreads("ledger writer", threads=1, max_waiting=2)
        self._reads = WorkerThreads("ledger reader", threads=1, max_waiting=64)
        self._quota_reads = WorkerThreads("quota reader", threads=2, max_waiting=64)
        """Apart: admissions wait for them, and somebody's report of usage may take long."""
        self._spooling = WorkerThreads("ledger spool", threads=1, max_waiting=2)
        self._queued = 0
        self._waiting: list[_Waiter] = []
        self._writer: asyncio.Task[None] | None = None
        self._drainer: asyncio.Task[None] | None = None
        self._away = False
        self._closed = False

    async def start(self) -> None:
        """Begins to move what an earlier process has spooled into the database."""
        if self._spool.spooled:
            self._start_draining()

    # --- writing ----------------------------------------------------------------------------------------------------

    async def record(self, settlements: list[Settlement]) -> None:
        """Returns once all of them are on disk, in the database or in the spool; one that adds nothing to what is known
        of its request changes nothing.

        Raises LedgerBusy when they do not fit into the queue (a list larger than the whole queue is taken when it is
        empty), MeterClosed after `close`, LedgerUnavailable when the database is away and the spool is full or fails. A
        caller that is cancelled cannot tell whether they were written: sending them again is always safe.
        """
        if self._closed:
            raise MeterClosed("the ledger is closed")
        if not settlements:
            return
        if self._queued and self._queued + len(settlements) > self._max_queued:
            raise LedgerBusy("settlements that wait for the ledger", self._max_queued)
        self._queued += len(settlements)
        waiter = _Waiter(settlements, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_groups(), name="ledger-writer")
        await waiter.durable

    async def _write_groups(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            await self._write_group(group)

    async def _write_group(self, group: list[_Waiter]) -> None:
        settlements = [settlement for waiter in group for settlement in waiter.settlements]
        try:
            if not await self._is_committed(settlements):
                await self._spooling.run(partial(self._spool.append, settlements))
        except Exception as error:
            log.error("ledger unavailable", settlements=len(settlements), reason=_why(error))
            self._fail(group, partial(LedgerUnavailable, _why(error)), error)
        except asyncio.CancelledError as error:
            self._fail(group, partial(MeterClosed, "closed before the commit was confirmed"), error)
            raise
        else:
            self._queued -= len(settlements)
            for waiter in group:
                if not waiter.durable.cancelled():
                    waiter.durable.set_result(None)

    def _fail(self, waiters: list[_Waiter], failure: Callable[[], MeterError], cause: BaseException | None) -> None:
        """Gives each waiter an exception of its own: a shared one would gather all their tracebacks."""
        for waiter in waiters:
            self._queued -= len(waiter.settlements)
            if not waiter.durable.cancelled():
                exception = failure()
                exception.__cause__ = cause
                waiter.durable.set_exception(exception)

    async def _is_committed(self, settlements: list[Settlement]) -> bool:
        """Whether the database has taken them; not even asked while it is known to be away."""
        if self._away:
            return False
        try:
            await self._commit(settlements)
        except LedgerUnavailable as error:
            log.error("database away, spooling", reason=error.reason)
            self._away = True
            self._start_draining()
            return False
        return True

    async def _commit(self, settlements: list[Settlement]) -> None:
        """One attempt. Raises LedgerUnavailable; then they may be committed nonetheless, even later."""
        write = partial(self._write, settlements, asyncio.get_running_loop())
        try:
            async with asyncio.timeout(self._attempt_limit_s):
                await self._writes.run(write)
        except TimeoutError as error:
            raise LedgerUnavailable(f"no commit within {self._attempt_limit_s:g} s") from error
        except Exception as error:
            raise LedgerUnavailable(_why(error)) from error

    def _write(self, settlements: list[Settlement], loop: asyncio.AbstractEventLoop) -> None:
        """In the writer thread. What no database can store is found by halves, and rejected."""
        try:
            self._ensure_migrated()
            changes = write_settlements(self._engine, settlements)
        except Exception as error:
            if not is_unstorable(error) or not settlements:
                self._migrated = False  # what comes back may be a backup
                raise
            if len(settlements) == 1:
                self._spool.reject(settlements[0], reason(error))
                return
            middle = len(settlements) // 2
            self._write(settlements[:middle], loop)
            self._write(settlements[middle:], loop)
        else:
            if changes and self._on_committed is not None:
                with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                    loop.call_soon_threadsafe(self._on_committed, changes)

    # --- the spool --------------------------------------------------------------------------------------------------

    def _start_draining(self) -> None:
        if self._drainer is None or self._drainer.done():
            self._drainer = asyncio.create_task(self._drain(), name="ledger-drainer")

    async def _drain(self) -> None:
        """Until the database is back and has all that was spooled. An empty batch asks whether it is back."""
        retry_s = _RETRY_FIRST_S
        while self._away or self._spool.spooled:
            try:
                batch = await self._spooling.run(self._spool.peek)
                await self._commit(batch.settlements)
                if self._away:
                    log.info("database back", spooled=self._spool.spooled)
                self._away = False
                await self._spooling.run(partial(self._spool.forget, batch))
            except Exception as error:  # whatever it is: without this task nothing would ever be drained
                log.warning("spool not drained, will retry", spooled=self._spool.spooled, reason=_why(error))
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _RETRY_MAX_S)
            else:
                retry_s = _RETRY_FIRST_S

    async def drained(self) -> None:
        """Returns once the database has all that was spooled, or the ledger is closed."""
        if self._drainer is not None:
            await asyncio.wait({self._drainer})

    @property
    def spooled(self) -> int:
        """Settlements on the meter's disk that the database does not have yet."""
        return self._spool.spooled

    @property
    def full(self) -> bool:
        """Whether the spool takes no more, so that nothing more should be admitted."""
        return self._spool.full

    # --- reading ----------------------------------------------------------------------------------------------------

    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        """As usage.read_usage. Raises LedgerUnavailable, and ValueError for what it cannot tell."""
        return await self._read(lambda connection: read_usage(connection, query))

    async def used_since(self, since: float, *, key_id: str | None = None, team: str | None = None) -> Used:
        """As usage.used_since. Raises LedgerUnavailable, also while settlements of an earlier process are spooled that
        would have to be counted."""
        if self._spool.spooled:
            raise LedgerUnavailable(f"{self._spool.spooled} settlements are not in the database yet")
        query = partial(used_since, since=since, key_id=key_id, team=team)
        return await self._read(query, self._quota_reads)

    async def known(self, ids: Collection[str]) -> set[str]:
        """Those of the request ids that have a row in the database. Raises LedgerUnavailable."""
        return await self._read(lambda connection: known_ids(connection, ids))

    async def check_reachable(self, timeout_s: float = 5.0) -> None:
        """Raises LedgerUnavailable unless the database answers a query within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._read(lambda connection: connection.execute(sa.select(REQUESTS.c.id).limit(1)).all())
        except TimeoutError as error:
            raise LedgerUnavailable(f"no answer within {timeout_s:g} s") from error

    async def _read(self, query: Callable[[sa.Connection], T], threads: WorkerThreads | None = None) -> T:
        """On `threads`, or on those for what is not said to be urgent."""
        if self._closed:
            raise MeterClosed("the ledger is closed")
        try:
            return await (threads or self._reads).run(partial(self._run_query, query))
        except (sa.exc.SQLAlchemyError, SchemaTooNew) as error:
            raise LedgerUnavailable(reason(error)) from error

    def _run_query(self, query: Callable[[sa.Connection], T]) -> T:
        self._ensure_migrated()
        with self._engine.connect() as connection:
            return query(connection)

    # --- all of them ------------------------------------------------------------------------------------------------

    def _ensure_migrated(self) -> None:
        if not self._migrated:
            migrate(self._engine)
            self._migrated = True

    @property
    def closed(self) -> bool:
        """True from the moment that `close` was called."""
        return self._closed

    async def close(self, timeout_s: float = 10.0) -> None:
        """Takes no more, writes what is queued, disconnects; what is spooled stays so. Safe twice.

        What is not on disk after `timeout_s` fails with MeterClosed, and the connection that hangs stays open.
        """
        self._closed = True
        unfinished: set[asyncio.Task[None]] = set()
        if (writer := self._writer) is not None:
            _, unfinished = await asyncio.wait({writer}, timeout=timeout_s)
            if unfinished:
                log.error("ledger not closed in time", settlements=self._queued, timeout_s=timeout_s)
                writer.cancel()
                waiting, self._waiting = self._waiting, []
                self._fail(waiting, partial(MeterClosed, "closed before it was written"), None)
                await asyncio.wait({writer})
        if (drainer := self._drainer) is not None:
            drainer.cancel()
            await asyncio.wait({drainer})
        self._writes.close()
        self._reads.close()
        self._quota_reads.close()
        with suppress(MeterClosed, TimeoutError):  # closed by another call; a disk that hangs
            async with asyncio.timeout(timeout_s):
                await self._spooling.run(self._spool.close)
        self._spooling.close()
        if not unfinished:
            await asyncio.to_thread(self._engine.dispose)


def _why(error: Exception) -> str:
    return error.reason if isinstance(error, LedgerUnavailable) else reason(error)
