"""Starting a node fails early, with what to do, where it cannot work; HAProxy runs as it should."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest
from ray import _raylet
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from serve_app.config import ClusterConfig
from serve_app.ray_node import RayNode, RayNodeError, client_timeout_s, serve_environment, write_haproxy_launcher
from tests.conftest import eventually

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


def test_haproxy_bounds_the_time_of_a_requests_headers_and_notices_a_lost_host(tmp_path: Path) -> None:
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(
        "defaults\n    mode http\n    timeout connect 5s\n    timeout server 5s\n"
        "    timeout client 65s\n    timeout http-request 10s\n"
        "listen clients\n    bind 127.0.0.1:8000\n"
    )
    write_haproxy_launcher(tmp_path / "haproxy")
    environment = serve_environment("haproxy", client_timeout_s(CONFIG), CONFIG.longest_drain_s)
    for _ in range(2):  # Ray may start it again with the same file
        subprocess.run(
            [tmp_path / "haproxy", "-V", "-c", "-f", configuration],
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
            timeout=30,
        )
    added = ("timeout http-request 65s", "option srvtcpka", "srvtcpka-idle 5s", "srvtcpka-intvl 2s", "srvtcpka-cnt 3")
    lines = "".join(f"    {line}\n" for line in ("timeout client 65s", *added))
    assert lines in configuration.read_text()
    assert configuration.read_text().count("srvtcpka") == 4
    assert "10s" not in configuration.read_text()


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


async def test_haproxy_closes_serves_own_routes_but_for_the_health_check(tmp_path: Path) -> None:
    """On Ray's own template."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rules = re.findall(r"(?m)^    (?:acl|http-request return).*(?:routes|routes_message.*)$", HAPROXY_CONFIG_TEMPLATE)
    assert len(rules) == 2
    rules[1] = re.sub(r'string ".*"', 'string "{}"', re.sub("{{ .*?content_type }}", "text/plain", rules[1]))
    rules[1] = re.sub("{{ .*?status }}", "200", rules[1])
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(
        "defaults\n    mode http\n    timeout connect 5s\n    timeout server 5s\n    timeout client 65s\n"
        f"frontend http_frontend\n    bind 127.0.0.1:{port}\n"
        "    http-request return status 200 content-type text/plain string success if { path -i /-/healthz }\n"
        + "\n".join(rules)
        + "\n    http-request return status 200 content-type text/plain string ingress\n"
    )
    write_haproxy_launcher(tmp_path / "haproxy")
    environment = {**os.environ, "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "65"}
    process = await asyncio.create_subprocess_exec(tmp_path / "haproxy", "-f", configuration, env=environment)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

            async def is_up() -> bool:
                try:
                    return (await client.get("/v1/models")).text == "ingress"
                except httpx.ConnectError:
                    return False

            await eventually(is_up, 10.0, every_s=0.05)
            assert (await client.get("/-/healthz")).text == "success"
            for path in ("/-/routes", "/-/ROUTES", "/%2d/routes", "/%2D%2froutes", "/-/healthz/", "/-/anything"):
                answer = await client.get(path)
                assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json"), path
                assert answer.json()["error"]["type"] == "invalid_request_error"
            assert (await client.get("/-routes")).text == "ingress"
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 10.0)


@pytest.mark.parametrize(
    ("host", "bound"), [("", "*:8000"), ("0.0.0.0", "0.0.0.0:8000"), ("::1", "::1:8000"), ("10.1.2.3", "10.1.2.3:8000")]
)
def test_haproxy_is_reached_where_it_is_told_and_its_own_metrics_on_this_machine_only(
    tmp_path: Path, host: str, bound: str
) -> None:
    """As Ray's template has them, in ray/serve/_private/haproxy_templates.py."""
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(
        "defaults\n    mode http\n    timeout connect 5s\n    timeout server 5s\n    timeout client 65s\n"
        "frontend prometheus\n    bind :9101\n    mode http\n"
        "    http-request use-service prometheus-exporter if { path /metrics }\n"
        "frontend http_frontend\n    bind *:8000\n    acl routes path -i /-/routes\n"
        "listen stats\n  bind *:8404\n  stats enable\n  stats uri /stats\n"
    )
    write_haproxy_launcher(tmp_path / "haproxy")
    subprocess.run(
        [tmp_path / "haproxy", "-c", "-f", configuration],
        env={**os.environ, "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "65", "MILLSTREAM_HTTP_HOST": host},
        check=True,
        capture_output=True,
        timeout=30,
    )
    binds = [line.strip() for line in configuration.read_text().splitlines() if "bind" in line]
    assert binds == ["bind 127.0.0.1:9101", f"bind {bound}", "bind 127.0.0.1:8404"]
