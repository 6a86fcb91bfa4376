from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deployments.contracts import Settlement
from deployments.meter.errors import LedgerUnavailable
from deployments.meter.ledger.spool import Spool
from deployments.settlement.record_file import framed
from tests.deployments.accounts import account, settlement


def numbered(*numbers: int) -> list[Settlement]:
    return [settlement(f"cmpl-{number}", completion_tokens=number) for number in numbers]


def drained(spool: Spool) -> list[Settlement]:
    """All that is spooled, forgotten batch by batch."""
    settlements: list[Settlement] = []
    while spool.spooled:
        batch = spool.peek()
        settlements += batch.settlements
        spool.forget(batch)
    return settlements


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Spool]:
    with closing(Spool(folder, "Meter", **options)) as spool:
        yield spool


def rejected(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "Meter.rejected").read_text().splitlines()]


def test_settlements_come_out_in_order_and_whole(tmp_path: Path) -> None:
    full = settlement("cmpl-1", witness="engine", parts={0: 3, 7: 1}, account=account("cmpl-1", team="tëam"))
    with opened(tmp_path) as spool:
        spool.append([full])
        spool.append(numbered(2, 3))
        assert spool.spooled == 3
        assert drained(spool) == [full, *numbered(2, 3)]


def test_a_batch_that_was_not_forgotten_comes_again(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        spool.append(numbered(1, 2))
        assert spool.peek().settlements == spool.peek().settlements == numbered(1, 2)


def test_an_empty_spool_has_an_empty_batch(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        batch = spool.peek()
        spool.forget(batch)
        assert (batch.records, spool.spooled) == (0, 0)


def test_a_batch_is_a_part_of_many_and_what_is_appended_meanwhile_comes_later(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        spool.append(numbered(*range(20_000)))
        batch = spool.peek()
        assert 0 < batch.records < 20_000
        spool.append(numbered(20_000))
        spool.forget(batch)
        assert spool.spooled == 20_001 - batch.records
        assert batch.settlements + drained(spool) == numbered(*range(20_001))


def test_a_settlement_larger_than_a_batch_is_a_batch(tmp_path: Path) -> None:
    large = settlement("cmpl-1", witness="engine", parts=dict.fromkeys(range(300_000), 1))
    with opened(tmp_path) as spool:
        spool.append([large])
        assert drained(spool) == [large]


def test_the_file_is_empty_again_once_all_is_forgotten(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        spool.append(numbered(1, 2))
        drained(spool)
        assert (tmp_path / "Meter.spool").stat().st_size == 0
        spool.append(numbered(3))
        assert drained(spool) == numbered(3)


def test_a_successor_takes_up_what_was_left(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        spool.append(numbered(1, 2))
    with opened(tmp_path) as spool:
        assert spool.spooled == 2
        spool.append(numbered(3))
        assert drained(spool) == numbered(1, 2, 3)


@pytest.mark.parametrize("cut_bytes", [1, 5, 9, 30])
def test_a_torn_end_is_cut_off_and_appended_to(tmp_path: Path, cut_bytes: int) -> None:
    with opened(tmp_path) as spool:
        spool.append(numbered(1, 2))
    path = tmp_path / "Meter.spool"
    path.write_bytes(path.read_bytes()[:-cut_bytes])
    with opened(tmp_path) as spool:
        spool.append(numbered(3))
    with opened(tmp_path) as spool:
        assert drained(spool) == numbered(1, 3)


def test_an_end_of_other_bytes_is_cut_off(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        spool.append(numbered(1))
    with (tmp_path / "Meter.spool").open("ab") as file:
        file.write(b"\x07\x00\x00\x00\xff\xff\xff\xffgarbage")
    with opened(tmp_path) as spool:
        settlements = drained(spool)
    assert settlements == numbered(1)


def test_a_full_spool_takes_none_until_some_are_forgotten(tmp_path: Path) -> None:
    with opened(tmp_path, max_records=3) as spool:
        spool.append(numbered(1, 2))
        assert not spool.full
        spool.append(numbered(3, 4))
        assert spool.full
        with pytest.raises(LedgerUnavailable, match="full at 3"):
            spool.append(numbered(5))
        assert drained(spool) == numbered(1, 2, 3, 4)
        assert not spool.full
        spool.append(numbered(5))


def test_the_file_does_not_grow_for_ever_while_its_beginning_is_drained(tmp_path: Path) -> None:
    with opened(tmp_path, max_records=5_000) as spool:
        appended = 0
        while not spool.full:
            missing = 4_999 - spool.spooled
            spool.append(numbered(*range(missing)))
            spool.forget(spool.peek())
            assert spool.spooled > 0
            appended += missing
            assert appended < 15_000


@pytest.mark.parametrize("call", ["write", "fdatasync"])
def test_an_append_that_the_disk_refuses_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(tmp_path) as spool:
        spool.append(numbered(1))
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(LedgerUnavailable, match="No space left"):
                spool.append(numbered(2))
        assert spool.spooled == 1
        spool.append(numbered(3))
    with opened(tmp_path) as spool:
        assert drained(spool) == numbered(1, 3)


def test_a_write_that_ends_early_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with opened(tmp_path) as spool:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
            with pytest.raises(LedgerUnavailable, match="could be written"):
                spool.append(numbered(1, 2))
        assert (tmp_path / "Meter.spool").stat().st_size == 0
        spool.append(numbered(3))
        assert drained(spool) == numbered(3)


def test_what_others_have_left_is_recovered(tmp_path: Path) -> None:
    with closing(Spool(tmp_path, "Meter-1")) as gone:
        gone.append(numbered(1, 2))
    with opened(tmp_path) as spool:
        spool.append(numbered(3))
    with opened(tmp_path, recover=[*tmp_path.glob("*.spool"), tmp_path / "never-was.spool"]) as spool:
        assert drained(spool) == numbered(3, 1, 2)
    assert not (tmp_path / "Meter-1.spool").exists()


def test_a_spool_in_use_is_not_recovered(tmp_path: Path) -> None:
    with closing(Spool(tmp_path, "Meter-1")) as other:
        other.append(numbered(1))
        with opened(tmp_path, recover=tmp_path.glob("*.spool")) as spool:
            assert spool.spooled == 0
        assert drained(other) == numbered(1)


def test_a_spool_has_one_process_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(BlockingIOError):
        Spool(tmp_path, "Meter")
    Spool(tmp_path, "Meter").close()


def test_what_cannot_be_encoded_is_rejected_alone(tmp_path: Path) -> None:
    surrogate = settlement("cmpl-1", account=account("cmpl-1", caller_request_id="\ud800"))
    large = settlement("cmpl-2", completion_tokens=2**64)
    with opened(tmp_path) as spool:
        spool.append([surrogate, large, *numbered(3)])
        assert drained(spool) == numbered(3)
    first, second = rejected(tmp_path)
    assert first["settlement"]["account"]["caller_request_id"] == "\ud800"
    assert second["settlement"]["completion_tokens"] == 2**64
    assert "UnicodeEncodeError" in first["reason"]


def test_records_of_another_contract_are_rejected_once_and_do_not_block_the_others(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        spool.append(numbered(1))
    with (tmp_path / "Meter.spool").open("ab") as file:
        file.write(framed([msgspec.msgpack.encode({"of": "another version"})]))
    with opened(tmp_path) as spool:
        spool.append(numbered(2))
        spool.peek()
        assert drained(spool) == numbered(1, 2)
    [line] = rejected(tmp_path)
    assert msgspec.msgpack.decode(bytes.fromhex(line["settlement"])) == {"of": "another version"}


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "Meter")
    spool.close()
    spool.close()
