"""The figures that are read from a simulation, and its page."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from serve_app.planning.outcome import Moment, Outcome, ScaleChange
from serve_app.planning.report import html


def outcome(**changed: Any) -> Outcome:
    fields: dict[str, Any] = {
        "duration_s": 7200.0,
        "arrived_at": np.array([0.0, 10.0, 3601.0, 3602.0]),
        "first_token_at": np.array([0.5, 12.0, np.nan, 3602.25]),
        "refused": {"no free capacity": 1},
        "replica_seconds": 9000.0,
        "peak_replicas": 3,
        "moments": (Moment(0.5, 1, 1, 1), Moment(1.0, 3, 1, 3), Moment(1.5, 3, 1, 3), Moment(2.0, 3, 3, 3)),
        "changes": (
            ScaleChange(1.0, 1, 3, "prefill: a < b"),
            ScaleChange(9.0, 3, 2, "x"),
            ScaleChange(12.0, 2, 1, "x"),
        ),
    }
    return Outcome(**fields | changed)


def test_percentiles_are_of_those_served_and_the_share_is_of_all() -> None:
    figures = outcome().figures(1.0)
    assert figures["first_token_s"] == {"p50": 0.5, "p90": pytest.approx(1.7), "p99": pytest.approx(1.97)}
    assert figures["share_within_target"] == 0.5
    assert (figures["requests"], figures["refused"], figures["replica_hours"]) == (4, 1, 2.5)
    assert figures["mean_replicas"] == 1.25
    assert figures["changes"][0] == {"at_s": 1.0, "before": 1, "after": 3, "reason": "prefill: a < b"}


def test_refusals_are_told_with_their_reasons() -> None:
    readable = outcome(refused={"too long": 2, "no replica": 1200}).readable(1.0)
    assert readable[1:4] == [("refused", "1,202"), ("refused: too long", "2"), ("refused: no replica", "1,200")]


def test_a_direction_changes_where_a_rise_meets_a_fall() -> None:
    def turns(*counts: int) -> int:
        changes = [ScaleChange(0.0, before, after, "") for before, after in pairwise(counts)]
        return outcome(changes=tuple(changes)).direction_changes

    assert turns(1) == turns(1, 2) == turns(1, 2, 5, 9) == 0
    assert turns(1, 2, 5, 3, 1) == 1
    assert turns(1, 5, 4, 5, 1) == 3


def test_without_requests_there_is_nothing_to_tell() -> None:
    empty = outcome(arrived_at=np.empty(0), first_token_at=np.empty(0), refused={})
    assert empty.figures(1.0)["first_token_s"] == {"p50": None, "p90": None, "p99": None}
    assert empty.figures(1.0)["share_within_target"] is None
    assert ("within 1 s", "–") in empty.readable(1.0)


def test_intervals_are_of_whole_seconds_and_cover_everything() -> None:
    intervals = outcome().intervals()
    assert len(intervals) == 600
    assert intervals[1].at_s == 12
    assert sum(interval.arrivals_per_s for interval in intervals) * 12 == 4
    assert intervals[0].arrivals_per_s == pytest.approx(2 / 12)
    assert intervals[0].first_token_p50_s == pytest.approx(1.25)
    assert np.isnan(intervals[1].first_token_p50_s)


@pytest.mark.parametrize("changed", [{}, {"arrived_at": np.empty(0), "first_token_at": np.empty(0), "changes": ()}])
def test_the_page_has_its_plots_and_figures_and_needs_nothing_beside_it(changed: dict[str, Any]) -> None:
    page = html(outcome(**changed), title="a & b", description="Under <load>.", target_first_token_s=1.0)
    assert page.count("<svg") == 3
    assert "a &amp; b" in page
    assert "Under &lt;load&gt;." in page
    assert ("prefill: a &lt; b" in page) == (not changed)
    assert "2.50</b>replica-hours" in page
    assert not re.findall(r'(?:src|href)="(?!#)', page.replace("xlink:href", "href"))
