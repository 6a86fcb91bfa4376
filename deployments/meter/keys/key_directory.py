"""The keys and teams that a meter knows, in memory, never more than a second behind the database.

A key that is not known is looked for before it is refused, since it may be new; all who wait for that share one read of
what changed, and reads keep a distance, so that a flood of wrong keys does not reach the database. While the database
is away, keys that are known go on working. For use on one event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, NamedTuple, Protocol, TypeVar

import structlog

from deployments.contracts import KeyInfo, KeyRecord, Limits, TeamRecord
from deployments.meter.errors import LedgerUnavailable, MeterBusy, MeterClosed, MeterError
from deployments.meter.keys.key_store import KeyEntry, KeysChanged, KeyStore
from deployments.meter.keys.keys import key_digest

__all__ = ["KeyDirectory", "KeyState", "Threads"]

log = structlog.get_logger()
T = TypeVar("T")

_REFRESH_S: Final = 1.0
"""With the 2 s for which an ingress remembers a key (deployments/ingress/meter_client.py), a revocation acts after 3 s,
and after 5 s at most where reading takes its time."""
_DISTANCE_S: Final = 0.05
"""Between the beginnings of two reads, whoever asks."""
_READ_LIMIT_S: Final = 5.0
_WRONG_KEY_DELAY_S: Final = 0.25
_MAX_DELAYED: Final = 1000
_MAX_LOOKED_FOR: Final = 4096
"""Unknown keys at a time, also behind a slow database: fewer than make a meter read no more (meter_connection.py)."""

_NO_KEY: Final = key_digest("")
"""Sent for a caller without a key, to learn whether one is required: nothing was guessed."""


class Threads(Protocol):
    """WorkerThreads.run, or what stands in for it."""

    def __call__(self, call: Callable[[], T]) -> Awaitable[T]: ...


class KeyState(NamedTuple):
    record: KeyRecord
    team_limits: Limits | None
    """Of the key's team; None without a team, or without limits of it."""


