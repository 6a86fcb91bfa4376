"""Settlements that no meter has acknowledged yet: kept through the death of a meter, and of the process that has them.

Each process that witnesses what requests use, ingress or engine replica, has one outbox: a dictionary, and beside it a
file to which each settlement is appended before anybody is told that its request has ended. The file outlives a process
that is killed (not a power cut: it is not synced, since the meter syncs milliseconds later), and whoever of the same
node finds that its owner is gone recovers it. A lock on the file tells that its owner lives; the kernel lets go of it
when a process dies, however it dies.

A checkpoint is what a request has used so far, for the case that this process dies before it can settle it: it is in
the file alone, and sent by whoever recovers that.

What is sent twice is recorded once (deployments/meter/ledger/ledger.py).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from deployments.contracts import Settlement, pack, unpack
from deployments.settlement.record_file import append_whole, draft_of, framed, left_behind, open_locked
from deployments.settlement.record_rewrite import RecordRewrite

__all__ = ["OUTBOX_SIZE", "SettlementOutbox"]

log = structlog.get_logger()

OUTBOX_SIZE = 50_000
"""Settlements that wait, at which nothing more should be admitted."""
_SEND_AT_ONCE = 1000
_RETRY_FIRST_S, _RETRY_MAX_S = 0.05, 1.0
_ADOPT_S = 5.0
_ADOPT_AT_ONCE = 200
_COMPACT_BYTES = 4 * 2**20
_SUFFIX = ".outbox"


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    """One record of the file."""

    meter: str
    settlement: Settlement


class _Waiting(NamedTuple):
    settlement: Settlement
    acknowledged: Callable[[], None] | None


class SettlementOutbox:
    """Sends to each meter apart, so that one that is away holds up no other's. For use on one event loop."""

    def __init__(
        self,
        folder: Path,
        name: str,
        send: Callable[[str, list[Settlement]], Awaitable[None]],
        *,
        call_limit_s: float = 10.0,
    ) -> None:
        """`folder` is shared by the processes of a node, made if missing; `name` is this one's. `send(meter,
        settlements)` makes one attempt; returning is the acknowledgement."""
        self._folder = folder
        self._path = folder / f"{name}{_SUFFIX}"
        self._send = send
        self._call_limit_s = call_limit_s
        self._waiting: dict[str, dict[tuple[str, str], _Waiting]] = {}
        """By meter, then by request and witness."""
        self._checkpoints: dict[str, tuple[str, Settlement]] = {}
        """By request, with its meter."""
        self._senders: dict[str, asyncio.Task[None]] = {}
        self._recovery: asyncio.Task[None] | None = None
        self._emptied = asyncio.Event()
        self._bytes = 0
        self._compact_at_bytes = _COMPACT_BYTES
        self._rewrite: RecordRewrite | None = None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = open_locked(self._path, wait=True)  # another may just be recovering what was left

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def lag_s(self, now: float) -> float:
        """How long ago the oldest that waits was made, by `now` in Unix seconds; 0 when none does."""
        oldest = [next(iter(waiting.values())).settlement for waiting in self._waiting.values() if waiting]
        return max((max(0.0, now - each.account.started_at - each.total_s) for each in oldest), default=0.0)

    # --- in the order in which they happen --------------------------------------------------------------------------

    async def start(self) -> None:
        self._recovery = asyncio.create_task(self._recover_loop(), name="settlements-recovery")

    def put(self, meter: str, settlement: Settlement, acknowledged: Callable[[], None] | None = None) -> None:
        """Never waits and never fails: from now on the settlement will be recorded, even if this process is killed,
        unless its disk is full as well. `acknowledged` is called once the meter has it."""
        self._keep(meter, settlement)
        self._checkpoints.pop(settlement.account.request_id, None)
        self._queue(meter, settlement, acknowledged)

    def checkpoint(self, meter: str, settlement: Settlement) -> None:
        """Like `put`, but sent only if this process dies before it puts a settlement of the same request or withdraws
        this. Nothing where one of this process waits already."""
        request_id = settlement.account.request_id
        if (request_id, "ingress") not in self._waiting.get(meter, {}):
            self._keep(meter, settlement)
            self._checkpoints[request_id] = (meter, settlement)

    def withdraw(self, request_ids: Iterable[str]) -> None:
        """Their checkpoints are not needed any more."""
        for request_id in request_ids:
            self._checkpoints.pop(request_id, None)
        self._try_to_shorten()

    async def close(self, limit_s: float = 10.0) -> None:
        """Give the meters a bounded time to take what waits; what they do not take stays in the file. Safe twice."""
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])
            self._recovery = None
        try:
            async with asyncio.timeout(limit_s):
                while len(self):
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            log.error("settlements left to be recovered", count=len(self), file=self._path.name)
        for sender in self._senders.values():
            sender.cancel()
        if self._senders:
            await asyncio.wait(self._senders.values())
        self._senders.clear()
        self._abandon_rewrite()
        if self._file >= 0:
            if not (len(self) or self._checkpoints):
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    # --- sending ----------------------------------------------------------------------------------------------------

    def _queue(self, meter: str, settlement: Settlement, acknowledged: Callable[[], None] | None) -> None:
        waiting = self._waiting.setdefault(meter, {})
        waiting[settlement.account.request_id, settlement.witness] = _Waiting(settlement, acknowledged)
        sender = self._senders.get(meter)
        if sender is None or sender.done():
            self._senders[meter] = asyncio.create_task(self._send_all(meter), name=f"settlements-{meter}")

    async def _send_all(self, meter: str) -> None:
        waiting = self._waiting[meter]
        retry_s = _RETRY_FIRST_S
        while waiting:
            batch = list(waiting.items())[:_SEND_AT_ONCE]
            try:
                async with asyncio.timeout(self._call_limit_s):
                    await self._send(meter, [each.settlement for _, each in batch])
            except Exception as error:  # whatever it is: without this task nothing would ever be settled again
                log.warning("settlements not taken, will retry", meter=meter, count=len(waiting), reason=repr(error))
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _RETRY_MAX_S)
                continue
            retry_s = _RETRY_FIRST_S
            for key, sent in batch:
                if waiting.get(key) is sent:  # else it was put again meanwhile
                    del waiting[key]
                if sent.acknowledged is not None:
                    sent.acknowledged()
            self._try_to_shorten()
            if not len(self):
                self._emptied.set()

    # --- the file ---------------------------------------------------------------------------------------------------

    def _keep(self, meter: str, settlement: Settlement) -> None:
        try:
            self._append(pack(_Entry(meter, settlement)))
        except OSError as error:
            log.error("settlement only in memory", request=settlement.account.request_id, reason=repr(error))

    def _append(self, record: bytes) -> None:
        data = framed([record])
        if self._rewrite is not None:
            self._rewrite.append(data)
        self._bytes = append_whole(self._file, data, self._bytes)

    def _try_to_shorten(self) -> None:
        try:
            self._shorten()
        except OSError as error:
            log.error("outbox not shortened", file=self._path.name, reason=repr(error))
            self._abandon_rewrite()
            self._compact_at_bytes = 2 * self._bytes + _COMPACT_BYTES

    def _shorten(self) -> None:
        if not (len(self) or self._checkpoints):
            self._abandon_rewrite()
            os.ftruncate(self._file, 0)
            self._bytes = 0
        elif self._rewrite is not None:
            if self._rewrite.is_ready():
                self._put_in_place(self._rewrite)
        elif self._bytes > self._compact_at_bytes:
            self._compact()

    def _compact(self) -> None:
        """Only what waits, and the checkpoints, in a new file that takes the place of the old one once it is made."""
        waiting = [(meter, list(some.values())) for meter, some in self._waiting.items()]
        kept = list(self._checkpoints.values())
        entries = chain(((meter, each.settlement) for meter, some in waiting for each in some), kept)
        self._rewrite = RecordRewrite(self._path, (pack(_Entry(meter, settlement)) for meter, settlement in entries))

    def _put_in_place(self, rewrite: RecordRewrite) -> None:
        new = rewrite.finish()
        os.rename(draft_of(self._path), self._path)
        old, self._file, self._rewrite = self._file, new, None
        os.close(old)
        self._bytes = os.fstat(new).st_size
        self._compact_at_bytes = 2 * self._bytes + _COMPACT_BYTES

    def _abandon_rewrite(self) -> None:
        if self._rewrite is not None:
            self._rewrite.abandon()
            self._rewrite = None

    # --- adoption ---------------------------------------------------------------------------------------------------

    async def _recover_loop(self) -> None:
        while True:
            try:
                await self.recover()
            except Exception as error:  # whatever it is: without this task nothing would ever be recovered again
                log.error("outboxes not looked through", reason=repr(error))
            await asyncio.sleep(_ADOPT_S)

    async def recover(self) -> None:
        """Take over what processes that are gone have left in the folder."""
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if path != self._path:
                await self._recover(path)

    async def _recover(self, path: Path) -> None:
        with left_behind(path) as records:
            if records is not None:
                await self._take_over(path, records)

    async def _take_over(self, path: Path, records: list[bytes]) -> None:
        for number, record in enumerate(records, 1):
            try:
                entry = unpack(record, _Entry)
            except msgspec.DecodeError as error:
                log.error("settlement of another version", file=path.name, record=record.hex(), reason=str(error))
                continue
            self.put(entry.meter, entry.settlement)
            log.info(
                "settlement recovered",
                request=entry.settlement.account.request_id,
                witness=entry.settlement.witness,
                parts=entry.settlement.parts,
            )
            if number % _ADOPT_AT_ONCE == 0:
                await asyncio.sleep(0)  # streams go on
