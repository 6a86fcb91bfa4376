"""What a meter has admitted, in a file, so that a meter that is killed leaves its successor the open reservations and
the last minute of every limit.

The file outlives the process, not a power cut: it is not synced, because nothing that was acknowledged depends on it.
After a power cut limits of a minute begin anew, and requests that were under way are known by their settlements only.

Two files take turns, so that nothing is ever rewritten but what is open: when one is full, and the one before is older
than a minute, a new one begins with the open reservations and the one before is dropped. The new one is made beside the
one in use (deployments/settlement/record_rewrite.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import structlog

from deployments.contracts import Account, pack
from deployments.settlement.record_file import append_whole, draft_of, framed, left_behind, open_locked, read_records
from deployments.settlement.record_rewrite import RecordRewrite

__all__ = ["JournaledReservation", "ReservationJournal"]

log = structlog.get_logger()

_MINUTE_S: Final = 60.0
_SUFFIX: Final = ".journal"


class _Reserved(msgspec.Struct, frozen=True, array_like=True, tag="reserved"):
    account: Account
    ingress_id: str


class _Closed(msgspec.Struct, frozen=True, array_like=True, tag="closed"):
    request_id: str
    tokens: int
    admitted: bool


class JournaledReservation(NamedTuple):
    account: Account
    ingress_id: str
    used_tokens: int | None
    """None while it is open."""
    admitted: bool
    """False if it was not after all, and counts for nothing."""


class ReservationJournal:
    """The files `reservations-<shard>.journal` and `.previous` of a folder. What is appended is written by `flush`."""

    def __init__(self, folder: Path, shard: int, shards: int = 1, *, full_bytes: int = 8 * 2**20) -> None:
        """Makes `folder` if missing. Raises BlockingIOError while another process has this journal open, OSError when
        the disk does not do what it is asked."""
        self._folder = folder
        self._path = _path(folder, shard)
        self._shard, self._shards = shard, shards
        self._full_bytes = full_bytes
        self._buffer: list[bytes] = []
        self._rotated_at = 0.0
        self._rotation: RecordRewrite | None = None
        self._broken = False
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = open_locked(self._path)
        self._bytes = os.fstat(self._file).st_size

    def load(self, now: float) -> list[JournaledReservation]:
        """What an earlier process left that still counts, in the order of admission; a torn end is cut off.

        The first of the meters also takes what is left of meters that there are no more.
        """
        previous = _read(_previous(self._path))
        records, self._bytes = read_records(self._path.read_bytes())
        os.ftruncate(self._file, self._bytes)
        counting = _counting([*previous, *_decoded(records)], now)
        if self._shard == 0:
            counting += self._recover(now)
            self.flush()
        self._rotated_at = now
        return sorted(counting, key=lambda each: each.account.admitted_at or 0.0)

    def reserved(self, account: Account, ingress_id: str) -> None:
        self._buffer.append(pack(_Reserved(account, ingress_id)))

    def closed(self, request_id: str, tokens: int, *, admitted: bool = True) -> None:
        self._buffer.append(pack(_Closed(request_id, tokens, admitted)))

    def flush(self) -> None:
        """Writes what was appended, and ends a rotation that is ready. A disk that fails is logged, and makes limits
        inexact after the next restart only; so it fails nothing else."""
        if self._file < 0:
            return
        if self._buffer:
            records, self._buffer = self._buffer, []
            try:
                self._write(records)
            except OSError as error:
                if not self._broken:
                    log.error("reservations not journaled", file=self._path.name, reason=error.strerror)
                self._broken = True
            else:
                self._broken = False
        if self._rotation is not None:
            try:
                if self._rotation.is_ready():
                    self._put_in_place(self._rotation)
                    self._rotation = None
            except OSError as error:
                log.error("journal not rotated", file=self._path.name, reason=error.strerror)
                self._abandon_rotation()

    def is_full(self, now: float) -> bool:
        """Whether it is time to `rotate`."""
        return self._rotation is None and self._bytes > self._full_bytes and self._rotated_at + _MINUTE_S <= now

    def rotate(self, now: float, still_open: Iterable[tuple[Account, str]]) -> None:
        """Begin a new file with the reservations that are open. A thread goes through `still_open`, which must not
        change; the file takes its place in a later `flush`, and has what is appended until then."""
        self._rotated_at = now
        try:
            self._rotation = RecordRewrite(
                self._path, (pack(_Reserved(account, ingress)) for account, ingress in still_open)
            )
        except OSError as error:
            log.error("journal not rotated", file=self._path.name, reason=error.strerror)

    def close(self) -> None:
        """What is open stays for a successor. Safe twice."""
        self.flush()
        self._abandon_rotation()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    # --- internals ---------------------------------------------------------------------------------------------------

    def _write(self, records: list[bytes]) -> None:
        data = framed(records)
        if self._rotation is not None:
            self._rotation.append(data)
        self._bytes = append_whole(self._file, data, self._bytes)

    def _put_in_place(self, rotation: RecordRewrite) -> None:
        """Whoever finds no file between the two renames finds all in the one before. Raises OSError, and then goes on
        with the file in use."""
        new = rotation.finish()
        new_bytes = os.fstat(new).st_size
        self._path.rename(_previous(self._path))
        try:
            draft_of(self._path).rename(self._path)
        except OSError:
            _previous(self._path).rename(self._path)
            raise
        old, self._file, self._bytes = self._file, new, new_bytes
        os.close(old)

    def _abandon_rotation(self) -> None:
        if self._rotation is not None:
            self._rotation.abandon()
            self._rotation = None

    def _recover(self, now: float) -> list[JournaledReservation]:
        recovered = []
        for path in self._folder.glob(f"reservations-*{_SUFFIX}"):
            number = path.stem.removeprefix("reservations-")
            if not number.isdecimal() or int(number) < self._shards:
                continue
            with left_behind(path) as records:
                if records is None:
                    continue  # its meter is stopping: the next start finds what it leaves
                left = _counting([*_read(_previous(path)), *_decoded(records)], now)
                for reservation in left:
                    account, used_tokens = reservation.account, reservation.used_tokens
                    self.reserved(account, reservation.ingress_id)
                    if used_tokens is not None:
                        self.closed(account.request_id, used_tokens, admitted=reservation.admitted)
                self.flush()
            _previous(path).unlink(missing_ok=True)
            log.info("reservations recovered", file=path.name, count=len(left))
            recovered += left
        return recovered


def _path(folder: Path, shard: int) -> Path:
    return folder / f"reservations-{shard}{_SUFFIX}"


def _previous(path: Path) -> Path:
    return path.with_suffix(".previous")


def _read(path: Path) -> list[_Reserved | _Closed]:
    return _decoded(read_records(path.read_bytes()).records) if path.exists() else []


def _decoded(records: Iterable[bytes]) -> list[_Reserved | _Closed]:
    decoder = msgspec.msgpack.Decoder[_Reserved | _Closed](_Reserved | _Closed)
    try:
        return [decoder.decode(record) for record in records]
    except msgspec.DecodeError as error:
        log.error("journal of another version, limits begin anew", reason=str(error))
        return []


def _counting(entries: Iterable[_Reserved | _Closed], now: float) -> list[JournaledReservation]:
    """The reservations that are open or of the last minute, as the last entry about each has it."""
    reservations: dict[str, JournaledReservation] = {}
    for entry in entries:
        if isinstance(entry, _Reserved):
            reservations[entry.account.request_id] = JournaledReservation(entry.account, entry.ingress_id, None, True)
        elif (reservation := reservations.get(entry.request_id)) is not None:
            reservations[entry.request_id] = reservation._replace(used_tokens=entry.tokens, admitted=entry.admitted)
    return [
        reservation
        for reservation in reservations.values()
        if reservation.used_tokens is None or now < (reservation.account.admitted_at or 0.0) + _MINUTE_S
    ]
