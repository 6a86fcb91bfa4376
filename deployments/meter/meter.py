"""The meter: keys, admission and settlement put together, from the start of its process to its end. Free of Ray and
HTTP.

Tokenizing, checking and reserving are one step, so that limits are exact and hold before any engine works. The ledger
alone decides what was used; reservations only say what may still be.

Coupled with deployments/ingress/meter_client.py through contracts.AdmissionRequest and contracts.Settlement.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from deployments.contracts import (
    AdministrationAnswer,
    AdministrationCommand,
    AdmissionRequest,
    Admitted,
    KeyInfo,
    MeterCounters,
    Settlement,
    UsageQuery,
    UsageRow,
)
from deployments.meter.admission.admission import Admission
from deployments.meter.admission.model_catalog import MeteredModel, ModelCatalog
from deployments.meter.admission.tokenizer_lanes import TokenizerLanes
from deployments.meter.counters import Counters
from deployments.meter.errors import LedgerUnavailable, MeterError, NotAdmitted
from deployments.meter.keys.administration import administer
from deployments.meter.keys.key_directory import KeyDirectory
from deployments.meter.keys.key_store import KeyStore
from deployments.meter.ledger.database import open_database
from deployments.meter.ledger.ledger import Ledger
from deployments.meter.ledger.refusal_rows import RefusalRows
from deployments.meter.ledger.spool import Spool
from deployments.meter.limits.limit_registry import LimitRegistry
from deployments.meter.limits.limits import LimitDemand
from deployments.meter.limits.reservation_journal import ReservationJournal
from deployments.meter.limits.reservations import Reservation, Reservations, demand_of
from deployments.meter.worker_threads import WorkerThreads

__all__ = ["Meter", "MeterSettings", "steady_clock"]

log = structlog.get_logger()

_SWEEP_S: Final = 2.0
_FIRST_USE_S: Final = 5.0


@dataclass(frozen=True)
class MeterSettings:
    folder: Path
    """For spool and journal; made if missing."""
    database_url: str
    admin_digest: bytes
    """Of the admin key."""
    require_keys: bool = True
    shard: int = 0
    shards: int = 1
    lost_after_s: float = 60.0
    """Without a sign of life from an ingress, after which its open reservations count as lost."""
    record_refusals: bool = False
    """Whether refused requests get a row in the ledger."""
    max_reservations: int = 100_000
    tokenizer_threads: int = 2
    """In each of the lanes of tokenizer_lanes.py, as the one below."""
    max_waiting_prompts: int = 256
    """Requests whose prompts wait for one of `tokenizer_threads`; half of them at most may be one key's or team's."""


def steady_clock() -> Callable[[], float]:
    """Unix time in seconds that never goes back: set once, then counted."""
    set_at = time.time() - time.monotonic()
    return lambda: set_at + time.monotonic()


class Meter:
    """All methods run on one event loop; none holds it for longer than a short prompt takes to encode."""

    def __init__(self, settings: MeterSettings, *, clock: Callable[[], float] | None = None) -> None:
        """Raises BlockingIOError while another process has the files of this shard open, OSError when they cannot be
        made, and for the database as Ledger does. Does not connect."""
        self._settings = settings
        self._clock = clock or steady_clock()
        self._counters = Counters()
        self._key_database = open_database(settings.database_url)
        spool = _open_spool(settings)
        try:
            self._journal = ReservationJournal(settings.folder, settings.shard, settings.shards)
        except BaseException:
            spool.close()
            raise
        self._ledger = Ledger(settings.database_url, spool, on_committed=self._counters.committed)
        self._store = KeyStore(self._key_database, clock=self._clock)
        self._key_threads = WorkerThreads("keys", threads=1, max_waiting=64)
        self._administration_threads = WorkerThreads("administration", threads=1, max_waiting=64)
        """Apart: who looks for a key must not wait for a command."""
        self._keys = KeyDirectory(
            self._store,
            self._key_threads.run,
            admin_digest=settings.admin_digest,
            require_keys=settings.require_keys,
            clock=self._clock,
        )
        self._tokenizer_lanes = TokenizerLanes(
            threads=settings.tokenizer_threads, max_waiting=settings.max_waiting_prompts
        )
        self._catalog = ModelCatalog(self._tokenizer_lanes)
        self._registry = LimitRegistry(self._ledger, self._clock)
        self._reservations = Reservations(
            self._journal, capacity=settings.max_reservations, lost_after_s=settings.lost_after_s
        )
        self._admission = Admission(self._keys, self._catalog, self._registry, self._reservations, self._clock)
        self._refusal_rows = RefusalRows(self._ledger) if settings.record_refusals else None
        self._unjournaled: list[asyncio.Future[None]] = []
        """Who waits until what this turn of the event loop has decided is in the journal."""
        self._unchecked: list[str] | None = []
        """Reservations of an earlier process that may be recorded already; None once that is known."""
        self._sweeper: asyncio.Task[None] | None = None

    # --- in the order in which they happen --------------------------------------------------------------------------

    async def start(self) -> None:
        """Knows again what an earlier process had admitted, and the keys. A database that is away is waited for only
        by those that need it."""
        self._unchecked = self._restore()
        await self._ledger.start()
        try:
            async with asyncio.timeout(_FIRST_USE_S):
                await self._catch_up(self._unchecked)
        except (MeterError, TimeoutError) as error:
            log.warning("database away at the start", reason=str(error))
        await self._keys.start()
        self._sweeper = asyncio.create_task(self._sweep_loop(), name="meter-sweeper")

    def set_models(self, models: Iterable[MeteredModel]) -> None:
        """Admits requests for exactly these models from now on. Requests that are being admitted go on."""
        self._catalog.set_models(models)

    async def authenticate(self, digest: bytes) -> KeyInfo | None:
        """Whose key has this SHA-256; None for nobody's. Raises LedgerUnavailable when that cannot be told."""
        return await self._keys.authenticate(digest)

    async def admit(self, request: AdmissionRequest) -> Admitted:
        """Tokenizes, checks and reserves; a reservation lasts until its request is settled.

        Asking again for the same request is safe. Raises NotAdmitted: as `unavailable` when it cannot be decided now,
        because too much waits, a model's files are unusable, or usage cannot be told. Raises LedgerUnavailable when
        usage cannot be recorded.
        """
        if self._ledger.full:
            raise LedgerUnavailable("the spool is full")
        began_s = time.perf_counter()
        try:
            admitted = await self._admission.decide(request)
            self._counters.admitted(time.perf_counter() - began_s)
            return admitted
        except NotAdmitted as refused:
            self._counters.refusals[refused.refusal.code] += 1
            if self._refusal_rows is not None:
                self._refusal_rows.put(request, self._clock())
            raise
        except MeterError as error:
            log.warning("admission not decided", request=request.request_id, reason=str(error))
            raise NotAdmitted("unavailable", str(error)) from error
        finally:
            await self._journaled()

    async def settle(self, settlements: list[Settlement]) -> None:
        """Returns once all are durable in the ledger; then their reservations are gone. Raises as Ledger.record."""
        began_s = time.perf_counter()
        async with self._registry.recording():
            await self._ledger.record(settlements)
            now = self._clock()
            for settlement in settlements:
                if not self._reservations.settle(settlement, now):
                    self._registry.recount(settlement.account.key_id, settlement.account.team)
        self._reservations.flush(now)
        self._counters.settled(time.perf_counter() - began_s)

    def renew(self, ingress_id: str) -> None:
        """That ingress lives, and will settle what it had admitted."""
        self._reservations.renew(ingress_id, self._clock())

    async def administer(self, command: AdministrationCommand) -> AdministrationAnswer:
        """Changes or tells keys and teams: this meter knows at once, all others within a second. Raises
        LedgerUnavailable, and then nothing has changed."""
        answer = await self._administration_threads.run(partial(administer, self._store, command))
        if answer.error is None and self._settings.require_keys:
            try:
                await self._keys.refresh()
            except MeterError as error:  # too late to fail: the command would be sent again
                log.warning("keys not refreshed, will retry", reason=str(error))
        return answer

    async def sweep(self) -> None:
        """Settles what is lost, and forgets what need not be known. The meter does it itself from time to time."""
        now = self._clock()
        self._registry.forget_idle(now)
        async with self._registry.recording():
            for reservation in self._reservations.abandoned(now):
                self._registry.recount(reservation.account.key_id, reservation.account.team)
        self._reservations.flush(now)
        if lost := self._reservations.lost(now):
            await self.settle([Settlement.unused(reservation.account, "lost", now) for reservation in lost])
            self._counters.lost_reservations += len(lost)
            for reservation in lost:
                log.warning(
                    "reservation lost",
                    request=reservation.account.request_id,
                    reserved_tokens=reservation.account.reserved_tokens,
                    ingress=reservation.ingress_id,
                )
        if self._unchecked is not None:
            with suppress(LedgerUnavailable):  # as logged at the start
                await self._catch_up(self._unchecked)

    async def usage(self, query: UsageQuery) -> list[UsageRow]:
        """As Ledger.usage."""
        return await self._ledger.usage(query)

    def counters(self) -> MeterCounters:
        return self._counters.told(
            wrong_keys=self._keys.wrong_keys,
            open_reservations=len(self._reservations),
            spooled=self._ledger.spooled,
        )

    async def check_reachable(self) -> None:
        """Raises LedgerUnavailable unless the ledger's database answers."""
        await self._ledger.check_reachable()

    @property
    def closed(self) -> bool:
        return self._ledger.closed

    async def close(self) -> None:
        """Stops tokenizing, writes the settlements that wait, closes ledger and files. Safe twice, and before
        `start`."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait({self._sweeper})
        self._tokenizer_lanes.close()
        await self._registry.close()
        await self._keys.close()
        if self._refusal_rows is not None:
            await self._refusal_rows.close()
        await self._ledger.close()
        self._journal.close()
        self._key_threads.close()
        self._administration_threads.close()
        await asyncio.to_thread(self._key_database.dispose)

    # --- admission ---------------------------------------------------------------------------------------------------

    def _journaled(self) -> asyncio.Future[None]:
        """Done once what was decided is in the journal: one write for all of this turn of the event loop."""
        loop = asyncio.get_running_loop()
        if not self._unjournaled:
            loop.call_soon(self._journal_now)
        journaled: asyncio.Future[None] = loop.create_future()
        self._unjournaled.append(journaled)
        return journaled

    def _journal_now(self) -> None:
        waiting, self._unjournaled = self._unjournaled, []
        failure: Exception | None = None
        try:
            self._reservations.flush(self._clock())
        except Exception as error:  # all who wait raise it
            failure = error
        for journaled in waiting:
            if journaled.done():
                continue  # whoever waited is gone
            if failure is None:
                journaled.set_result(None)
            else:
                journaled.set_exception(failure)

    # --- what an earlier process, and others, have left -------------------------------------------------------------

    def _restore(self) -> list[str]:
        """The ids of those that are open."""
        now, unchecked = self._clock(), []
        for left in self._journal.load(now):
            account = left.account
            # A clock that was set back must not make room later than a minute from now.
            admitted_at = min(account.admitted_at or now, now)
            states = self._registry.states(account.key_id, account.team)
            charges = tuple([state.take(admitted_at, demand_of(account)) for state in states])
            if left.used_tokens is None:
                self._reservations.restore(Reservation(account, left.ingress_id, charges), now)
                unchecked.append(account.request_id)
            else:
                for charge in charges:
                    charge.close(LimitDemand(left.used_tokens, 0.0), account.started_at, admitted=left.admitted)
        if unchecked:
            log.info("open reservations taken up", count=len(unchecked))
        return unchecked

    async def _catch_up(self, unchecked: list[str]) -> None:
        """Ends what an earlier process has recorded and not journaled. The first use of the database, which prepares
        it. Raises LedgerUnavailable."""
        async with self._registry.recording():
            recorded = await self._ledger.known(unchecked)
            for reservation in self._reservations.close_recorded(recorded):
                self._registry.recount(reservation.account.key_id, reservation.account.team)
        self._reservations.flush(self._clock())
        if not self._ledger.spooled:
            self._unchecked = None

    async def _sweep_loop(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_S, self._settings.lost_after_s / 4))
            try:
                await self.sweep()
            except Exception as error:  # whatever it is: without this task nothing would ever be lost
                log.warning("not swept, will retry", reason=repr(error))


def _open_spool(settings: MeterSettings) -> Spool:
    left = []
    if settings.shard == 0:  # takes what meters that there are no more have left
        for path in settings.folder.glob("settlements-*.spool"):
            number = path.stem.removeprefix("settlements-")
            if number.isdecimal() and int(number) >= settings.shards:
                left.append(path)
    return Spool(settings.folder, f"settlements-{settings.shard}", recover=left)
