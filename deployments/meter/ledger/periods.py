"""The days and months of UTC for which usage is added up. Pure: Unix time in seconds."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal, NamedTuple

__all__ = ["Period", "PeriodName", "period_at"]

PeriodName = Literal["day", "month"]
_DAY_S = 86_400


class Period(NamedTuple):
    begins_at: float
    ends_at: float
    """Exclusive."""


def period_at(name: PeriodName, at: float) -> Period:
    """The day or month of UTC that `at` lies in."""
    if name == "day":
        begins_at = float(at // _DAY_S * _DAY_S)
        return Period(begins_at, begins_at + _DAY_S)
    first = datetime.fromtimestamp(at, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    following = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    return Period(first.timestamp(), following.timestamp())
