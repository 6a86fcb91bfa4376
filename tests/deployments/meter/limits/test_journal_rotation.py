"""A journal that begins anew beside the one in use: nothing flushed is lost whenever the process is killed, and the
event loop is not held up."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from deployments.contracts import Limits
from deployments.meter.limits.limits import LimitState
from deployments.meter.limits.reservation_journal import ReservationJournal
from deployments.meter.limits.reservations import Reservation, Reservations, demand_of
from deployments.settlement import record_rewrite
from tests.deployments.meter.limits.test_reservation_journal import NOW, account, left, opened
from tests.deployments.settlement.rewrites import written
from tests.loop_turns import LoopTurns, assert_short, loop_turns

_VICTIM = """
import os, signal, sys
from pathlib import Path
from deployments.settlement import record_rewrite
from deployments.meter.limits.reservation_journal import ReservationJournal
from tests.deployments.meter.limits.test_reservation_journal import NOW, account
from tests.deployments.settlement.rewrites import written

folder, killed_at = Path(sys.argv[1]), sys.argv[2]
record_rewrite._PORTION = 1
seen = 0

def reached(point):
    global seen
    seen += point == killed_at.split(":")[0]
    if point + f":{seen}" == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)

write, rename = os.write, Path.rename

def counted_write(file, data):
    reached("before a write of the draft" if file not in (1, journal._file) else "")
    count = write(file, data)
    reached("after a write of the draft" if file not in (1, journal._file) else "")
    return count

def counted_rename(self, target):
    reached("before a rename")
    result = rename(self, target)
    reached("after a rename")
    return result

journal = ReservationJournal(folder, 0, full_bytes=0)
os.write, Path.rename = counted_write, counted_rename

def flushed(*words):
    journal.flush()
    os.write(1, (" ".join(words) + "\\n").encode())  # from here on it must not be lost

journal.load(NOW)
for number in range(4):
    journal.reserved(account(f"open-{number}", NOW + number), "ingress-1")
