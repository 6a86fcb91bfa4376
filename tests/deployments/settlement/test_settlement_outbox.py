"""Settlements that wait for a meter: sent until acknowledged, and not lost with their process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from deployments.contracts import Settlement
from deployments.settlement import outbox as settlement_outbox
from deployments.settlement.outbox import SettlementOutbox
from deployments.settlement.record_file import framed
from tests.deployments.accounts import account, settlement
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet
from tests.deployments.settlement.rewrites import written
from tests.loop_turns import LoopTurns, assert_short, loop_turns


class Meters:
    """What was sent, and to whom."""

    def __init__(self) -> None:
        self.away: set[str] = set()
        self.taken: list[tuple[str, str]] = []
        self.tries = 0

    async def send(self, meter: str, settlements: list[Settlement]) -> None:
        self.tries += 1
        if meter in self.away:
            raise ConnectionError(meter)
        self.taken += [(meter, each.account.request_id) for each in settlements]


def files(folder: Path) -> dict[str, int]:
    """Their sizes in bytes."""
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def abandon(outbox: SettlementOutbox) -> None:
    """What a process that is killed does: nothing but letting go of its files."""
    os.close(outbox._file)
    outbox._file = -1
    for sender in outbox._senders.values():
        sender.cancel()


async def inherit(folder: Path, meters: Meters) -> None:
    """What the next process of the node does with what one has left."""
    heir = SettlementOutbox(folder, "heir", meters.send)
    await heir.recover()
    await heir.close()


@in_virtual_time
async def test_a_meter_that_is_away_holds_up_no_other(tmp_path: Path) -> None:
    meters = Meters()
    meters.away.add("Meter-1")
    outbox = SettlementOutbox(tmp_path, "mine", meters.send)
    outbox.put("Meter-1", settlement("a"))
    outbox.put("Meter", settlement("b"))
    await quiet()
    assert meters.taken == [("Meter", "b")]
    assert len(outbox) == 1
    meters.away.clear()
    await asyncio.sleep(1.1)
    assert meters.taken == [("Meter", "b"), ("Meter-1", "a")]
    await outbox.close()


@in_virtual_time
async def test_the_oldest_settlement_that_waits_tells_how_late_the_ledger_is(tmp_path: Path) -> None:
    meters = Meters()
    meters.away |= {"Meter", "Meter-1"}
    outbox = SettlementOutbox(tmp_path, "mine", meters.send)
    assert outbox.lag_s(100.0) == 0
    for meter, request_id, started_at in (("Meter", "a", 90.0), ("Meter-1", "b", 80.0), ("Meter-1", "c", 70.0)):
        outbox.put(meter, settlement(request_id, account=account(request_id, started_at=started_at), total_s=5.0))
    assert outbox.lag_s(100.0) == 15.0, "of those that were put first, to either meter"
    meters.away.clear()
    await asyncio.sleep(1.1)
    assert outbox.lag_s(100.0) == 0
    await outbox.close()


@in_virtual_time
async def test_an_acknowledgement_is_passed_on_once(tmp_path: Path) -> None:
    meters, acknowledged = Meters(), []
    meters.away.add("Meter")
    outbox = SettlementOutbox(tmp_path, "mine", meters.send)
    outbox.put("Meter", settlement("a"), lambda: acknowledged.append("a"))
    await asyncio.sleep(5)
    assert acknowledged == []
    meters.away.clear()
    await outbox.close()
    assert acknowledged == ["a"]


@in_virtual_time
async def test_two_witnesses_of_one_request_are_both_sent(tmp_path: Path) -> None:
    meters = Meters()
    outbox = SettlementOutbox(tmp_path, "mine", meters.send)
    outbox.put("Meter", settlement("a"))
    outbox.put("Meter", settlement("a", witness="engine"))
    await quiet()
    assert meters.taken == [("Meter", "a")] * 2
    await outbox.close()


@in_virtual_time
async def test_what_is_acknowledged_leaves_nothing_behind(tmp_path: Path) -> None:
    outbox = SettlementOutbox(tmp_path, "mine", Meters().send)
    for number in range(100):
        outbox.put("Meter", settlement(f"r{number}"))
    await quiet()
    assert files(tmp_path) == {"mine.outbox": 0}
    await outbox.close()
    assert files(tmp_path) == {}


@in_virtual_time
async def test_the_file_stays_small_while_a_meter_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settlement_outbox, "_COMPACT_BYTES", 4096)
    meters = Meters()
    meters.away.add("Meter-1")
    outbox = SettlementOutbox(tmp_path, "mine", meters.send)
    outbox._compact_at_bytes = 4096
    outbox.put("Meter-1", settlement("waits"))
    largest = 0
    for number in range(1000):
        outbox.put("Meter", settlement(f"r{number}"))
        await quiet()
        written(outbox._rewrite)
        largest = max(largest, outbox._path.stat().st_size)
    assert 4096 < largest < 3 * 4096
    abandon(outbox)
    heir = SettlementOutbox(tmp_path, "heir", meters.send)
    meters.taken.clear()
    await heir.recover()
    assert 1 <= len(heir) < 100  # few of those that were acknowledged stand in it still
    await heir.close(0.0)


@in_virtual_time
async def test_what_a_killed_process_left_is_recovered(tmp_path: Path) -> None:
    meters = Meters()
    meters.away.add("Meter")
    killed = SettlementOutbox(tmp_path, "killed", meters.send)
    heir = SettlementOutbox(tmp_path, "heir", meters.send)
    await heir.start()
    killed.put("Meter", settlement("a"))
    await asyncio.sleep(20)
    assert len(heir) == 0  # while its owner lives, the file is its own
    abandon(killed)
    meters.away.clear()
    await asyncio.sleep(6)
    assert meters.taken == [("Meter", "a")]
    assert files(tmp_path) == {"heir.outbox": 0}
    await heir.close()


@in_virtual_time
async def test_a_torn_end_costs_nothing_of_what_is_before_it(tmp_path: Path) -> None:
    meters = Meters()
    meters.away.add("Meter")
    killed = SettlementOutbox(tmp_path, "killed", meters.send)
    killed.put("Meter", settlement("a"))
    os.write(killed._file, b"\x40\0\0\0half a rec")
    abandon(killed)
    meters.away.clear()
    await inherit(tmp_path, meters)
    assert meters.taken == [("Meter", "a")]


@in_virtual_time
async def test_a_record_of_another_version_costs_nothing_of_those_around_it(tmp_path: Path) -> None:
    meters = Meters()
    meters.away.add("Meter")
    killed = SettlementOutbox(tmp_path, "killed", meters.send)
    killed.put("Meter", settlement("a"))
    os.write(killed._file, framed([msgspec.msgpack.encode(["Meter", {"unheard": "of"}])]))
    killed.put("Meter", settlement("b"))
    abandon(killed)
    meters.away.clear()
    await inherit(tmp_path, meters)
    assert meters.taken == [("Meter", "a"), ("Meter", "b")]
    assert files(tmp_path) == {}


@in_virtual_time
async def test_close_keeps_what_no_meter_took(tmp_path: Path) -> None:
    meters = Meters()
    meters.away.add("Meter")
    outbox = SettlementOutbox(tmp_path, "mine", meters.send)
    outbox.put("Meter", settlement("a"))
    await outbox.close(1.0)
    await outbox.close(1.0)
    meters.away.clear()
    await inherit(tmp_path, meters)
    assert meters.taken == [("Meter", "a")]


@in_virtual_time
async def test_a_note_is_sent_by_an_heir_alone(tmp_path: Path) -> None:
    meters = Meters()
    outbox = SettlementOutbox(tmp_path, "mine", meters.send)
    outbox.checkpoint("Meter", settlement("a"))
    outbox.put("Meter", settlement("b"))
    await quiet()
    assert meters.taken == [("Meter", "b")]
    assert len(outbox) == 0
    abandon(outbox)
    await inherit(tmp_path, meters)
    assert ("Meter", "a") in meters.taken[1:]
    assert files(tmp_path) == {}


@in_virtual_time
async def test_a_note_that_is_not_needed_leaves_nothing_behind(tmp_path: Path) -> None:
    meters = Meters()
    meters.away.add("Meter")
    outbox = SettlementOutbox(tmp_path, "mine", meters.send)
    outbox.checkpoint("Meter", settlement("withdrawn"))
    outbox.checkpoint("Meter", settlement("settled", witness="engine"))
    outbox.put("Meter", settlement("settled"))
    outbox.checkpoint("Meter", settlement("settled", witness="engine"))  # a word that waits is better
    outbox.withdraw(["withdrawn", "never heard of"])
    meters.away.clear()
    await outbox.close()
    assert meters.taken == [("Meter", "settled")]
    assert files(tmp_path) == {}


@in_virtual_time
async def test_notes_stay_when_the_file_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settlement_outbox, "_COMPACT_BYTES", 4096)
    meters = Meters()
    outbox = SettlementOutbox(tmp_path, "mine", meters.send)
    outbox._compact_at_bytes = 4096
    outbox.checkpoint("Meter", settlement("checkpoint"))
    for number in range(200):
        outbox.put("Meter", settlement(f"r{number}"))
        await quiet()
        written(outbox._rewrite)
    assert files(tmp_path)["mine.outbox"] < 3 * 4096
    abandon(outbox)
    meters.taken.clear()
    await inherit(tmp_path, meters)
    assert ("Meter", "checkpoint") in meters.taken


@in_virtual_time
async def test_what_is_put_while_the_file_is_made_anew_stands_in_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settlement_outbox, "_COMPACT_BYTES", 0)
    meters = Meters()
    meters.away.add("Meter")
    outbox = SettlementOutbox(tmp_path, "mine", meters.send)
    outbox.put("Meter", settlement("before"))
    outbox.checkpoint("Meter", settlement("checkpoint"))
    outbox._compact_at_bytes = 0
    outbox.withdraw([])
    rewrite = outbox._rewrite
    assert rewrite is not None
    outbox.put("Meter", settlement("meanwhile"))
    outbox.put("Meter", settlement("checkpoint"))
    written(rewrite)
    old = outbox._path.stat().st_ino
    outbox.withdraw([])
    assert (outbox._path.stat().st_ino != old, outbox._rewrite) == (True, None)
    outbox.put("Meter", settlement("after"))
    assert not outbox._path.with_suffix(".draft").exists()
    abandon(outbox)
    meters.away.clear()
    await inherit(tmp_path, meters)
    assert sorted(meters.taken) == [("Meter", each) for each in ("after", "before", "checkpoint", "meanwhile")]


@pytest.mark.slow
async def test_making_the_file_anew_holds_no_turn_of_the_event_loop(tmp_path: Path) -> None:
    async def turns_of() -> LoopTurns:
        outbox = SettlementOutbox(tmp_path, "mine", Meters().send)
        for number in range(50_000):
            outbox.checkpoint("Meter", settlement(f"r{number}"))
        with loop_turns() as turns:
            await asyncio.sleep(0.02)
            outbox.withdraw([])
            assert outbox._rewrite is not None
            while outbox._rewrite is not None:
                await asyncio.sleep(0.01)
                outbox.checkpoint("Meter", settlement("another"))
                outbox.withdraw(["another"])
        abandon(outbox)
        return turns

    await assert_short(turns_of)


_VICTIM = """
import asyncio, sys
from pathlib import Path
from deployments.settlement.outbox import SettlementOutbox
from tests.deployments.accounts import account, settlement

async def main() -> None:
    async def never(meter, settlements):
        await asyncio.Event().wait()

    outbox = SettlementOutbox(Path(sys.argv[1]), "victim", never)
    for number in range(10**9):
        outbox.put("Meter", settlement(f"r{number}"))
        print(number, flush=True)  # from here on it must not be lost

asyncio.run(main())
"""


def killed(folder: Path) -> int:
    """How many settlements a process that was killed says that it had put."""
    with subprocess.Popen([sys.executable, "-c", _VICTIM, str(folder)], stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        for _ in range(500):
            victim.stdout.readline()
        victim.send_signal(signal.SIGKILL)
        return 500 + len(victim.stdout.read().splitlines())


async def test_sigkill_loses_nothing_that_was_put(tmp_path: Path) -> None:
    told = killed(tmp_path)
    meters = Meters()
    await inherit(tmp_path, meters)
    assert len(meters.taken) - told in (0, 1)  # one may have been put and not told
    assert meters.taken[:told] == [("Meter", f"r{number}") for number in range(told)]
