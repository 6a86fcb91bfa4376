from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from deployments.contracts import Account, Limits, Settlement, SettlementStatus, Witness
from deployments.meter.errors import MeterBusy
from deployments.meter.limits.limits import LimitDemand, LimitState
from deployments.meter.limits.reservation_journal import JournaledReservation, ReservationJournal
from deployments.meter.limits.reservations import Reservation, Reservations, demand_of
from tests.deployments.settlement.rewrites import written

NOW = 1_700_000_000.0
LOST_AFTER_S = 60.0


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[ReservationJournal]:
    with closing(ReservationJournal(tmp_path, 0)) as journal:
        journal.load(NOW)
        yield journal


@pytest.fixture
def reservations(journal: ReservationJournal) -> Reservations:
    return Reservations(journal, capacity=3, lost_after_s=LOST_AFTER_S)


@pytest.fixture
def key() -> LimitState:
    return LimitState("this key", Limits(requests_per_minute=100, tokens_per_minute=1000, concurrency=10))


def account(request_id: str = "cmpl-1", at: float = NOW) -> Account:
    """Of 10 tokens in the prompt and 20 to be generated."""
    return Account(request_id, "key-1", "m", 10, 1, admitted_at=at, started_at=at, reserved_tokens=30)


def reserve(
    reservations: Reservations, key: LimitState, request_id: str = "cmpl-1", at: float = NOW, ingress: str = "ingress-1"
) -> Account:
    reserved = account(request_id, at)
    reservations.reserve(Reservation(reserved, ingress, (key.take(at, demand_of(reserved)),)), at)
    return reserved


def settled(
    request_id: str = "cmpl-1",
    prompt_tokens: int = 10,
    completion_tokens: int = 5,
    *,
    status: SettlementStatus = "finished",
    witness: Witness = "ingress",
    **more: Any,
) -> Settlement:
    return Settlement(
        account(request_id), status, prompt_tokens, 0, completion_tokens, 0, None, 1.0, witness=witness, **more
    )


def used(key: LimitState, now: float = NOW) -> tuple[int, int]:
    """Requests and tokens of the minute."""
    return key.requests.used(now), key.tokens.used(now)


def test_what_is_reserved_is_corrected_to_what_was_used(reservations: Reservations, key: LimitState) -> None:
    reserve(reservations, key)
    assert (len(reservations), used(key)) == (1, (1, 30))
    assert reservations.settle(settled(), NOW + 1.0)
    assert (len(reservations), used(key)) == (0, (1, 15))


def test_the_worst_case_is_priced(reservations: Reservations) -> None:
    priced = Account("cmpl-1", "key-1", "m", 10, 2, reserved_tokens=30, prompt_price=1.0, completion_price=4.0)
    assert demand_of(priced) == LimitDemand(30, (10 * 1.0 + 20 * 4.0) / 1e6)


def test_a_refused_request_gives_back_everything(reservations: Reservations, key: LimitState) -> None:
    reserve(reservations, key)
    reservations.settle(settled(status="refused", prompt_tokens=0, completion_tokens=0), NOW)
    assert used(key) == (0, 0)


def test_a_request_that_used_nothing_has_still_been_one(reservations: Reservations, key: LimitState) -> None:
    reserve(reservations, key)
    reservations.settle(settled(status="cancelled", prompt_tokens=0, completion_tokens=0), NOW)
    assert used(key) == (1, 0)


def test_asking_again_counts_once(reservations: Reservations, key: LimitState) -> None:
    reserve(reservations, key)
    reservations.cancel("cmpl-1")
    assert (len(reservations), used(key)) == (0, (0, 0))
    reserve(reservations, key)
    assert (len(reservations), used(key)) == (1, (1, 30))


@pytest.mark.parametrize(
    "repeated", [settled(), settled(witness="engine", completion_tokens=2), settled(witness="none")]
)
def test_repeated_and_worse_settlements_change_nothing(
    reservations: Reservations, key: LimitState, repeated: Settlement
) -> None:
    reserve(reservations, key)
    reservations.settle(settled(), NOW)
    assert reservations.settle(repeated, NOW + 1.0)
    assert used(key) == (1, 15)


