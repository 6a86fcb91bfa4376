"""Which cluster a command speaks of, on one machine and in a pod, and what it says where there is none."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.cli import app
from serve_app.ray_node import RayNode
from serve_app.running_cluster import (
    POD_CLUSTER,
    POD_DATABASE,
    POD_HTTP_PORT,
    ClusterNotFound,
    RunningCluster,
    database_of_cluster,
    find_cluster,
)

POD = {
    POD_CLUSTER: "prod",
    POD_DATABASE: "env://LEDGER",
    POD_HTTP_PORT: "8000",
    "FQ_RAY_IP": "prod-head-svc.ns.svc.cluster.local",
    "RAY_AUTH_TOKEN": "token",
}
OTHER_POD = {name: text for name, text in POD.items() if name not in (POD_DATABASE, POD_HTTP_PORT)}


def test_on_one_machine_it_is_what_up_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray.token").write_text("token\n")
    node = RayNode("id", "demo", "0.0.0.0", 8000, 1, 2, "haproxy", 65, 600.0, "/tmp/x", str(tmp_path / "ray.token"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cluster.json").write_text(json.dumps(asdict(node)))
    with pytest.raises(ClusterNotFound, match="millstream up"):
        find_cluster(tmp_path, {})  # none of its processes is alive
    monkeypatch.setattr(RayNode, "running", lambda _home: node)
    assert find_cluster(tmp_path, {}) == RunningCluster(
        "demo", "http://0.0.0.0:8000", "http://127.0.0.1:8000", "http://127.0.0.1:2", "token"
    )
    assert database_of_cluster(tmp_path, {}) == f"sqlite:///{tmp_path}/ledger.db"
    (tmp_path / "run" / "database").write_text("postgresql://host/db\n")
    assert database_of_cluster(tmp_path, {}) == "postgresql://host/db"


def test_in_a_pod_it_is_the_pods_cluster_whatever_lies_in_the_home(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "database").write_text("sqlite:////other.db")
    assert find_cluster(tmp_path, POD) == RunningCluster(
        "prod",
        "http://prod",
        "http://127.0.0.1:8000",
        "http://prod-head-svc.ns.svc.cluster.local:8265",
        "token",
    )
    assert database_of_cluster(tmp_path, POD) == "env://LEDGER"


@pytest.mark.parametrize("missing", ["FQ_RAY_IP", "RAY_AUTH_TOKEN"])
def test_what_kuberay_should_have_set_is_named(tmp_path: Path, missing: str) -> None:
    environment = {name: text for name, text in POD.items() if name != missing}
    with pytest.raises(ClusterNotFound, match=f"not set {missing} in this container"):
        find_cluster(tmp_path, environment)


def run(home: Path, environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Its status and what it says on standard error."""
    result = CliRunner().invoke(app, arguments, env={"MILLSTREAM_HOME": str(home), **environment})
    assert result.stdout == ""
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    "command",
    [("status",), ("calibrate",), ("keys", "list"), ("keys", "create", "k"), ("teams", "list"), ("usage",)],
    ids=" ".join,
)
def test_in_another_pod_commands_say_where_they_work_and_make_nothing(tmp_path: Path, command: tuple[str, ...]) -> None:
    status, told = run(tmp_path, OTHER_POD, *command)
    assert (status, told.count("\n")) == (1, 1)
    assert "instance=prod,millstream-group=meter) -- millstream" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("up", "cluster.yaml"), ("down",)], ids=" ".join)
def test_what_kuberay_starts_and_ends_is_left_to_it(tmp_path: Path, command: tuple[str, ...]) -> None:
    status, told = run(tmp_path, POD, *command)
    assert (status, told.count("\n")) == (1, 1)
    assert "kubectl apply -k" in told


def test_keys_teams_and_usage_in_the_meters_pod_are_of_the_clusters_database(tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = {"MILLSTREAM_HOME": str(home), **POD, "LEDGER": f"sqlite:///{tmp_path}/pod.db"}
    for command in (("keys", "create", "k"), ("teams", "set", "t", "--concurrency", "2"), ("usage",)):
        result = CliRunner().invoke(app, command, env=environment)
        assert result.exit_code == 0, result.stderr
    listed = CliRunner().invoke(app, ["keys", "list", "--json"], env=environment)
    assert [key["name"] for key in json.loads(listed.stdout)] == ["k"]
    assert (tmp_path / "pod.db").exists()
    assert list(home.iterdir()) == []
