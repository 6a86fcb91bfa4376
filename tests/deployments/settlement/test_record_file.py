"""Records in a file, and what a process that was killed leaves behind them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deployments.settlement.record_file import framed, read_records

RECORDS = st.lists(st.binary(min_size=1, max_size=50), max_size=8)


@given(records=RECORDS)
def test_what_was_written_is_read(records: list[bytes]) -> None:
    data = framed(records)
    assert read_records(data) == (records, len(data))


@given(records=RECORDS, last=st.binary(min_size=1, max_size=50), data=st.data())
def test_a_record_that_was_not_written_whole_is_told_from_one(
    records: list[bytes], last: bytes, data: st.DataObject
) -> None:
    whole, more = framed(records), framed([last])
    torn = whole + more[: data.draw(st.integers(0, len(more) - 1))]
    assert read_records(torn) == (records, len(whole))


@given(records=RECORDS, zeros=st.integers(1, 100))
def test_zeros_behind_the_records_are_none(records: list[bytes], zeros: int) -> None:
    whole = framed(records)
    assert read_records(whole + bytes(zeros)) == (records, len(whole))


@given(records=RECORDS, last=st.binary(min_size=1, max_size=50), data=st.data())
def test_a_record_with_a_wrong_bit_is_none(records: list[bytes], last: bytes, data: st.DataObject) -> None:
    whole, more = framed(records), bytearray(framed([last]))
    more[data.draw(st.integers(4, len(more) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert read_records(whole + bytes(more)) == (records, len(whole))
