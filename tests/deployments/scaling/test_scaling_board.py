"""What scaling policies share and show."""

from __future__ import annotations

import logging
from logging.handlers import MemoryHandler
from pathlib import Path

import msgspec
import pytest

from deployments.scaling.ingress_demand import ModelDemand
from deployments.scaling.scaling_board import DecisionBoard, ShownDecision, demand_of, log_folder, report_demands

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


def test_the_latest_decision_is_in_a_file_of_its_application(tmp_path: Path) -> None:
    board = DecisionBoard(tmp_path)
    shown = ShownDecision("model-a", 3, "prefill", NOW, NOW - 5, 2, "queue")
    board.show(ShownDecision("model-a", 2, "no load", NOW - 9))
    board.show(shown)
    board.show(ShownDecision("gateway", 1, "no load", NOW))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scaling-gateway.json", "scaling-model-a.json"]
    assert msgspec.json.decode((tmp_path / "scaling-model-a.json").read_bytes(), type=ShownDecision) == shown


def test_a_decision_that_nobody_repeats_is_old() -> None:
    """The model has a fixed number now, or its controller is gone."""
    shown = ShownDecision("model-a", 3, "prefill", NOW)
    assert not shown.is_old(NOW + 9)
    assert shown.is_old(NOW + 11)


def test_the_folder_is_that_of_serves_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve logs to a file, behind a buffer in the mode for throughput, and maybe to standard error."""
    file = logging.FileHandler(tmp_path / "controller.log", delay=True)
    logger = logging.getLogger("ray.serve")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler()])
    assert log_folder() is None
    for handler in (file, MemoryHandler(1, target=file)):
        monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(), handler])
        assert log_folder() == tmp_path
