"""Files of records that outlive the process that writes them: appended whole, and a torn end is told from a record.

A record is its length, at least 1, and its CRC-32, four bytes each, little-endian, and then its bytes. A process that
is killed while it appends leaves less than that at the end of the file, which the reader cuts off.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from typing import Final, NamedTuple

__all__ = ["RecordsRead", "append_whole", "framed", "read_records"]

_HEAD: Final = struct.Struct("<II")


class RecordsRead(NamedTuple):
    records: list[bytes]
    whole_bytes: int
    """How much of the file they are; what is behind is torn, and to be cut off before anything is appended."""


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
