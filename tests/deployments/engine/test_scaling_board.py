"""What scaling policies share and show."""

from __future__ import annotations

import os
import time
from pathlib import Path

from deployments.engine.scaling_board import DecisionBoard, ShownDecision, demand_of, report_demands
from deployments.ingress.demand import ModelDemand

NOW = 1_800_000_000.0


def test_a_model_hears_of_what_ingresses_hold_for_it_while_that_is_news() -> None:
    report_demands(NOW, {"board-a": ModelDemand(held=3), "board-b": ModelDemand(held=1)})
    assert demand_of("board-a", NOW + 9) == ModelDemand(held=3)
    assert demand_of("board-a", NOW + 11) == ModelDemand()
    assert demand_of("board-c", NOW) == ModelDemand()


def test_a_later_report_replaces_an_earlier() -> None:
    report_demands(NOW, {"board-a": ModelDemand(held=3)})
    report_demands(NOW + 1, {"board-a": ModelDemand()})
    assert demand_of("board-a", NOW + 1) == ModelDemand()


def test_a_decision_is_read_as_it_was_shown(tmp_path: Path) -> None:
    board = DecisionBoard(tmp_path)
    assert board.read("model-a") is None
    shown = ShownDecision(3, "prefill", NOW, 2, "queue")
    board.show("model-a", ShownDecision(2, "no load"))
    board.show("model-a", shown)
    assert board.read("model-a") == shown


def test_a_decision_that_nobody_repeats_is_not_shown_any_more(tmp_path: Path) -> None:
    """The model has a fixed number now, or its controller is gone."""
    board = DecisionBoard(tmp_path)
    board.show("model-a", ShownDecision(3, "prefill"))
    old = time.time() - 20
    os.utime(tmp_path / "run" / "autoscaling" / "model-a.json", (old, old))
    assert board.read("model-a") is None
