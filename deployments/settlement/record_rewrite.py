"""Making a file of records anew while it is in use, without holding up the event loop that appends to it.

A thread writes what still counts to a draft beside the file, in small portions with pauses, so that the loop gets the
interpreter in between. Meanwhile everything is appended to the file as ever, and told here as well; once the draft has
that, too, it may take the file's place. So the file under its name is whole at any moment at which the process is
killed.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Final

from deployments.settlement.record_file import draft_of, framed

__all__ = ["RecordRewrite"]

_PORTION: Final = 100
"""Records that are written without a pause: about a millisecond of work."""
_PAUSE: Final = 4.0
"""Times as long as a portion took."""
_AT_ONCE_BYTES: Final = 2**18
"""What `is_ready` may leave to be written on the event loop."""


class RecordRewrite:
    """One draft. For use on one event loop, but for what its thread does."""

    def __init__(self, path: Path, records: Iterable[bytes]) -> None:
        """Begins to write `records`, which the thread takes one by one: what they are made of must not change. Replaces
        what an earlier process has left as a draft of `path`, and has it locked. Raises OSError."""
        self._draft = draft_of(path)
        self._draft.unlink(missing_ok=True)
        self._file = os.open(self._draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._meanwhile: list[bytes] = []
        self._abandoned = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="record rewrite")
        self._writing: Future[None] = self._thread.submit(self._write_records, iter(records))

    def append(self, data: bytes) -> None:
        """Framed records that are being appended to the file in use."""
        self._meanwhile.append(data)

    def is_ready(self) -> bool:
        """Whether little is left to be written. Asking makes it go on; raises what the disk raised."""
        if not self._writing.done():
            return False
        self._writing.result()
        if sum(map(len, self._meanwhile)) <= _AT_ONCE_BYTES:
            return True
        meanwhile, self._meanwhile = self._meanwhile, []
        self._writing = self._thread.submit(self._write_all, meanwhile)
        return False

    def finish(self) -> int:
        """The descriptor of the draft, with all that was appended until now. When `is_ready`. Raises OSError."""
        self._write_all(self._meanwhile)
        self._thread.shutdown(wait=False)
        return self._file

    def abandon(self) -> None:
        """Ends the thread, and removes the draft."""
        self._abandoned.set()
        self._thread.shutdown()
        self._draft.unlink(missing_ok=True)
        os.close(self._file)

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _write_records(self, records: Iterable[bytes]) -> None:
        while True:
            begun_s = time.thread_time()
            portion = list(islice(records, _PORTION))
            if not portion:
                return
            self._write_all([framed(portion)])
            if self._abandoned.wait(_PAUSE * (time.thread_time() - begun_s)):
                return

    def _write_all(self, parts: list[bytes]) -> None:
        for data in parts:
            written = os.write(self._file, data)
            if written < len(data):
                raise OSError(None, f"{self._draft.name}: only {written} of {len(data)} bytes could be written")
