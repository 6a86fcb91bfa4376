"""Files of records that outlive the process that writes them: appended whole, and a torn end is told from a record.

A process has its file locked for as long as it lives. What it leaves is recovered by another.

A record is its length, at least 1, and its CRC-32, four bytes each, little-endian, and then its bytes. A process that
is killed while it appends leaves less than that at the end of the file, which the reader cuts off.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["RecordsRead", "append_whole", "draft_of", "framed", "left_behind", "open_locked", "read_records"]

_HEAD: Final = struct.Struct("<II")


class RecordsRead(NamedTuple):
    records: list[bytes]
    whole_bytes: int
    """How much of the file they are; what is behind is torn, and to be cut off before anything is appended."""


def draft_of(path: Path) -> Path:
    """Where a rewrite of the file at `path` stands until it takes its place (record_rewrite.py)."""
    return path.with_suffix(".draft")


def open_locked(path: Path, *, create: bool = True, wait: bool = False) -> int:
    """A descriptor of the file that stands at `path`, to append to, locked until it is closed, by death at the latest.
    Raises BlockingIOError while another has it, unless this may `wait`; FileNotFoundError if there is none and none is
    to be made."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _stands_at(file, path):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # recovered and unlinked, or replaced, before it could be locked


def _stands_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def left_behind(path: Path) -> Iterator[list[bytes] | None]:
    """The records of a file that its process has left, and removes it once they are taken over. None while its process
    lives, and when another has recovered it."""
    try:
        file = open_locked(path, create=False)
    except (BlockingIOError, FileNotFoundError):
        yield None
        return
    try:
        yield read_records(os.pread(file, os.fstat(file).st_size, 0)).records
        path.unlink()
        draft_of(path).unlink(missing_ok=True)
    finally:
        os.close(file)


def append_whole(file: int, data: bytes, size_bytes: int) -> int:
    """Appends framed records to a file that has `size_bytes`; how many it has then. Raises OSError and leaves none of
    them where the disk takes only a part: behind a record without its end nothing could be read."""
    written = os.write(file, data)
    if written < len(data):
        os.ftruncate(file, size_bytes)
        raise OSError(None, f"only {written} of {len(data)} bytes could be written")
    return size_bytes + written


def framed(records: Iterable[bytes]) -> bytes:
    """`records` as they stand in a file."""
    return b"".join([part for record in records for part in (_HEAD.pack(len(record), zlib.crc32(record)), record)])


def read_records(data: bytes) -> RecordsRead:
    """The records of a file's content, up to the first that is not whole."""
    records: list[bytes] = []
    position = 0
    while position + _HEAD.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, position)
        end = position + _HEAD.size + length
        record = data[position + _HEAD.size : end]
        if not length or end > len(data) or zlib.crc32(record) != checksum:  # zeros are what a power cut may leave
            break
        records.append(record)
        position = end
    return RecordsRead(records, position)
