"""The spool: settlements on the meter's own disk for as long as the database is away.

What `append` has returned for is synced and outlives a power cut. The oldest are read from the file in batches and
forgotten once the ledger has them; the file shrinks when none are left, so after a crash some are recorded again, which
changes nothing. What no database can ever store is put aside in a file of JSON lines, for people to look at.

For use by one thread at a time, but for `reject`, `spooled` and `full`, which any may use.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from deployments.contracts import Settlement, pack, unpack
from deployments.meter.errors import LedgerUnavailable
from deployments.settlement.record_file import append_whole, framed, left_behind, open_locked, read_records

__all__ = ["Spool", "SpooledBatch"]

log = structlog.get_logger()

_BATCH_BYTES = 2**19


class SpooledBatch(NamedTuple):
    """The oldest records of a spool."""

    settlements: list[Settlement]
    unreadable: list[bytes]
    """Whole, but not as today's contract has them."""
    end_bytes: int
    """Where they end in the file."""

    @property
    def records(self) -> int:
        return len(self.settlements) + len(self.unreadable)


class Spool:
    """The files `<name>.spool` and `<name>.rejected` of a folder."""

    def __init__(self, folder: Path, name: str, *, recover: Iterable[Path] = (), max_records: int = 200_000) -> None:
        """Makes `folder` if missing, takes up what an earlier process of this name has left, and what stands in the
        files `recover`, unless they are missing, in use or its own.

        The file holds at most twice `max_records`, and those of one `append` more. Raises OSError when the disk does
        not do what it is asked, BlockingIOError while another process has this spool open.
        """
        self._folder = folder
        self._path = folder / f"{name}.spool"
        self._rejected = folder / f"{name}.rejected"
        self._max_records = max_records
        self._start_bytes = self._end_bytes = 0
        self._records = self._forgotten = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = open_locked(self._path)
        try:
            _sync_folder(folder)
            self._take_up()
            for path in recover:
                if path != self._path:
                    self._recover(path)
        except BaseException:
            self.close()
            raise

    @property
    def spooled(self) -> int:
        """Settlements that the ledger does not have yet."""
        return self._records - self._forgotten

    @property
    def full(self) -> bool:
        """Whether it takes no more."""
        return self.spooled >= self._max_records or self._records >= 2 * self._max_records

    # --- in the order in which they happen --------------------------------------------------------------------------

    def append(self, settlements: Sequence[Settlement]) -> None:
        """Returns once they are synced. Raises LedgerUnavailable, and then has none, when it is full or the disk fails.

        One that cannot be encoded could not be recorded either, and is rejected.
        """
        if self.full:
            raise LedgerUnavailable(f"the spool is full at {self._max_records} settlements")
        records = []
        for settlement in settlements:
            try:
                records.append(pack(settlement))
            except (ValueError, OverflowError) as error:
                self.reject(settlement, f"{type(error).__name__}: {error}")
        try:
            self._write(records)
        except OSError as error:
            raise LedgerUnavailable(f"{self._path.name}: {error.strerror}") from error

    def peek(self) -> SpooledBatch:
        """Some of the oldest, in order; none only when nothing is spooled. Raises OSError."""
        wanted_bytes = _BATCH_BYTES
        while True:
            data = os.pread(self._file, min(wanted_bytes, self._end_bytes - self._start_bytes), self._start_bytes)
            records, whole_bytes = read_records(data)
            if records or not data:
                break
            if len(data) < wanted_bytes:
                raise OSError(f"{self._path.name}: damaged at byte {self._start_bytes}")
            wanted_bytes *= 2
        settlements, unreadable = [], []
        for record in records:
            try:
                settlements.append(unpack(record, Settlement))
            except msgspec.DecodeError:
                unreadable.append(record)
        return SpooledBatch(settlements, unreadable, self._start_bytes + whole_bytes)

    def forget(self, batch: SpooledBatch) -> None:
        """Drops what the last `peek` returned: the ledger has it. Raises OSError or LedgerUnavailable."""
        for record in batch.unreadable:
            self.reject(record, "not a settlement of this version")
        self._start_bytes = batch.end_bytes
        self._forgotten += batch.records
        if not self.spooled:
            os.ftruncate(self._file, 0)
            self._start_bytes = self._end_bytes = 0
            self._records = self._forgotten = 0

    def reject(self, settlement: Settlement | bytes, why: str) -> None:
        """Puts aside what can never be recorded; durable when this returns. Raises LedgerUnavailable."""
        told = settlement.hex() if isinstance(settlement, bytes) else msgspec.to_builtins(settlement)
        line = json.dumps({"rejected_at": time.time(), "reason": why, "settlement": told})
        try:
            with self._rejected.open("a") as file:
                file.write(f"{line}\n")
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(self._folder)
        except OSError as error:
            raise LedgerUnavailable(f"{self._rejected.name}: {error.strerror}") from error
        request_id = None if isinstance(settlement, bytes) else ascii(settlement.account.request_id)
        log.error("settlement rejected", request=request_id, reason=why, file=self._rejected.name)

    def close(self) -> None:
        """What is spooled stays for a successor. Safe twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    # --- the file ---------------------------------------------------------------------------------------------------

    def _write(self, records: list[bytes]) -> None:
        """Behind the last whole record, and a failed attempt leaves nothing in the way."""
        end_bytes = append_whole(self._file, framed(records), self._end_bytes)
        try:
            os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end_bytes)
            raise
        self._end_bytes = end_bytes
        self._records += len(records)

    def _take_up(self) -> None:
        records, self._end_bytes = read_records(self._path.read_bytes())
        self._records = len(records)
        torn_bytes = os.fstat(self._file).st_size - self._end_bytes
        if torn_bytes:
            os.ftruncate(self._file, self._end_bytes)
        if records or torn_bytes:
            log.info("spool taken up", file=self._path.name, settlements=len(records), torn_bytes=torn_bytes)

    def _recover(self, path: Path) -> None:
        with left_behind(path) as records:
            if records is None:
                return
            self._write(records)
        log.info("spool recovered", file=path.name, settlements=len(records))


def _sync_folder(folder: Path) -> None:
    """Makes new files of it durable, not only what stands in them."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
