"""No change of the wire or of a file that an older process would misread goes unnoticed."""

from __future__ import annotations

import msgspec
import pytest

from deployments.contracts import unpack
from deployments.settlement.record_file import read_records
from tests.deployments.golden_bytes import KINDS, RECORDS, golden_forms, newest_form, sample_of

GOLDEN = golden_forms()


def test_there_are_golden_bytes_of_each_message_and_of_no_other() -> None:
    assert set(GOLDEN) == {*KINDS, RECORDS}


@pytest.mark.parametrize("name", [*KINDS, RECORDS])
def test_what_is_written_is_what_others_expect(name: str) -> None:
    """If the change is meant and older processes can read it, `python -m tests.deployments.golden_bytes` keeps it."""
    assert newest_form(name) == GOLDEN[name][-1]


@pytest.mark.parametrize("name", KINDS)
def test_every_form_that_was_ever_written_can_be_read(name: str) -> None:
    *older, newest = map(bytes.fromhex, GOLDEN[name])
    assert unpack(newest, KINDS[name]) == sample_of(KINDS[name])
    for form in older:
        assert isinstance(unpack(form, KINDS[name]), msgspec.Struct)


def test_a_file_of_records_is_read_as_it_was_written() -> None:
    for form in GOLDEN[RECORDS]:
        assert read_records(bytes.fromhex(form)).records == [b"one", b"two"]
