"""Keys and teams in the database: what is stored, what is refused, and that writers do not trip over each other."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from deployments.contracts import (
    AdministrationAnswer,
    CreateKey,
    GetKey,
    KeyChanges,
    KeyDraft,
    Limits,
    ListKeys,
    ListTeams,
    RemoveTeam,
    RevokeKey,
    RotateKey,
    SetTeam,
    UpdateKey,
    pack,
    unpack,
    unpack_command,
)
from deployments.meter.errors import InvalidValue, KeyNotFound, KeyRevoked, LedgerUnavailable, TeamNotFound
from deployments.meter.keys.administration import administer
from deployments.meter.keys.key_store import KeyStore
from deployments.meter.keys.keys import key_digest
from deployments.meter.ledger.database import open_database
from deployments.meter.ledger.schema import KEYS

NOW_AT = 1_800_000_000.0


@pytest.fixture
def store(engine: sa.Engine) -> KeyStore:
    return KeyStore(engine, clock=lambda: NOW_AT)


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_stored_with_all_that_was_said_of_it(store: KeyStore) -> None:
    limits = Limits(requests_per_minute=60, money_per_month=12.5)
    record, secret = store.create(
        KeyDraft("chat", "ana", "research", {"stage": "prod"}, ("a", "b"), limits, expires_at=NOW_AT + 1)
    )
    assert (record.name, record.owner, record.team, record.labels) == ("chat", "ana", "research", {"stage": "prod"})
    assert (record.models, record.limits) == (("a", "b"), limits)
    assert (record.created_at, record.expires_at, record.revoked_at) == (NOW_AT, NOW_AT + 1, None)
    assert record.id.startswith("key-")
    assert len(record.id) == 20
    assert secret.startswith("sk-ms-")
    assert record.prefix == secret[:12]
    assert store.get(record.id) == record


def test_a_key_without_anything_is_unlimited(store: KeyStore) -> None:
    record, _ = store.create(KeyDraft("plain"))
    assert (record.limits, record.models, record.expires_at, record.labels) == (Limits(), None, None, {})


def test_the_database_never_holds_a_key(store: KeyStore, engine: sa.Engine) -> None:
    record, first = store.create(KeyDraft("k"))
    _, second = store.rotate(record.id)
    with engine.connect() as connection:
        [row] = connection.execute(sa.select(KEYS)).mappings()
    stored = repr(dict(row))
    assert row["digest"] == key_digest(second)
    assert second[:12] in stored
    for secret in (first, second):
        assert secret[13:] not in stored


def test_changes_leave_alone_what_they_do_not_name(store: KeyStore) -> None:
    draft = KeyDraft("k", "ana", "t", {"a": "b"}, ("m",), Limits(concurrency=2, tokens_per_day=9), NOW_AT + 9)
    record, _ = store.create(draft)
    after = store.update(record.id, KeyChanges(name="new", limits={"tokens_per_day": None, "money_per_day": 1}))
    assert after.name == "new"
    assert after.limits == Limits(concurrency=2, money_per_day=1)
    assert (after.owner, after.team, after.labels, after.models) == ("ana", "t", {"a": "b"}, ("m",))
    after = store.update(record.id, KeyChanges(owner=None, team=None, labels={}, models=None, expires_at=None))
    assert (after.owner, after.team, after.labels, after.models, after.expires_at) == (None, None, {}, None, None)
    assert store.get(record.id) == after


def test_a_rotated_key_keeps_its_id_and_loses_its_old_secret(store: KeyStore) -> None:
    record, old = store.create(KeyDraft("k"))
    rotated, new = store.rotate(record.id)
    assert rotated.id == record.id
    assert (rotated.prefix, old != new) == (new[:12], True)
    [entry] = store.changes(0).keys
    assert entry.digest == key_digest(new)


def test_a_revoked_key_stays_as_it_is(store: KeyStore) -> None:
    record, _ = store.create(KeyDraft("k"))
    revoked = store.revoke(record.id)
    assert revoked.revoked_at == NOW_AT
    revision = store.changes(0).revision
    assert store.revoke(record.id) == revoked
    assert store.changes(revision).keys == []
    with pytest.raises(KeyRevoked, match=record.id):
        store.rotate(record.id)
    with pytest.raises(KeyRevoked, match=record.id):
        store.update(record.id, KeyChanges(name="new"))
    assert store.get(record.id) == revoked


def test_keys_are_listed_by_age_live_ones_unless_asked_otherwise(engine: sa.Engine) -> None:
    times = iter([5.0, 3.0, 4.0, 6.0])
    store = KeyStore(engine, clock=lambda: next(times))
    late, early, other = (
        store.create(KeyDraft(name, team=team))[0] for name, team in (("l", "t"), ("e", "t"), ("o", None))
    )
    store.revoke(early.id)
    assert [key.id for key in store.list_keys()] == [other.id, late.id]
    assert [key.id for key in store.list_keys(include_revoked=True)] == [early.id, other.id, late.id]
    assert [key.id for key in store.list_keys(team="t")] == [late.id]
    assert [key.id for key in store.list_keys(team="t", include_revoked=True)] == [early.id, late.id]


@pytest.mark.parametrize("call", [KeyStore.get, KeyStore.rotate, KeyStore.revoke])
@pytest.mark.parametrize("key_id", ["key-none", "", "\x00"])
def test_an_unknown_key_is_told(store: KeyStore, call: Callable[[KeyStore, str], object], key_id: str) -> None:
    with pytest.raises(KeyNotFound) as caught:
        call(store, key_id)
    assert caught.value.key_id == key_id


def test_a_team_that_cannot_be_is_refused_by_name(store: KeyStore) -> None:
    for field, call in (
        ("team", lambda: store.list_keys(team="\x00")),
        ("name", lambda: store.set_team("a/b", Limits())),
        ("name", lambda: store.remove_team("")),
    ):
        with pytest.raises(InvalidValue) as caught:
            call()
        assert caught.value.field == field


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"name": ""}, "name", "1 to 100 printable"),
        ({"name": "x" * 101}, "name", "1 to 100 printable"),
        ({"name": "a\nb"}, "name", "1 to 100 printable"),
        ({"name": "a\x00"}, "name", "1 to 100 printable"),
        ({"owner": ""}, "owner", "printable"),
        ({"team": "a/b"}, "team", "A-Z"),
        ({"team": ""}, "team", "A-Z"),
        ({"labels": {"a": ""}}, "labels.a", "printable"),
        ({"labels": {"": "a"}}, "labels", "printable"),
        ({"labels": {str(n): "a" for n in range(33)}}, "labels", "at most 32"),
        ({"models": ()}, "models", "leave it out"),
        ({"models": ("a", "")}, "models.1", "printable"),
        ({"expires_at": NOW_AT}, "expires_at", "in the future"),
        ({"expires_at": math.nan}, "expires_at", "in the future"),
        ({"expires_at": 1e300}, "expires_at", "year 10000"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(
    store: KeyStore, changes: dict[str, Any], field: str, expected: str
) -> None:
    record, _ = store.create(KeyDraft("k"))
    for attempt in (
        lambda: store.create(KeyDraft(**{"name": "k", **changes})),
        lambda: store.update(record.id, KeyChanges(**changes)),
    ):
        with pytest.raises(InvalidValue) as caught:
            attempt()
        assert caught.value.field == field
        assert expected in caught.value.expected
        assert str(caught.value).startswith(f"{field}: got ")
    assert store.list_keys() == [record]


@pytest.mark.parametrize("value", [0, -1, 0.0, math.inf, math.nan, 2**53, True])
@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute", "concurrency", "tokens_per_day"])
def test_limits_that_cannot_be_are_refused_by_name(store: KeyStore, name: str, value: Any) -> None:
    assert_limit_refused(store, name, value)


@pytest.mark.parametrize("value", [0, -0.5, math.inf, math.nan])
@pytest.mark.parametrize("name", ["money_per_day", "money_per_month"])
def test_amounts_that_cannot_be_are_refused_by_name(store: KeyStore, name: str, value: float) -> None:
    assert_limit_refused(store, name, value)


def assert_limit_refused(store: KeyStore, name: str, value: Any) -> None:
    record, _ = store.create(KeyDraft("k"))
    for attempt in (
        lambda: store.create(KeyDraft("k", limits=Limits(**{name: value}))),
        lambda: store.update(record.id, KeyChanges(limits={name: value})),
        lambda: store.set_team("t", Limits(**{name: value})),
    ):
        with pytest.raises(InvalidValue, match=f"limits.{name}: got .*, expected"):
            attempt()


def test_an_unknown_limit_is_refused_by_name(store: KeyStore) -> None:
    record, _ = store.create(KeyDraft("k"))
    with pytest.raises(InvalidValue, match=r"limits\.tokens_per_week"):
        store.update(record.id, KeyChanges(limits={"tokens_per_week": 1}))


def test_an_expired_key_can_be_renamed(engine: sa.Engine) -> None:
    record, _ = KeyStore(engine, clock=lambda: NOW_AT).create(KeyDraft("k", expires_at=NOW_AT + 1))
    assert KeyStore(engine, clock=lambda: NOW_AT + 2).update(record.id, KeyChanges(name="new")).name == "new"


# --- teams -----------------------------------------------------------------------------------------------------------


def test_a_team_is_set_replaced_listed_and_removed(store: KeyStore) -> None:
    team = store.set_team("b", Limits(concurrency=1))
    store.set_team("a", Limits())
    assert [each.name for each in store.list_teams()] == ["a", "b"]
    replaced = store.set_team("b", Limits(tokens_per_minute=5))
    assert (replaced.limits, replaced.created_at) == (Limits(tokens_per_minute=5), team.created_at)
    assert store.remove_team("b") == replaced
    assert [each.name for each in store.list_teams()] == ["a"]
    with pytest.raises(TeamNotFound, match="b"):
        store.remove_team("b")
    store.set_team("b", Limits(concurrency=3))
    assert store.list_teams()[1].limits == Limits(concurrency=3)


# --- what meters follow ----------------------------------------------------------------------------------------------


def test_changes_tell_what_is_new_since_a_revision(store: KeyStore) -> None:
    first, _ = store.create(KeyDraft("a"))
    store.set_team("t", Limits(concurrency=1))
    start = store.changes(0)
    assert [entry.record.id for entry in start.keys] == [first.id]
    assert [*start.teams] == ["t"]
    assert store.changes(start.revision).keys == []
    second, _ = store.create(KeyDraft("b"))
    store.revoke(first.id)
    store.remove_team("t")
    later = store.changes(start.revision)
    assert {entry.record.id: entry.record.revoked_at for entry in later.keys} == {first.id: NOW_AT, second.id: None}
    assert later.teams == {"t": None}
    assert later.everything is False
    assert store.changes(later.revision) == (later.revision, [], {}, False)


def test_a_refused_change_is_no_change(store: KeyStore) -> None:
    record, _ = store.create(KeyDraft("a"))
    revision = store.changes(0).revision
    with pytest.raises(InvalidValue):
        store.update(record.id, KeyChanges(limits={"concurrency": 0}))
    with pytest.raises(KeyNotFound):
        store.revoke("key-none")
    assert store.changes(0).revision == revision


def test_a_database_that_is_older_than_the_reader_is_read_whole(store: KeyStore) -> None:
    store.create(KeyDraft("a"))
    changes = store.changes(1000)
    assert changes.everything
    assert [entry.record.name for entry in changes.keys] == ["a"]


def test_writers_wait_for_each_other(database_url: str, engine: sa.Engine) -> None:
    """Each with an engine of its own, as the command line beside the meters has."""
    failures: list[Exception] = []
    together = threading.Barrier(4)

    def write(number: int) -> None:
        own = open_database(database_url)
        try:
            store = KeyStore(own)
            together.wait(timeout=20)
            for _ in range(10):
                record, _ = store.create(KeyDraft(f"k{number}"))
                store.rotate(record.id)
                store.set_team("shared", Limits(concurrency=number + 1))
        except Exception as error:
            failures.append(error)
        finally:
            own.dispose()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    changes = KeyStore(engine).changes(0)
    assert len(changes.keys) == 40
    assert changes.revision == 120


def test_a_database_without_tables_is_unavailable(bare_database_url: str) -> None:
    engine = open_database(bare_database_url)
    store = KeyStore(engine)
    for call in (lambda: store.changes(0), store.list_keys, store.list_teams, lambda: store.create(KeyDraft("k"))):
        with pytest.raises(LedgerUnavailable, match=r"no such table|does not exist"):
            call()
    engine.dispose()


# --- administration --------------------------------------------------------------------------------------------------


def asked(store: KeyStore, command: Any) -> AdministrationAnswer:
    """As it goes over the wire."""
    return unpack(pack(administer(store, unpack_command(pack(command)))), AdministrationAnswer)


def test_commands_do_what_they_say(store: KeyStore) -> None:
    made = asked(store, CreateKey(KeyDraft("k", team="t", limits=Limits(money_per_day=0.5))))
    [record] = made.keys
    assert made.secret is not None
    assert asked(store, GetKey(record.id)) == AdministrationAnswer(keys=(record,))
    updated = asked(store, UpdateKey(record.id, KeyChanges(limits={"concurrency": 2}, models=("m",))))
    assert updated.keys[0].limits == Limits(money_per_day=0.5, concurrency=2)
    assert updated.secret is None
    rotated = asked(store, RotateKey(record.id))
    assert rotated.secret not in (None, made.secret)
    assert asked(store, ListKeys()).keys == rotated.keys
    assert asked(store, ListKeys(team="other")).keys == ()
    assert asked(store, RevokeKey(record.id)).keys[0].revoked_at == NOW_AT
    assert asked(store, ListKeys()).keys == ()
    assert len(asked(store, ListKeys(include_revoked=True)).keys) == 1
    team = asked(store, SetTeam("t", Limits(concurrency=1)))
    assert asked(store, ListTeams()) == team
    assert asked(store, RemoveTeam("t")) == team
    assert asked(store, ListTeams()) == AdministrationAnswer()


def test_mistakes_are_answers(store: KeyStore) -> None:
    [revoked] = asked(store, CreateKey(KeyDraft("k"))).keys
    asked(store, RevokeKey(revoked.id))
    for command, code, param in (
        (CreateKey(KeyDraft("")), "invalid", "name"),
        (UpdateKey(revoked.id, KeyChanges(limits={"concurrency": 0})), "conflict", None),
        (SetTeam("t", Limits(money_per_day=-1)), "invalid", "limits.money_per_day"),
        (GetKey("key-none"), "not_found", None),
        (RemoveTeam("none"), "not_found", None),
        (RotateKey(revoked.id), "conflict", None),
    ):
        answer = asked(store, command)
        assert answer.error is not None
        assert (answer.error.code, answer.error.param) == (code, param)
        assert (answer.keys, answer.secret) == ((), None)


def test_errors_survive_a_process_boundary() -> None:
    for error in (InvalidValue("name", "", "text"), KeyNotFound("k"), KeyRevoked("k"), TeamNotFound("t")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
