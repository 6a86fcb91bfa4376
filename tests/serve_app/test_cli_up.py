"""`millstream up` that does not come up: the reason, where to look, and a status other than 0. Without Ray."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from serve_app.cli import app
from serve_app.ray_node import RayNode
from serve_app.serve_api import Application, Resources, ServeApiError, ServeReplica

DEPLOYING = Application(
    "model-m",
    "DEPLOYING",
    "",
    {"Engine": [ServeReplica("r", "STARTING", "", None)]},
    {"Engine": "Loading the weights."},
    {"Engine": 1},
    {"Engine": {"CPU": 4.0}},
)

UP = sys.modules["serve_app.cli.up"]
"""`serve_app.cli.up` is the command of that name."""


class SlowServe:
    """Serve's API of a cluster whose model never comes up."""

    failures = 0
    """How many of the next questions are not answered."""

    def __init__(self, _url: str, _token: str) -> None: ...

    def wait_until_up(self, _limit_s: float) -> None: ...

    refuses = False

    def apply(self, _config: dict[str, Any]) -> None:
        if self.refuses:
            raise ServeApiError("Ray Serve refused: a traceback")

    def applications(self) -> list[Application]:
        if self.failures:
            SlowServe.failures -= 1
            raise ServeApiError("Ray Serve's REST API does not answer: ReadTimeout")
        return [DEPLOYING]

    def resources(self, _applications: list[Application]) -> Resources:
        return Resources([{"CPU": 2.0}], {"CPU": 2.0})


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayNode]:
    """One that `up` takes for started."""
    (tmp_path / "ray.token").write_text("token")
    folder = tmp_path / "ray"
    (folder / "node").mkdir(parents=True)
    node = RayNode("id", "m", "127.0.0.1", 8000, 1, 2, "haproxy", 65, 600.0, str(folder), str(tmp_path / "ray.token"))
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path))
    monkeypatch.setattr(RayNode, "start", lambda *_: node)
    monkeypatch.setattr(UP, "ServeApi", SlowServe)
    monkeypatch.setattr(UP, "_POLL_S", 0.01)
    monkeypatch.setattr(SlowServe, "failures", 0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield node
    for number, handler in handlers.items():
        signal.signal(number, handler)


def up(tmp_path: Path, *arguments: str) -> Result:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    file = tmp_path / "cluster.yaml"
    file.write_text("models: [{name: m, source: ./model, engine: {kind: simulated, max_model_len: 512}}]")
    return CliRunner().invoke(app, ["up", str(file), *arguments])


def test_what_is_not_up_in_time_is_told_with_the_limit_the_reason_and_the_logs(tmp_path: Path, node: RayNode) -> None:
    result = up(tmp_path, "--timeout", "0.1")
    assert result.exit_code == 1
    for words in (
        "The cluster did not start: not up within 0.1 s, which --timeout SECONDS raises",
        "model-m 0/1",
        "1 of 1 replicas have no place",
        "model-m is DEPLOYING: Loading the weights.",
        f"The replicas' logs: {node.folder}/session_latest/logs/serve",
    ):
        assert words in result.stderr
    assert Path(node.folder).is_dir()  # with the logs


def test_an_api_that_is_late_on_a_busy_machine_ends_nothing(
    tmp_path: Path, node: RayNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlowServe, "failures", 3)
    result = up(tmp_path, "--timeout", "0.3")
    assert "unknown: Ray Serve's REST API does not answer" in result.stdout
    assert "not up within 0.3 s" in result.stderr


def test_an_api_that_has_ended_is_told(tmp_path: Path, node: RayNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowServe, "failures", 1_000_000)
    monkeypatch.setattr(UP, "_API_LIMIT_S", 0.1)
    result = up(tmp_path)
    assert result.exit_code == 1
    assert "The cluster did not start: Ray Serve's REST API does not answer" in result.stderr


@pytest.mark.parametrize("refuses", [False, True])
def test_a_proxy_that_was_refused_is_told_at_once(
    tmp_path: Path, node: RayNode, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    monkeypatch.setattr(SlowServe, "refuses", refuses)
    (Path(node.folder) / "node" / "haproxy.cfg.refused").write_text("HAProxy was not started: because")
    result = up(tmp_path)
    assert result.exit_code == 1
    assert "The cluster did not start: HAProxy was not started: because\n" in result.stderr
    assert "traceback" not in result.stderr


def test_what_serve_refuses_is_told(tmp_path: Path, node: RayNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowServe, "refuses", True)
    assert "The cluster did not start: Ray Serve refused: a traceback\n" in up(tmp_path).stderr