def test_an_engine_ends_a_reservation_once_its_ingress_is_silent(reservations: Reservations, key: LimitState) -> None:
    """Which goes on elsewhere if only a connection broke, and may use all that it reserved."""
    reserve(reservations, key)
    assert not reservations.settle(settled(witness="engine", completion_tokens=2), NOW + 1.0)  # the ledger has it
    reservations.renew("ingress-1", NOW + 5.0)
    assert reservations.abandoned(NOW + 16.9) == []
    assert (len(reservations), used(key, NOW + 16.9)) == (1, (1, 30))
    [abandoned] = reservations.abandoned(NOW + 17.0)
    assert abandoned.account.request_id == "cmpl-1"
    assert (len(reservations), used(key, NOW + 17.0)) == (0, (1, 12))
    assert not reservations.settle(settled(completion_tokens=5), NOW + 18.0)  # it lived: quotas must ask the ledger
    assert used(key, NOW + 18.0) == (1, 15)


def test_an_ingress_that_lives_ends_a_reservation_that_an_engine_has_settled(
    reservations: Reservations, key: LimitState
) -> None:
    reserve(reservations, key)
    reservations.settle(settled(witness="engine", completion_tokens=2), NOW)
    assert reservations.settle(settled(completion_tokens=5), NOW + 1.0)
    assert (len(reservations), used(key)) == (0, (1, 15))
    assert reservations.abandoned(NOW + 1000.0) == []


@pytest.mark.parametrize("late_s", [1.0, 20.0])
def test_what_several_engines_know_adds_up(reservations: Reservations, key: LimitState, late_s: float) -> None:
    reserve(reservations, key)
    reservations.settle(settled(witness="engine", completion_tokens=4, parts={0: 4}), NOW)
    reservations.abandoned(NOW + late_s)
    reservations.settle(settled(witness="engine", completion_tokens=3, parts={1: 3}), NOW + late_s)
    reservations.abandoned(NOW + 20.0)
    assert used(key, NOW + 20.0) == (1, 17)


def test_a_reservation_of_two_attempts_is_one(reservations: Reservations, key: LimitState) -> None:
    """Both were tokenizing at the same time."""
    reserve(reservations, key)
    reservations.cancel("cmpl-1")
    reserve(reservations, key)
    reservations.settle(settled(), NOW)
    assert (len(reservations), used(key)) == (0, (1, 15))


def test_what_was_given_up_before_it_was_admitted_leaves_quotas_alone(reservations: Reservations) -> None:
    never = Settlement(Account("cmpl-9", "key-1", "m", 0, 0), "cancelled", 0, 0, 0, 0, None, 1.0)
    assert reservations.settle(never, NOW)


def test_an_unknown_settlement_is_remembered_for_a_minute(reservations: Reservations) -> None:
    assert not reservations.settle(settled("cmpl-2"), NOW)
    assert reservations.settle(settled("cmpl-2"), NOW)
    assert reservations.is_settled("cmpl-2")
    reservations.settle(settled("cmpl-3"), NOW + 60.0)
    assert not reservations.is_settled("cmpl-2")


def test_a_full_table_takes_no_more_until_one_is_settled(reservations: Reservations, key: LimitState) -> None:
    for number in range(3):
        reservations.ensure_room()
        reserve(reservations, key, f"cmpl-{number}")
    with pytest.raises(MeterBusy, match="open reservations: full at 3"):
        reservations.ensure_room()
    reservations.settle(settled("cmpl-1"), NOW)
    reservations.ensure_room()


def test_what_the_ledger_has_already_is_closed_as_reserved(reservations: Reservations, key: LimitState) -> None:
    reserve(reservations, key)
    reserve(reservations, key, "cmpl-2")
    assert [each.account.request_id for each in reservations.close_recorded(["cmpl-2", "cmpl-9"])] == ["cmpl-2"]
    assert (len(reservations), used(key)) == (1, (2, 60))


# --- leases ----------------------------------------------------------------------------------------------------------


