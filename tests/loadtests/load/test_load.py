"""What a load test counts: distributions that add up, the report made of them, and locust itself on a cluster."""

from __future__ import annotations

import csv
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadtests.load.endpoint import Served
from loadtests.load.prompts import Lengths
from loadtests.load.report import Report, Sample, html, write_report
from loadtests.load.token_metrics import Distribution, TokenMetrics
from tests.conftest import ROOT, RunningCluster


def test_percentiles_are_right_within_a_percent_and_a_half() -> None:
    source, distribution = random.Random(5), Distribution()
    values = sorted(source.lognormvariate(-3, 1.5) for _ in range(20_000))
    for value in values:
        distribution.add(value)
    for percent in (1, 50, 90, 99, 99.9):
        exact = values[int(percent / 100 * len(values)) - 1]
        assert distribution.percentile(percent) == pytest.approx(exact, rel=0.015)
    assert distribution.mean() == pytest.approx(sum(values) / len(values))
    assert len(distribution.buckets) < 1000, "bounded, however much is added"


def test_metrics_of_several_processes_add_up() -> None:
    together, apart = TokenMetrics(), [TokenMetrics() for _ in range(3)]
    for number in range(30):
        for metrics in (together, apart[number % 3]):
            metrics.end_to_end_s.add(0.125 + number)  # adds up without rounding
            metrics.late_s.add(0.25)
            metrics.first_token(1000.0 + number % 7, 0.5 + number)
            metrics.between_tokens(1000.0 + number % 5, 0.5 + number)
            metrics.at(1000 + number % 4).tokens += number
            metrics.bunched += 1
            metrics.abandoned += number
            if number % 5 == 0:
                metrics.fail(1000.0 + number % 4, "why")
    merged = TokenMetrics()
    for metrics in apart:
        merged.merge(msgspec.msgpack.decode(msgspec.msgpack.encode(metrics), type=TokenMetrics))
    assert merged == together


def test_a_request_under_way_while_its_process_reports_is_counted_the_next_time() -> None:
    metrics = TokenMetrics(interval_s=5)
    under_way = metrics  # what a request counts into is given to it when it begins
    metrics.fail(1000.0, "before")
    assert metrics.take().errors == {"before": 1}
    under_way.fail(1001.0, "after")
    taken = metrics.take()
    assert (taken.errors, taken.requests, taken.interval_s) == ({"after": 1}, 1, 5)
    assert metrics == TokenMetrics(interval_s=5)


def test_rates_are_over_all_the_time_and_not_only_where_something_happened() -> None:
    metrics = TokenMetrics(interval_s=10)
    for now in (1005.0, 1091.0):
        metrics.fail(now, "why")
    assert sorted(metrics.timeline) == [1000, 1090]
    assert metrics.duration_s == 100
    assert metrics.summary()["requests/s"] == pytest.approx(0.02)


