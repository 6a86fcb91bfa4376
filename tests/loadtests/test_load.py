"""What a load test counts: each completion's checks, distributions that add up, and the report made of them."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import msgspec
import pytest
from geventhttpclient import HTTPClient

from loadtests.completions import Failed, Request, complete
from loadtests.load_report import Report, Sample, html, write_report
from loadtests.token_metrics import Distribution, TokenMetrics
from tests.conftest import ROOT, RunningCluster

DONE = "data: [DONE]\n\n"


def event(text: str | None = None, tokens: int | None = None) -> str:
    choices = [] if text is None else [{"index": 0, "text": text}]
    usage = None if tokens is None else {"prompt_tokens": 7, "completion_tokens": tokens}
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n"


class Server:
    """Answers every request the same, as geventhttpclient would hand it out."""

    def __init__(self, answer: Sequence[str], status: int = 200) -> None:
        self.status_code = status
        self._answer = list(answer)
        self.asked: dict[str, Any] = {}

    def request(self, _method: str, _path: str, body: str, headers: dict[str, str]) -> Self:
        self.asked = json.loads(body)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def readline(self, _separator: bytes) -> bytes:
        return self._answer.pop(0).encode() if self._answer else b""

    def read(self) -> bytes:
        return "".join(self._answer).encode()


def ask(server: Server, metrics: TokenMetrics, **fields: Any) -> Any:
    request = Request(**{"model": "m", "prompt": "p", "prompt_tokens": 6, "max_tokens": 2, **fields})
    return complete(cast(HTTPClient, server), "/v1/completions", {}, request, metrics)


def test_a_stream_is_timed_and_counted() -> None:
    metrics = TokenMetrics()
    server = Server([": keep-alive\n\n", event("one "), event(""), event("two"), event(tokens=2), DONE])
    done = ask(server, metrics)
    assert (done.text, done.prompt_tokens, done.completion_tokens) == ("one two", 7, 2)
    assert server.asked["stream_options"] == {"include_usage": True}
    assert (metrics.requests, metrics.failed, metrics.first_token_s.count, metrics.between_tokens_s.count) == (
        1,
        0,
        1,
        1,
    )
    assert (metrics.asked_prompt_tokens, metrics.prompt_tokens, metrics.completion_tokens) == (6, 7, 2)
    assert sum(second.tokens for second in metrics.seconds.values()) == 2
    assert sum(second.begun - second.ended for second in metrics.seconds.values()) == 0


def test_an_answer_in_one_piece_is_counted() -> None:
    metrics = TokenMetrics()
    answer = {"choices": [{"text": "ab"}], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
    assert ask(Server([json.dumps(answer)]), metrics, stream=False).completion_tokens == 2
    assert (metrics.completion_tokens, metrics.first_token_s.count) == (2, 0)


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        ([event("a"), event(tokens=2)], 200, "the stream ended without [DONE]"),
        ([event("a"), DONE], 200, "the stream told no usage"),
        ([event("a"), event(tokens=1), DONE], 200, "not as many tokens as were asked for"),
        ([event("a"), event(tokens=3), DONE], 200, "not as many tokens as were asked for"),
        (['data: {"error": {"code": "overloaded"}}\n\n'], 200, "error in the stream: overloaded"),
        (['{"error": {"type": "rate_limit_exceeded"}}'], 429, "429: rate_limit_exceeded"),
        (["<html>"], 502, "502: no OpenAI error"),
    ],
)
def test_what_is_wrong_with_an_answer_is_counted_by_its_reason(answer: list[str], status: int, reason: str) -> None:
    metrics = TokenMetrics()
    with pytest.raises(Failed, match=reason.replace("[", r"\[")):
        ask(Server(answer, status), metrics)
    assert metrics.errors == {reason: 1}
    assert (metrics.requests, metrics.completion_tokens) == (1, 0)


def test_fewer_tokens_are_right_where_the_model_may_stop() -> None:
    metrics = TokenMetrics()
    ask(Server([event("a"), event(tokens=1), DONE]), metrics, exact_tokens=False)
    assert metrics.failed == 0
    with pytest.raises(Failed, match="more than as many tokens"):
        ask(Server([event("a"), event(tokens=3), DONE]), metrics, exact_tokens=False)


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
            metrics.second(1000 + number % 4).tokens += number
            if number % 5 == 0:
                metrics.fail(1000.0 + number % 4, "why")
    merged = TokenMetrics()
    for metrics in apart:
        merged.merge(msgspec.msgpack.decode(msgspec.msgpack.encode(metrics), type=TokenMetrics))
    assert merged == together


def some_metrics() -> TokenMetrics:
    metrics = TokenMetrics()
    for number in range(1, 50):
        metrics.second(1000 + number // 5).begun += 1
        for distribution in (metrics.first_token_s, metrics.between_tokens_s, metrics.end_to_end_s):
            distribution.add(number / 1000)
        metrics.requests += 1
        metrics.second(1001 + number // 5).ended += 1
    return metrics


def report_of(metrics: TokenMetrics, samples: list[Sample]) -> Report:
    return Report(scenario="chat", description="d", host="http://h", model="m", metrics=metrics, samples=samples)


def test_a_report_needs_nothing_beside_it_and_escapes_what_servers_say(tmp_path: Path) -> None:
    metrics = some_metrics()
    metrics.fail(1002.0, "502: <script>")
    cards = [{"model": "m", "in_rotation": True, "running": 1, "waiting": 0}]
    report = report_of(metrics, [Sample.of(1001.0, cards), Sample.of(1002.0, cards)])
    write_report(report, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 5
    assert "Replicas in rotation" in page
    assert "502: &lt;script&gt;" in page
    assert "src=" not in page
    assert 'href="http' not in page
    assert msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=Report) == report


def test_a_report_of_another_server_says_that_replicas_are_unknown() -> None:
    page = html(report_of(some_metrics(), []))
    assert "Replicas over time: not told by this server" in page
    assert "None: every stream ended with [DONE]" in page


def test_a_report_of_nothing_can_be_made() -> None:
    assert "<svg" in html(report_of(TokenMetrics(), []))


# --- locust itself ----------------------------------------------------------------------------------------------------


def run_locust(cluster: RunningCluster, report: Path, *options: str) -> tuple[Report, str]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary"),
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
