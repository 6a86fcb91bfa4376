"""Starting a node fails early, with what to do, where it cannot work; Ray's settings are those that are meant."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil
import pytest
from ray import _raylet
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled

from loadtests.certificates import Authority
from serve_app.config import ClusterConfig, ClusterSection, HttpConfig
from serve_app.ray_node import RayNode, RayNodeError, client_timeout_s, serve_environment

CONFIG = ClusterConfig.model_validate({"models": [{"name": "m", "source": "/model", "engine": {"kind": "simulated"}}]})


def test_a_port_that_is_taken_is_told_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ClusterConfig.model_validate(
            {
                "cluster": {"http": {"host": "127.0.0.1", "port": port}},
                "models": [{"name": "m", "source": "/model", "engine": {"kind": "simulated"}}],
            }
        )
        with pytest.raises(RayNodeError, match=rf"cannot listen on 127.0.0.1:{port} .* with --port N"):
            RayNode.start(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("then", "told"), [("exit 3", "failed with status 3"), ("sleep 60", "did not end within 2 s")])
def test_a_ray_start_that_fails_or_hangs_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str, told: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho no GCS here\nsleep 60 &\n{then}\n")
    python.chmod(0o755)
    monkeypatch.setattr("serve_app.ray_node.sys.executable", str(python))
    monkeypatch.setattr("serve_app.ray_node._RAY_START_S", 2.0)
    with pytest.raises(RayNodeError, match=rf"(?s)`ray start` {told}; its logs are in .*\nno GCS here"):
        RayNode.start(CONFIG, tmp_path)
    assert RayNode.running(tmp_path) is None
    commands = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(python) in (command or [])]


@pytest.mark.parametrize(
    ("address", "changed", "said"),
    [
        ("10.0.0.1", {}, "cannot be used at 127.0.0.1: .*subject alternative names must have that address"),
        (
            "127.0.0.1",
            {"RAY_TLS_CA_CERT": ""},
            "RAY_TLS_CA_CERT must be the absolute path of a PEM file, got 'nothing'",
        ),
    ],
)
def test_certificates_that_ray_could_not_use_are_told_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, changed: dict[str, str], said: str
) -> None:
    certificates, home = tmp_path / "certificates", tmp_path / "home"
    home.mkdir()
    for name, value in {**Authority(certificates).environment("node", address), **changed}.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as free:
        config = CONFIG.model_copy(update={"cluster": ClusterSection(http=HttpConfig(port=free.getsockname()[1]))})
    with pytest.raises(RayNodeError, match=said):
        RayNode.start(config, home)
    assert list(home.iterdir()) == []


def test_rays_connections_outlast_a_host_that_ray_does_not_give_up() -> None:
    environment = serve_environment("none", client_timeout_s(CONFIG), CONFIG.longest_drain_s)
    # Ray ignores settings that it does not know, and lists those that it knows nowhere else.
    assert b"\0grpc_keepalive_timeout_ms\0" in Path(_raylet.__file__).read_bytes()
    gives_up_ms = Config.health_check_failure_threshold() * (
        Config.health_check_period_ms() + Config.health_check_timeout_ms()
    )
    assert gives_up_ms == 65_000
    # What was lost is sent again after pauses that double: of 0.2 s at first, 102 s after the first loss if 65 s were
    # too short.
    assert int(environment["RAY_grpc_keepalive_timeout_ms"]) > 102_000