def some_metrics() -> TokenMetrics:
    metrics = TokenMetrics()
    for number in range(1, 50):
        metrics.at(1000 + number // 5).begun += 1
        metrics.first_token(1000 + number // 5, number / 1000)
        metrics.between_tokens(1000 + number // 5, number / 1000)
        metrics.end_to_end_s.add(number / 1000)
        metrics.requests += 1
        metrics.at(1001 + number // 5).ended += 1
    return metrics


SERVED = Served("m", Lengths(1.3, 1.0), exact_tokens=True, continuous_usage=True)


def report_of(metrics: TokenMetrics, samples: list[Sample], **fields: Any) -> Report:
    given: dict[str, Any] = {"scenario": "chat", "description": "d", "host": "http://h", "served": SERVED, **fields}
    return Report(metrics=metrics, samples=samples, **given)


def test_a_report_needs_nothing_beside_it_and_escapes_what_servers_say(tmp_path: Path) -> None:
    metrics = some_metrics()
    metrics.fail(1002.0, "502: <script>")
    cards = [{"model": "m", "in_rotation": True, "running": 1, "waiting": 0}]
    report = report_of(metrics, [Sample.of(1001.0, cards), Sample.of(1002.0, cards)])
    write_report(report, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    titles = re.findall("<section><h2>(.*?)</h2><svg", page)
    assert titles == [
        *("Latency by percentile", "Latency over time", "Throughput", "Requests and errors", "Concurrency"),
        "Replicas in rotation",
    ]
    assert "502: &lt;script&gt;" in page
    assert "src=" not in page
    assert 'href="http' not in page
    assert msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=Report) == report


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time that a report takes is that of its plots."""
    monkeypatch.setattr("loadtests.load.report.svg", lambda _draw, _duration_s: "<svg></svg>")


@pytest.mark.usefixtures("undrawn")
def test_a_report_says_what_could_not_be_known() -> None:
    page = html(report_of(some_metrics(), [], served=Served("m", Lengths(1.3, 1.0), False, False)))
    assert "Replicas over time: not told by this server" in page
    assert "ignore_eos is not asked for or not taken" in page
    assert "chunks tell no tokens" in page


@pytest.mark.usefixtures("undrawn")
def test_a_report_warns_of_a_load_generator_that_was_too_slow() -> None:
    metrics = some_metrics()
    for _ in range(100):
        metrics.late_s.add(0.001)
    assert "generator was too slow" not in html(report_of(metrics, []))
    assert "Locust was short of CPU time" in html(report_of(metrics, [], generator_busy=True))
    metrics.late_s.add(0.5)
    metrics.late_s.add(0.5)
    assert "generator was too slow" in html(report_of(metrics, []))


def test_a_report_of_nothing_can_be_made() -> None:
    page = html(report_of(TokenMetrics(), []))
    assert "<b>– ms</b>first token, median" in page


# --- locust itself ----------------------------------------------------------------------------------------------------


def run_locust(cluster: RunningCluster, report: Path, *options: str) -> tuple[Report, str]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", "loadtests/load/locustfile.py", "--headless", "--only-summary"),
            *("--host", cluster.url, "--key", cluster.key, "--model", "sim-a", "--report", str(report)),
            *("--stop-timeout", "60", *options),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return msgspec.json.decode(report.with_suffix(".json").read_bytes(), type=Report), done.stderr


@pytest.mark.cluster
@pytest.mark.timeout(120)
def test_workers_share_a_trace_and_their_figures_add_up(simulated_cluster: RunningCluster, tmp_path: Path) -> None:
    rows = [(number * 0.05, 10 + number % 30, 5 + number % 40) for number in range(80)]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("at_s", "prompt_tokens", "max_tokens"), *rows])
    (tmp_path / "s.yaml").write_text("description: d\ntrace: {file: t.csv}\n")
    scenario = str(tmp_path / "s.yaml")
    report, _ = run_locust(simulated_cluster, tmp_path / "r.html", "--scenario", scenario, "--processes", "2")
    metrics = report.metrics
    assert (metrics.requests, metrics.errors) == (80, {})
    assert metrics.completion_tokens == sum(most for _, _, most in rows)
    assert metrics.prompt_tokens == pytest.approx(sum(prompt for _, prompt, _ in rows), rel=0.1)
    assert metrics.first_token_s.count == 80
    assert {sample.replicas["sim-a"] for sample in report.samples} == {3}


@pytest.mark.cluster
@pytest.mark.timeout(120)
def test_a_closed_loop_follows_its_stages(simulated_cluster: RunningCluster, tmp_path: Path) -> None:
    options = ("--scenario", "sessions", "--seconds", "4")
    report, _ = run_locust(simulated_cluster, tmp_path / "r.html", *options)
    metrics = report.metrics
    assert metrics.errors == {}
    assert metrics.requests > 24
    assert metrics.prompt_tokens / metrics.requests > 600  # the shared prefix
    assert metrics.prompt_tokens == pytest.approx(metrics.asked_prompt_tokens, rel=0.1)
