from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from deployments.contracts import Account
from deployments.meter.limits.reservation_journal import JournaledReservation, ReservationJournal
from deployments.settlement.record_file import framed
from tests.deployments.settlement.rewrites import written

NOW = 1_700_000_000.0


def account(request_id: str, admitted_at: float = NOW) -> Account:
    return Account(request_id, "key-1", "m", 10, 1, team="mill", admitted_at=admitted_at, reserved_tokens=30)


@contextmanager
def opened(folder: Path, shard: int = 0, shards: int = 1, full_bytes: int = 2**20) -> Iterator[ReservationJournal]:
    """Closed at the end, unless the process that it stands for is `killed`."""
    with closing(ReservationJournal(folder, shard, shards, full_bytes=full_bytes)) as journal:
        yield journal


def left(folder: Path, now: float = NOW, shard: int = 0, shards: int = 1) -> list[JournaledReservation]:
    with opened(folder, shard, shards) as journal:
        return journal.load(now)


def test_a_successor_knows_what_is_open_and_what_the_last_minute_used(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        assert journal.load(NOW) == []
        for request_id in ("open", "used", "given up"):
            journal.reserved(account(request_id), "ingress-1")
        journal.closed("used", 17)
        journal.closed("given up", 0, admitted=False)
        journal.closed("never seen", 5)
    assert left(tmp_path, NOW + 59.9) == [
        JournaledReservation(account("open"), "ingress-1", None, True),
        JournaledReservation(account("used"), "ingress-1", 17, True),
        JournaledReservation(account("given up"), "ingress-1", 0, False),
    ]
    assert [each.account.request_id for each in left(tmp_path, NOW + 60.0)] == ["open"]


def test_the_last_word_on_a_request_holds(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        journal.load(NOW)
        journal.reserved(account("cmpl-1"), "ingress-1")
        journal.closed("cmpl-1", 0, admitted=False)
        journal.reserved(account("cmpl-1", NOW + 1.0), "ingress-2")  # it asked again
        journal.closed("cmpl-1", 12)
        journal.closed("cmpl-1", 14)  # a better witness
    assert left(tmp_path) == [JournaledReservation(account("cmpl-1", NOW + 1.0), "ingress-2", 14, True)]


def test_nothing_is_written_before_the_flush_and_all_of_it_then(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        journal.load(NOW)
        for number in range(100):
            journal.reserved(account(f"cmpl-{number}"), "ingress-1")
        file = tmp_path / "reservations-0.journal"
        assert file.stat().st_size == 0
        journal.flush()
        size = file.stat().st_size
        assert size > 0
        journal.flush()
        assert file.stat().st_size == size


def test_a_killed_process_leaves_what_it_flushed(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from tests.deployments.meter.limits.test_reservation_journal import account, ReservationJournal
journal = ReservationJournal(Path({str(tmp_path)!r}), 0)
journal.load({NOW})
journal.reserved(account("cmpl-1"), "ingress-1")
journal.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[4], check=False)
    assert killed.returncode == -9
    assert [each.account.request_id for each in left(tmp_path)] == ["cmpl-1"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.data())
def test_a_torn_end_is_cut_off_wherever_it_is_torn(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "reservations-0.journal"
    file.unlink(missing_ok=True)
    with opened(tmp_path) as journal:
        journal.load(NOW)
        for request_id in ("first", "second"):
            journal.reserved(account(request_id), "ingress-1")
    whole = file.read_bytes()
    first_bytes = len(whole) // 2  # their names differ in length by one
    kept = data.draw(st.integers(0, len(whole) - 1))
    file.write_bytes(whole[:kept])
    with opened(tmp_path) as journal:
        assert [each.account.request_id for each in journal.load(NOW)] == (["first"] if kept >= first_bytes else [])
        journal.reserved(account("after"), "ingress-1")
    assert left(tmp_path)[-1].account.request_id == "after"


def test_a_full_file_makes_way_for_one_with_the_open_reservations(tmp_path: Path) -> None:
    with opened(tmp_path, full_bytes=2000) as journal:
        journal.load(NOW)
        journal.reserved(account("open", NOW - 1000.0), "ingress-1")
        journal.reserved(account("late", NOW + 55.0), "ingress-1")
        for number in range(100):
            journal.reserved(account(f"cmpl-{number}"), "ingress-1")
            journal.closed(f"cmpl-{number}", 1)
        journal.flush()
        assert not journal.is_full(NOW + 59.0)  # what it had found has not left the minute yet
        assert journal.is_full(NOW + 60.0)
        journal.rotate(
            NOW + 60.0, [(account("open", NOW - 1000.0), "ingress-1"), (account("late", NOW + 55.0), "ingress-1")]
        )
        written(journal._rotation)
        journal.closed("late", 7)
        journal.reserved(account("next", NOW + 61.0), "ingress-1")
        journal.flush()
        assert (tmp_path / "reservations-0.journal").stat().st_size < 2000
    told = left(tmp_path, NOW + 62.0)
    assert [(each.account.request_id, each.used_tokens) for each in told] == [
        ("open", None),
        ("late", 7),
        ("next", None),
    ]


def test_what_was_settled_before_the_file_changed_still_counts_for_its_minute(tmp_path: Path) -> None:
    with opened(tmp_path, full_bytes=0) as journal:
        journal.load(NOW - 60.0)
        journal.reserved(account("cmpl-1"), "ingress-1")
        journal.closed("cmpl-1", 12)
        journal.flush()
        assert journal.is_full(NOW)
        journal.rotate(NOW, [])
        written(journal._rotation)
        journal.flush()
        assert (tmp_path / "reservations-0.previous").exists()
    assert [each.used_tokens for each in left(tmp_path, NOW + 59.0)] == [12]


def test_two_processes_never_have_one_journal(tmp_path: Path) -> None:
    with opened(tmp_path, full_bytes=0) as journal:
        journal.load(NOW)
        with pytest.raises(BlockingIOError):
            ReservationJournal(tmp_path, 0)
        journal.reserved(account("cmpl-1"), "ingress-1")
        journal.flush()
        journal.rotate(NOW + 60.0, [])
        written(journal._rotation)
        journal.flush()
        assert (tmp_path / "reservations-0.previous").exists()
        with pytest.raises(BlockingIOError):
            ReservationJournal(tmp_path, 0)
        with opened(tmp_path, 1, 2) as other:
            assert other.load(NOW) == []
    with opened(tmp_path):
        pass


def test_the_first_meter_recovers_what_meters_that_are_no_more_have_left(tmp_path: Path) -> None:
    for shard in range(4):
        with opened(tmp_path, shard, 4) as journal:
            journal.load(NOW)
            journal.reserved(account(f"cmpl-{shard}", NOW + shard), "ingress-1")
            journal.reserved(account(f"used-{shard}", NOW + shard), "ingress-1")
            journal.closed(f"used-{shard}", 5)
    with opened(tmp_path, 3, 4):  # it is still about to stop
        assert [each.account.request_id for each in left(tmp_path, NOW, shard=1, shards=2)] == ["cmpl-1", "used-1"]
        expected = ["cmpl-0", "used-0", "cmpl-2", "used-2"]
        assert [each.account.request_id for each in left(tmp_path, shards=2)] == expected
    told = [(each.account.request_id, each.used_tokens) for each in left(tmp_path, shards=2)]
    assert told == [("cmpl-0", None), ("used-0", 5), ("cmpl-2", None), ("used-2", 5), ("cmpl-3", None), ("used-3", 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reservations-0.journal", "reservations-1.journal"]


def test_a_journal_of_another_version_is_logged_and_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "reservations-0.journal").write_bytes(framed([b"\x93\xa5other\x01\x02"]))
    with capture_logs() as logs:
        assert left(tmp_path) == []
    assert [each["event"] for each in logs] == ["journal of another version, limits begin anew"]


def test_a_disk_that_fails_is_logged_once_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as journal, capture_logs() as logs:
        journal.load(NOW)
        write = os.write
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", lambda file, data: write(file, data[:20]))
            for number in range(3):
                journal.reserved(account(f"lost-{number}"), "ingress-1")
                journal.flush()
        journal.reserved(account("cmpl-1"), "ingress-1")
        journal.flush()
    assert [each["event"] for each in logs] == ["reservations not journaled"]
    assert [each.account.request_id for each in left(tmp_path)] == ["cmpl-1"]


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    journal = ReservationJournal(tmp_path, 0)
    journal.close()
    journal.close()
