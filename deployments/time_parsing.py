"""Points in time as people write them, in queries and on the command line."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final, Literal

__all__ = ["END_OF_TIME_AT", "parse_moment"]

END_OF_TIME_AT: Final = 253_402_300_800
"""The year 10000, from which on dates cannot be written."""

_UNITS_S: Final = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def parse_moment(text: str, now_at: float, towards: Literal["past", "future"]) -> float:
    """Unix time in seconds: of a Unix time, a date or time in ISO 8601 (UTC where it does not say otherwise), or a
    duration from now such as `30d`.

    Raises ValueError that says what was expected.
    """
    if match := re.fullmatch(r"([0-9]{1,9})([mhdw])", text):
        duration_s = int(match[1]) * _UNITS_S[match[2]]
        moment = now_at - duration_s if towards == "past" else now_at + duration_s
    elif re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,20})?", text):
        moment = float(text)
    else:
        try:
            written = datetime.fromisoformat(text)
            moment = (written if written.tzinfo else written.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            moment = -1.0
    if not 0 <= moment < END_OF_TIME_AT:
        raise ValueError("expected a date such as 2027-01-31, a Unix time, or a duration such as 30d (m, h, d, w)")
    return moment
