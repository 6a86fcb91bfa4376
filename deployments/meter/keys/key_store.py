"""Keys and teams in the database, which the command line and the meters share.

Apart from the ledger because it changes rarely and by hand. Each change counts up schema.REVISIONS before anything else
in its transaction, so that in PostgreSQL, too, one change waits for another: they become visible in the order of their
revisions.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import msgspec
import sqlalchemy as sa

from deployments.contracts import KeyChanges, KeyDraft, KeyRecord, Limits, TeamRecord
from deployments.meter.errors import KeyNotFound, KeyRevoked, LedgerUnavailable, TeamNotFound
from deployments.meter.keys.key_values import changed, check_key, check_team, check_team_name
from deployments.meter.keys.keys import key_digest, new_key
from deployments.meter.ledger.database import reason, writing
from deployments.meter.ledger.schema import KEYS, REVISIONS, TEAMS

__all__ = ["KeyEntry", "KeyStore", "KeyWithSecret", "KeysChanged"]

_PREFIX_LENGTH: Final = 12


class KeyWithSecret(NamedTuple):
    record: KeyRecord
    secret: str
    """The key itself, which is not kept anywhere."""


class KeyEntry(NamedTuple):
    digest: bytes
    record: KeyRecord


class KeysChanged(NamedTuple):
    """What is different since a revision."""

    revision: int
    """Everything up to here is included, perhaps more."""
    keys: list[KeyEntry]
    """As they are now, revoked ones too."""
    teams: dict[str, TeamRecord | None]
    """By name; None for those that are removed."""
    everything: bool
    """These are all keys and teams there are: the database is older than the revision, a backup perhaps."""


class KeyStore:
    """Blocking; for any thread. Every method raises LedgerUnavailable when the database fails.

    `clock` gives Unix time in seconds.
    """

    def __init__(self, engine: sa.Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    # --- keys --------------------------------------------------------------------------------------------------------

    def create(self, draft: KeyDraft) -> KeyWithSecret:
        """Raises InvalidValue. A team need not have limits, and names need not be unique."""
        now_at = self._clock()
        check_key(draft, now_at)
        secret = new_key()
        values = {
            "id": f"key-{secrets.token_hex(8)}",
            "name": draft.name,
            "owner": draft.owner,
            "team": draft.team,
            "labels": _json(draft.labels),
            "models": None if draft.models is None else _json(draft.models),
            "limits": _json(draft.limits),
            "created_at": now_at,
            "expires_at": draft.expires_at,
            "revoked_at": None,
            **_identity(secret),
        }
        with self._changing() as (connection, revision):
            connection.execute(sa.insert(KEYS).values(values | {"revision": revision}))
            return KeyWithSecret(_get(connection, values["id"]), secret)

    def get(self, key_id: str) -> KeyRecord:
        """Raises KeyNotFound."""
        with self._reading() as connection:
            return _get(connection, key_id)

    def list_keys(self, *, team: str | None = None, include_revoked: bool = False) -> list[KeyRecord]:
        """The oldest first; of `team` if one is given. Raises InvalidValue."""
        query = sa.select(KEYS).order_by(KEYS.c.created_at, KEYS.c.id)
        if team is not None:
            check_team_name("team", team)
            query = query.where(KEYS.c.team == team)
        if not include_revoked:
            query = query.where(KEYS.c.revoked_at.is_(None))
        with self._reading() as connection:
            return [_record(row) for row in connection.execute(query)]

    def update(self, key_id: str, changes: KeyChanges) -> KeyRecord:
        """Raises InvalidValue, KeyNotFound, KeyRevoked."""
        check_key(changes, self._clock())
        values: dict[str, Any] = {
            name: value
            for name, value in msgspec.structs.asdict(changes).items()
            if value is not msgspec.UNSET and name != "limits"
        }
        for name in ("labels", "models"):
            if values.get(name) is not None:
                values[name] = _json(values[name])
        with self._changing() as (connection, revision):
            before = _get_live(connection, key_id)
            if not isinstance(changes.limits, msgspec.UnsetType):
                values["limits"] = _json(changed(before.limits, changes.limits))
            return _set(connection, key_id, revision, values)

    def rotate(self, key_id: str) -> KeyWithSecret:
        """The same key with another secret; the old one stops working. Raises KeyNotFound, KeyRevoked."""
        secret = new_key()
        with self._changing() as (connection, revision):
            _get_live(connection, key_id)
            return KeyWithSecret(_set(connection, key_id, revision, _identity(secret)), secret)

    def revoke(self, key_id: str) -> KeyRecord:
        """Ends a key for good; one that is revoked stays as it is. Raises KeyNotFound."""
        with self._changing() as (connection, revision):
            before = _get(connection, key_id)
            if before.revoked_at is not None:
                return before
            return _set(connection, key_id, revision, {"revoked_at": self._clock()})

    # --- teams -------------------------------------------------------------------------------------------------------

    def set_team(self, name: str, limits: Limits) -> TeamRecord:
        """Makes a team, or replaces its limits. Raises InvalidValue."""
        check_team(name, limits)
        with self._changing() as (connection, revision):
            row = connection.execute(sa.select(TEAMS).where(TEAMS.c.name == name)).one_or_none()
            created_at = self._clock() if row is None or row.removed_at is not None else row.created_at
            values = {"limits": _json(limits), "created_at": created_at, "removed_at": None, "revision": revision}
            if row is None:
                connection.execute(sa.insert(TEAMS).values(name=name, **values))
            else:
                connection.execute(sa.update(TEAMS).where(TEAMS.c.name == name).values(values))
            return TeamRecord(name, limits, created_at)

    def list_teams(self) -> list[TeamRecord]:
        """By name."""
        with self._reading() as connection:
            rows = connection.execute(sa.select(TEAMS).where(TEAMS.c.removed_at.is_(None)).order_by(TEAMS.c.name))
            return [_team(row) for row in rows]

    def remove_team(self, name: str) -> TeamRecord:
        """Lifts the limits of a team; its keys keep its name. Raises InvalidValue, TeamNotFound."""
        check_team_name("name", name)
        with self._changing() as (connection, revision):
            there = sa.and_(TEAMS.c.name == name, TEAMS.c.removed_at.is_(None))
            row = connection.execute(sa.select(TEAMS).where(there)).one_or_none()
            if row is None:
                raise TeamNotFound(name)
            connection.execute(sa.update(TEAMS).where(there).values(removed_at=self._clock(), revision=revision))
            return _team(row)

    # --- what meters follow ------------------------------------------------------------------------------------------

    def changes(self, since: int) -> KeysChanged:
        """What changed after the revision `since`; 0 gives everything."""
        with self._reading() as connection:
            # Before the rows: what commits in between has a later revision, and is read again the next time.
            revision: int = connection.execute(sa.select(REVISIONS.c.revision)).scalar_one()
            if revision == since:
                return KeysChanged(revision, [], {}, everything=False)
            everything = revision < since
            if everything:
                since = 0
            keys = connection.execute(sa.select(KEYS).where(KEYS.c.revision > since)).all()
            teams = connection.execute(sa.select(TEAMS).where(TEAMS.c.revision > since)).all()
        return KeysChanged(
            revision,
            [KeyEntry(row.digest, _record(row)) for row in keys],
            {row.name: _team(row) if row.removed_at is None else None for row in teams},
            everything,
        )

    # --- internals ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except sa.exc.SQLAlchemyError as error:
            raise LedgerUnavailable(reason(error)) from error

    @contextmanager
    def _changing(self) -> Iterator[tuple[sa.Connection, int]]:
        """A transaction and its revision."""
        count_up = sa.update(REVISIONS).values(revision=REVISIONS.c.revision + 1).returning(REVISIONS.c.revision)
        try:
            with writing(self._engine) as connection:
                yield connection, connection.execute(count_up).scalar_one()
        except sa.exc.SQLAlchemyError as error:
            raise LedgerUnavailable(reason(error)) from error


def _identity(secret: str) -> dict[str, Any]:
    return {"digest": key_digest(secret), "prefix": secret[:_PREFIX_LENGTH]}


def _get(connection: sa.Connection, key_id: str) -> KeyRecord:
    if not key_id.isprintable():  # PostgreSQL would refuse a NUL
        raise KeyNotFound(key_id)
    row = connection.execute(sa.select(KEYS).where(KEYS.c.id == key_id)).one_or_none()
    if row is None:
        raise KeyNotFound(key_id)
    return _record(row)


def _get_live(connection: sa.Connection, key_id: str) -> KeyRecord:
    record = _get(connection, key_id)
    if record.revoked_at is not None:
        raise KeyRevoked(key_id)
    return record


def _set(connection: sa.Connection, key_id: str, revision: int, values: dict[str, Any]) -> KeyRecord:
    connection.execute(sa.update(KEYS).where(KEYS.c.id == key_id).values(values | {"revision": revision}))
    return _get(connection, key_id)


def _record(row: sa.Row[Any]) -> KeyRecord:
    return KeyRecord(
        id=row.id,
        name=row.name,
        prefix=row.prefix,
        owner=row.owner,
        team=row.team,
        labels=msgspec.json.decode(row.labels, type=dict[str, str]),
        models=None if row.models is None else msgspec.json.decode(row.models, type=tuple[str, ...]),
        limits=msgspec.json.decode(row.limits, type=Limits),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )


def _team(row: sa.Row[Any]) -> TeamRecord:
    return TeamRecord(row.name, msgspec.json.decode(row.limits, type=Limits), row.created_at)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
