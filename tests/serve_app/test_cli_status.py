"""`millstream status` in the meter's pod of a rendered cluster: whom it asks, what it shows when one is silent."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from typer.testing import CliRunner, Result

from deployments.scaling.scaling_board import ShownDecision
from serve_app.cli import app
from tests.serve_app.test_running_cluster import POD

HEAD, POD_ITSELF = POD["FQ_RAY_IP"], "127.0.0.1"
ENGINE = {"id": "r0", "model": "a", "in_rotation": True, "running": 5, "waiting": 1}
LOAD = {**ENGINE, "kv_blocks_total": 100, "kv_blocks_free": 75}


class Cluster:
    """Serve's REST API and Ray's logs at the head, and the cluster's own API at the pod's proxy."""

    def __init__(self) -> None:
        self.silent: set[str] = set()
        """Paths that answer 503."""
        now = time.time()
        self.decision = ShownDecision("model-a", 2, "the queue", now, now - 60, 1, "prompts waited")

    def answer(self, request: httpx.Request) -> httpx.Response:
        host, path = request.url.host, request.url.path
        if path in self.silent:
            return httpx.Response(503, text="not now")
        key = {HEAD: "Bearer token", POD_ITSELF: "Bearer sk-admin"}[host]
        assert request.headers["authorization"] == key
        answers: dict[tuple[str, int | None, str], Any] = {
            (HEAD, 8265, "/api/serve/applications/"): self._applications(),
            (HEAD, 8265, "/api/v0/nodes"): {
                "data": {"result": {"result": [{"state": "ALIVE", "resources_total": {"CPU": 1.0}}]}}
            },
            (HEAD, 8265, "/api/v0/logs"): {"data": {"result": {"internal": ["serve/scaling-model-a.json"]}}},
            (HEAD, 8265, "/api/v0/logs/file"): msgspec.to_builtins(self.decision),
            (POD_ITSELF, 8000, "/admin/v1/replicas"): {"data": [LOAD]},
        }
        return httpx.Response(200, json=answers[host, request.url.port, path])

    def _applications(self) -> dict[str, Any]:
        replica = {"replica_id": "r0", "state": "RUNNING", "node_ip": "10.1.2.3", "pid": 7}
        engine = {"target_num_replicas": 2, "replicas": [replica]}
        return {
            "controller_info": {"node_id": "head"},
            "applications": {"model-a": {"status": "RUNNING", "deployments": {"Engine": engine}}},
        }


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    connect = httpx.Client

    def connected(**options: Any) -> httpx.Client:
        return connect(**options | {"transport": httpx.MockTransport(cluster.answer)})

    monkeypatch.setattr("httpx.Client", connected)
    return cluster


def status(home: Path, *arguments: str) -> Result:
    environment = {"MILLSTREAM_HOME": str(home), "MILLSTREAM_ADMIN_KEY": "sk-admin", **POD}
    return CliRunner().invoke(app, ["status", *arguments], env=environment)


@pytest.mark.usefixtures("cluster")
def test_replicas_loads_and_decisions_are_shown(tmp_path: Path) -> None:
    shown = status(tmp_path)
    assert (shown.exit_code, shown.stderr) == (0, "")
    for words in (
        "cluster prod at http://prod/v1",
        "model-a  RUNNING",
        "1/2 replicas",
        "10.1.2.3",
        "5 running, 1 waiting, KV 25%",
        "scaled to 2: the queue",
        "ago from 1: prompts waited",
    ):
        assert words in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_has_the_same(cluster: Cluster, tmp_path: Path) -> None:
    described = json.loads(status(tmp_path, "--json").stdout)
    assert (described["cluster"], described["url"]) == ("prod", "http://prod/v1")
    [application] = described["applications"]
    assert application["scaling"] == msgspec.to_builtins(cluster.decision)
    [deployment] = application["deployments"]
    assert deployment["replicas"] == [{"id": "r0", "state": "RUNNING", "node": "10.1.2.3", "pid": 7, "load": LOAD}]


@pytest.mark.parametrize(
    ("silent", "warning", "missing"),
    [
        ("/admin/v1/replicas", "no load to show", "5 running"),
        ("/api/v0/logs", "no scaling decisions to show", "scaled to"),
        ("/api/v0/logs/file", "no scaling decisions to show", "scaled to"),
    ],
)
def test_what_cannot_be_asked_is_missing_and_the_rest_is_shown(
    cluster: Cluster, tmp_path: Path, silent: str, warning: str, missing: str
) -> None:
    cluster.silent = {silent}
    shown = status(tmp_path)
    assert shown.exit_code == 0
    assert shown.stderr.startswith(f"warning: {warning}: ")
    assert "1/2 replicas" in shown.stdout
    assert missing not in shown.stdout


def test_without_serve_there_is_no_status(cluster: Cluster, tmp_path: Path) -> None:
    cluster.silent = {"/api/serve/applications/"}
    shown = status(tmp_path)
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert shown.stderr == "Ray Serve refused: not now\n"