journal.reserved(account("used", NOW + 4), "ingress-1")
journal.closed("used", 7)
flushed("open-0", "open-1", "open-2", "open-3", "used")
journal.rotate(NOW + 30.0, [(account(f"open-{number}", NOW + number), "ingress-1") for number in range(4)])
journal.reserved(account("meanwhile", NOW + 5), "ingress-1")
journal.closed("open-3", 9)
flushed("meanwhile", "closed-3")
written(journal._rotation)
journal.reserved(account("at-the-end", NOW + 6), "ingress-1")
flushed("at-the-end")
assert journal._rotation is None
journal.reserved(account("after", NOW + 7), "ingress-1")
flushed("after")
os.kill(os.getpid(), signal.SIGKILL)
"""

_POINTS = (
    *(f"{when} a write of the draft:{number}" for number in range(1, 6) for when in ("before", "after")),
    *(f"{when} a rename:{number}" for number in (1, 2) for when in ("before", "after")),
    "after all",
)


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", _POINTS)
def test_a_process_that_is_killed_while_it_rotates_leaves_all_that_it_flushed(tmp_path: Path, killed_at: str) -> None:
    victim = subprocess.run(
        [sys.executable, "-c", _VICTIM, tmp_path, killed_at],
        cwd=Path(__file__).parents[4],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert victim.returncode == -9
    flushed = set(victim.stdout.split())
    assert ("after" in flushed) == (killed_at == "after all")
    known = {each.account.request_id: each.used_tokens for each in left(tmp_path, NOW + 31.0)}
    assert flushed - {"closed-3"} <= set(known)
    assert known["used"] == 7
    assert [known[f"open-{number}"] for number in range(3)] == [None] * 3
    if "closed-3" in flushed:
        assert known["open-3"] == 9
    with opened(tmp_path, full_bytes=0) as successor:  # goes on, whatever draft was left
        successor.load(NOW + 31.0)
        successor.rotate(NOW + 91.0, [(account("open-0"), "ingress-1")])
        written(successor._rotation)
        successor.flush()
    assert [each.account.request_id for each in left(tmp_path, NOW + 3600.0)][:1] == ["open-0"]


def test_much_that_is_flushed_meanwhile_is_left_to_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_rewrite, "_AT_ONCE_BYTES", 1000)
    with opened(tmp_path, full_bytes=0) as journal:
        journal.load(NOW)
        journal.rotate(NOW + 60.0, [])
        for number in range(100):
            journal.reserved(account(f"cmpl-{number}"), "ingress-1")
        written(journal._rotation)
        journal.flush()
        assert journal._rotation is not None  # it has them to write
        written(journal._rotation)
        journal.flush()
        assert journal._rotation is None
    (tmp_path / "reservations-0.previous").unlink()
    assert len(left(tmp_path)) == 100


@pytest.mark.parametrize("at", ["thread", "end"])
def test_a_disk_that_fails_leaves_the_file_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    write = os.write
    with opened(tmp_path, full_bytes=0) as journal, capture_logs() as logs:
        journal.load(NOW)
        journal.reserved(account("cmpl-1"), "ingress-1")
        journal.flush()
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", lambda file, data: write(file, data if file == journal._file else data[:20]))
            journal.rotate(NOW + 60.0, [(account("cmpl-1"), "ingress-1")] if at == "thread" else [])
            written(journal._rotation)
            journal.reserved(account("cmpl-2"), "ingress-1")
            journal.flush()
            assert journal._rotation is None
        assert not journal.is_full(NOW + 61.0)  # it is tried again, but not at once
        assert journal.is_full(NOW + 120.0)
    assert [each["event"] for each in logs] == ["journal not rotated"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reservations-0.journal"]
    assert [each.account.request_id for each in left(tmp_path)] == ["cmpl-1", "cmpl-2"]


def test_names_that_cannot_be_exchanged_leave_the_file_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.suffix == ".draft":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with opened(tmp_path, full_bytes=0) as journal, capture_logs() as logs:
        journal.load(NOW)
        monkeypatch.setattr(Path, "rename", refused)
        journal.reserved(account("cmpl-1"), "ingress-1")
        journal.flush()
        journal.rotate(NOW + 60.0, [(account("cmpl-1"), "ingress-1")])
        written(journal._rotation)
        journal.flush()
        journal.reserved(account("cmpl-2"), "ingress-1")
    assert [each["reason"] for each in logs] == ["Input/output error"]
    assert [each.account.request_id for each in left(tmp_path)] == ["cmpl-1", "cmpl-2"]


def test_a_meter_that_stops_while_it_rotates_leaves_one_file(tmp_path: Path) -> None:
    with opened(tmp_path, full_bytes=0) as journal:
        journal.load(NOW)
        journal.reserved(account("cmpl-1"), "ingress-1")
        journal.flush()
        journal.rotate(NOW + 60.0, ((account(f"cmpl-{number}"), "ingress-1") for number in range(10**9)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reservations-0.journal"]
    assert [each.account.request_id for each in left(tmp_path)] == ["cmpl-1"]


@pytest.mark.slow
async def test_a_rotation_with_all_reservations_open_holds_no_turn_of_the_event_loop(tmp_path: Path) -> None:
    folders = (tmp_path / str(number) for number in count())

    async def turns_of() -> LoopTurns:
        folder = next(folders)
        with closing(ReservationJournal(folder, 0, full_bytes=0)) as journal:
            journal.load(NOW)
            reservations = Reservations(journal, capacity=100_000)
            key = LimitState("this key", Limits())
            for number in range(100_000):
                reserved = account(f"cmpl-{number}")
                reservations.reserve(Reservation(reserved, "ingress-1", (key.take(NOW, demand_of(reserved)),)), NOW)
            reservations.flush(NOW)
            with loop_turns() as turns:
                await asyncio.sleep(0.02)
                for number in range(100_000):
                    reservations.flush(NOW + 60.0)  # begins it at first, ends it at last
                    if journal._rotation is None:
                        break
                    journal.closed(f"cmpl-{number}", 5)
                    await asyncio.sleep(0.005)
            assert (folder / "reservations-0.previous").exists()
        return turns

    await assert_short(turns_of)
