"""The policies as Ray Serve calls them, on contexts made as it makes them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ray.serve._private.common import TimeStampedValue
from ray.serve.config import AutoscalingContext, AutoscalingPolicy

from deployments.scaling.engine_policy import PoolPolicy
from deployments.scaling.ingress_demand import ModelDemand, demand_values
from deployments.scaling.ingress_policy import IngressPolicy, wanted_ingresses
from deployments.scaling.scaling_board import ShownDecision, demand_of, report_demands
from tests.deployments.scaling.reported_signals import IDLE

NOW = 1_800_000_000.0
TARGETS = {
    "min": 0,
    "max": 8,
    "target_first_token_s": 2.0,
    "target_kv_use": 0.85,
    "scale_down_after_s": 60.0,
    "idle_to_zero_after_s": 60.0,
}
BUSY = IDLE._replace(running=100)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of the policies' own clock, to be moved on."""
    seconds = [100.0]
    monkeypatch.setattr("deployments.scaling.engine_policy.time.monotonic", lambda: seconds[0])
    return seconds


@pytest.fixture(autouse=True)
def log_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of Serve's controller."""
    handler = logging.FileHandler(tmp_path / "controller.log")
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [handler])
    yield tmp_path
    handler.close()


def shown_in(folder: Path) -> ShownDecision:
    """The latest word on model-m."""
    return msgspec.json.decode((folder / "scaling-model-m.json").read_bytes(), type=ShownDecision)


def context(
    target: int,
    reports: list[dict[str, float]],
    *,
    running: int | None = None,
    requests: float = 0.0,
    age_s: float = 0.5,
) -> AutoscalingContext:
    """`reports` of each replica, the last `age_s` ago and one of nothing before it."""
    names = {name for report in reports for name in report}
    raw: dict[str, dict[Any, list[TimeStampedValue]]] = {
        name: {
            number: [TimeStampedValue(NOW - age_s - 1, 0.0), TimeStampedValue(NOW - age_s, report[name])]
            for number, report in enumerate(reports)
        }
        for name in names
    }
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="Engine",
        app_name="model-m",
        current_num_replicas=len(reports) if running is None else running,
        target_num_replicas=target,
        running_replicas=list(range(len(reports) if running is None else running)),
        total_num_requests=requests,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=lambda: raw,
        capacity_adjusted_min_replicas=TARGETS["min"],
        capacity_adjusted_max_replicas=TARGETS["max"],
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=NOW,
        config=None,
    )


def policy(**needs: float) -> PoolPolicy:
    return PoolPolicy("policy-m", TARGETS, needs)


def test_the_latest_report_of_each_replica_decides(log_folder: Path, clock: list[float]) -> None:
    decided, _ = policy()(context(1, [BUSY._asdict()]))
    assert decided == 2
    shown = shown_in(log_folder)
    assert (shown.replicas, shown.changed_from) == (2, 1)
    assert "batch" in (shown.changed_for or "")


def test_between_two_decisions_the_number_stays(clock: list[float]) -> None:
    each = policy()
    assert each(context(1, [BUSY._asdict()]))[0] == 2
    clock[0] += 0.4
    assert each(context(2, [BUSY._replace(running=300)._asdict()]))[0] == 2
    clock[0] += 0.2
    assert each(context(2, [BUSY._replace(running=300)._asdict()]))[0] == 4


@pytest.mark.parametrize("age_s", [11.0, 3600.0])
def test_without_fresh_reports_of_replicas_that_run_nothing_changes(clock: list[float], age_s: float) -> None:
    assert policy()(context(3, [BUSY._asdict()], age_s=age_s))[0] == 3
    assert policy()(context(3, [], running=3))[0] == 3
    assert policy()(context(3, [{"running": 5.0}]))[0] == 3  # a replica of another version


def test_a_pool_at_zero_hears_of_held_requests_through_the_ingress(clock: list[float]) -> None:
    each = policy()
    report_demands(NOW, {"policy-m": ModelDemand()})
    assert each(context(0, []))[0] == 0
    ingress = IngressPolicy(1, 4)
    ingress(context(1, [demand_values({"policy-m": ModelDemand(held=2, held_tokens=20)}, 0.0)]))
    assert demand_of("policy-m", NOW).held == 2
    clock[0] += 1
    assert each(context(0, []))[0] == 1


def test_replicas_that_do_not_come_for_want_of_a_place_are_told(
    log_folder: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": False, "Resources": {"GPU": 8.0}}]
    monkeypatch.setattr("deployments.scaling.engine_policy.ray.nodes", lambda: nodes)
    each = policy(GPU=1.0)
    report_demands(NOW, {"policy-m": ModelDemand(held=1)})
    each(context(1, []))
    clock[0] += 3
    assert each(context(1, []))[0] == 1
    shown = shown_in(log_folder)
    assert shown.reason.endswith("1 of 1 replicas are not up: it needs 1 GPU on one node, and the nodes have 0 GPU")
    crowded = policy(CPU=4.0)
    crowded(context(2, [], running=0))
    shown = shown_in(log_folder)
    assert "not up" not in shown.reason  # both fit, and may be starting
    policy(CPU=4.0)(context(3, [], running=0))
    shown = shown_in(log_folder)
    assert shown.reason.endswith("3 of 3 replicas are not up: it needs 4 CPU, and 0 CPU is free in the cluster")


def test_serve_makes_the_policies_from_their_names() -> None:
    """As from a deployment's configuration: pickled by Serve, made with the arguments."""
    described = AutoscalingPolicy(
        policy_function="deployments.scaling.engine_policy:PoolPolicy",
        policy_kwargs={"model": "policy-m", "targets": TARGETS, "needs": {}},
    )
    made = described.get_policy()(**described.policy_kwargs)
    report_demands(NOW, {"policy-m": ModelDemand(held=1)})
    assert made(context(0, []))[0] == 1  # its module is a copy, the board is not


# --- the ingress ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "open_requests", "lag_s", "expected"),
    [(1, 0, 0.0, 0.0), (1, 256, 0.01, 1.0), (2, 1024, 0.0, 4.0), (2, 10, 0.075, 3.0), (2, 10, 5.0, 4.0)],
)
def test_ingresses_follow_open_requests_and_lag(
    replicas: int, open_requests: float, lag_s: float, expected: float
) -> None:
    assert wanted_ingresses(replicas, open_requests, lag_s).replicas == pytest.approx(expected)


def test_an_ingress_is_added_for_open_requests(clock: list[float]) -> None:
    each = IngressPolicy(1, 4)
    assert each(context(1, [demand_values({}, 0.0)], requests=600.0))[0] == 3
    clock[0] += 1
    assert each(context(3, [], running=3, requests=600.0))[0] == 3  # none has reported yet