class KeyDirectory:
    """`start` before use, `close` at the end."""

    def __init__(
        self,
        store: KeyStore,
        in_thread: Threads,
        *,
        admin_digest: bytes,
        require_keys: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        in_thread: runs the blocking reads of `store`; one thread is enough.
        admin_digest: of the admin key (see `key_digest`), which is in no database and has no limits.
        require_keys: False makes everybody but the administrator the same anonymous caller, without limits.
        clock: Unix time in seconds.
        """
        self.wrong_keys = 0
        """Keys that were refused, since the start."""
        self._store = store
        self._in_thread = in_thread
        self._admin_digest = admin_digest
        self._require_keys = require_keys
        self._clock = clock
        self._revision = 0
        self._by_digest: dict[bytes, KeyEntry] = {}
        self._by_id: dict[str, KeyEntry] = {}
        self._teams: dict[str, TeamRecord] = {}
        self._delayed = 0
        self._looked_for = 0
        self._reading = asyncio.Lock()
        self._next_read: asyncio.Task[None] | None = None
        self._reads: set[asyncio.Task[None]] = set()
        self._last_read_s = -_DISTANCE_S
        self._refresher: asyncio.Task[None] | None = None
        self._reachable = True
        self._closed = False

    async def start(self) -> None:
        """Reads all keys and keeps them up to date. A database that is away is logged, and tried again."""
        if self._require_keys:
            await self._try_refresh()
            self._refresher = asyncio.create_task(self._refresh_loop(), name="key-directory")

    async def authenticate(self, digest: bytes) -> KeyInfo | None:
        """Whose key has this SHA-256; None, after a moment, for a key that is unknown, revoked or expired.

        Raises LedgerUnavailable when that cannot be told, MeterBusy when too many unknown keys are looked for.
        """
        if hmac.compare_digest(digest, self._admin_digest):
            return _info(_ADMIN, admin=True)
        if not self._require_keys:
            return _info(_ANONYMOUS, admin=False)
        if digest == _NO_KEY:
            return None
        entry = self._live(self._by_digest.get(digest))
        if entry is None:
            await self._look_for()
            entry = self._live(self._by_digest.get(digest))
        # The dictionary finds it by a randomized hash of a SHA-256: how long that takes tells nothing of a key. Whether
        # it is the right one is decided in a time that does not depend on where the two differ.
        if entry is not None and hmac.compare_digest(digest, entry.digest):
            return _info(entry.record, admin=False)
        self.wrong_keys += 1
        await self._delay()
        return None

    async def find(self, key_id: str) -> KeyState | None:
        """A key that may be used now, by its id; answers without a pause for those that are known.

        Raises LedgerUnavailable when an unknown one cannot be looked for.
        """
        if key_id in (_ADMIN.id, _ANONYMOUS.id):
            return KeyState(_ADMIN if key_id == _ADMIN.id else _ANONYMOUS, None)
        if key_id not in self._by_id:  # its key was shown to another meter, which has read it earlier
            await self.refresh()
        entry = self._live(self._by_id.get(key_id))
        if entry is None:
            return None
        team = None if entry.record.team is None else self._teams.get(entry.record.team)
        return KeyState(entry.record, None if team is None else team.limits)

    async def refresh(self) -> None:
        """Knows all that was committed before the call. Raises LedgerUnavailable, MeterClosed."""
        if self._closed:
            raise MeterClosed("the key directory is closed")
        if self._next_read is None:
            self._next_read = asyncio.create_task(self._read(), name="key-directory-read")
            self._reads.add(self._next_read)
            self._next_read.add_done_callback(self._read_ended)
        reading = self._next_read
        await asyncio.wait({reading})
        if reading.cancelled():
            raise MeterClosed("the key directory is closed")
        if (error := reading.exception()) is not None:
            raise LedgerUnavailable(error.reason if isinstance(error, LedgerUnavailable) else repr(error)) from error

    async def close(self) -> None:
        """Ends all reading; those who wait get MeterClosed. Safe twice, and before `start`."""
        self._closed = True
        tasks = {*self._reads, *(() if self._refresher is None else (self._refresher,))}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- internals ---------------------------------------------------------------------------------------------------

    async def _look_for(self) -> None:
        """`refresh`, for a stranger."""
        if self._looked_for >= _MAX_LOOKED_FOR:
            raise MeterBusy("unknown keys", _MAX_LOOKED_FOR)
        self._looked_for += 1
        try:
            await self.refresh()
        finally:
            self._looked_for -= 1

    async def _read(self) -> None:
        async with self._reading:
            loop = asyncio.get_running_loop()
            await asyncio.sleep(self._last_read_s + _DISTANCE_S - loop.time())
            self._last_read_s = loop.time()
            self._next_read = None  # who asks from here on needs a read that begins later
            try:
                async with asyncio.timeout(_READ_LIMIT_S):
                    changes = await self._in_thread(partial(self._store.changes, self._revision))
            except TimeoutError:
                raise LedgerUnavailable(f"no answer within {_READ_LIMIT_S:g} s") from None
            self._apply(changes)

    def _read_ended(self, read: asyncio.Task[None]) -> None:
        self._reads.discard(read)
        if not read.cancelled():
            read.exception()  # is for those who wait; none may be left, and then nobody else retrieves it

    def _apply(self, changes: KeysChanged) -> None:
        if changes.everything:
            self._by_digest, self._by_id, self._teams = {}, {}, {}
        for entry in changes.keys:
            before = self._by_id.pop(entry.record.id, None)
            if before is not None:
                del self._by_digest[before.digest]
            if entry.record.revoked_at is None:
                self._by_id[entry.record.id] = self._by_digest[entry.digest] = entry
        for name, team in changes.teams.items():
            if team is None:
                self._teams.pop(name, None)
            else:
                self._teams[name] = team
        self._revision = changes.revision

    def _live(self, entry: KeyEntry | None) -> KeyEntry | None:
        if entry is not None and entry.record.expires_at is not None and entry.record.expires_at <= self._clock():
            return None
        return entry

    async def _delay(self) -> None:
        """Makes guessing slow. Beyond the bound it answers at once: what is held back must not fill the memory."""
        if self._delayed >= _MAX_DELAYED:
            return
        self._delayed += 1
        try:
            await asyncio.sleep(_WRONG_KEY_DELAY_S * random.uniform(1.0, 1.5))
        finally:
            self._delayed -= 1

    async def _refresh_loop(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            await self._try_refresh()

    async def _try_refresh(self) -> None:
        try:
            await self.refresh()
        except MeterError as error:
            if self._reachable and not self._closed:
                log.warning("keys not refreshed, those known stay valid", reason=str(error))
            self._reachable = False
        else:
            if not self._reachable:
                log.info("keys refreshed again")
            self._reachable = True


def _built_in(name: str) -> KeyRecord:
    return KeyRecord(name, name, "", None, None, {}, None, Limits(), 0.0, None, None)


_ADMIN: Final = _built_in("admin")
_ANONYMOUS: Final = _built_in("anonymous")


def _info(record: KeyRecord, *, admin: bool) -> KeyInfo:
    return KeyInfo(record.id, record.name, admin, record.team, record.models)