def lost(reservations: Reservations, begin: int, end: int) -> list[tuple[int, str]]:
    """Which are lost when, in seconds from NOW, if they are looked for every second."""
    found = []
    for second in range(begin, end + 1):
        for reservation in reservations.lost(NOW + second):
            found.append((second, reservation.account.request_id))
            reservations.settle(
                settled(reservation.account.request_id, 0, 0, status="lost", witness="none"), NOW + second
            )
    return found


def test_a_reservation_is_lost_when_its_ingress_was_not_heard_of_for_long(
    reservations: Reservations, key: LimitState
) -> None:
    reserve(reservations, key, "gone", ingress="ingress-1")
    reserve(reservations, key, "alive", ingress="ingress-2")
    assert lost(reservations, 0, 30) == []
    reservations.renew("ingress-2", NOW + 30.0)
    assert lost(reservations, 31, 70) == [(60, "gone")]
    assert used(key, NOW + 59.0) == (2, 30)


def test_an_ingress_that_lives_keeps_its_reservations_however_long(reservations: Reservations, key: LimitState) -> None:
    reserve(reservations, key)
    for second in range(0, 10_000, 50):
        reservations.renew("ingress-1", NOW + second)
        assert lost(reservations, second, second + 49) == []


def test_an_admission_renews_the_lease(reservations: Reservations, key: LimitState) -> None:
    reserve(reservations, key)
    reserve(reservations, key, "cmpl-2", NOW + 40.0)
    assert lost(reservations, 0, 99) == []
    assert lost(reservations, 100, 100) == [(100, "cmpl-1"), (100, "cmpl-2")]


def test_a_meter_that_was_away_itself_waits_for_the_ingresses_again(
    reservations: Reservations, key: LimitState
) -> None:
    reserve(reservations, key)
    assert lost(reservations, 0, 10) == []
    assert lost(reservations, 500, 559) == []
    assert lost(reservations, 560, 560) == [(560, "cmpl-1")]


def test_a_restored_reservation_begins_its_lease_anew(reservations: Reservations, key: LimitState) -> None:
    old = account(at=NOW - 1000.0)
    reservations.restore(Reservation(old, "ingress-1", (key.take(NOW - 1000.0, demand_of(old)),)), NOW)
    assert lost(reservations, 0, 60) == [(60, "cmpl-1")]


# --- the journal -----------------------------------------------------------------------------------------------------


def test_the_journal_tells_the_same(tmp_path: Path, key: LimitState) -> None:
    with closing(ReservationJournal(tmp_path, 0)) as journal:
        journal.load(NOW)
        reservations = Reservations(journal)
        accounts = [reserve(reservations, key, f"cmpl-{number}") for number in range(4)]
        reservations.settle(settled("cmpl-1"), NOW)
        reservations.cancel("cmpl-2")
        reservations.settle(settled("cmpl-3", completion_tokens=2, witness="engine"), NOW)
        reservations.abandoned(NOW + 20.0)
        reservations.settle(settled("cmpl-3"), NOW + 20.0)
        reservations.flush(NOW)
    with closing(ReservationJournal(tmp_path, 0)) as journal:
        assert journal.load(NOW) == [
            JournaledReservation(accounts[0], "ingress-1", None, True),
            JournaledReservation(accounts[1], "ingress-1", 15, True),
            JournaledReservation(accounts[2], "ingress-1", 0, False),
            JournaledReservation(accounts[3], "ingress-1", 15, True),
        ]


def test_the_journal_never_grows_beyond_what_is_open_and_two_minutes(tmp_path: Path, key: LimitState) -> None:
    with closing(ReservationJournal(tmp_path, 0, full_bytes=10_000)) as journal:
        journal.load(NOW)
        reservations = Reservations(journal)
        open_for_long = reserve(reservations, key, "open")
        for second in range(1, 1000):
            reserve(reservations, key, f"cmpl-{second}", NOW + second)
            reservations.settle(settled(f"cmpl-{second}"), NOW + second)
            reservations.flush(NOW + second)
            written(journal._rotation)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 40_000
    with closing(ReservationJournal(tmp_path, 0)) as journal:
        told = journal.load(NOW + 999.0)
    assert told[0] == JournaledReservation(open_for_long, "ingress-1", None, True)
    assert [each.account.request_id for each in told[1:]] == [f"cmpl-{second}" for second in range(940, 1000)]
