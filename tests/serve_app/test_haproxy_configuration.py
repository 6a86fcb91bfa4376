"""HAProxy with the configuration that Ray's own code writes: what Millstream changes in it holds, or HAProxy does not
start."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from serve_app.haproxy_configuration import UnknownConfiguration, refusals, rewritten
from serve_app.ray_node import write_haproxy_launcher
from tests.conftest import eventually

ENVIRONMENT = {"RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "65"}


def rays_file(folder: Path, ports: tuple[int, int, int] = (8000, 9101, 8404), ingress_port: int = 9) -> Path:
    """As Ray writes it for one ingress replica, with `ports` for clients, metrics and statistics."""
    file = folder / "node" / "haproxy.cfg"
    backend = BackendConfig(
        name="http-gateway",
        path_prefix="/",
        app_name="gateway",
        servers=[ServerConfig("ingress", "127.0.0.1", ingress_port)],
    )
    configuration = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=ports[0]),
        metrics_port=ports[1],
        stats_port=ports[2],
        timeout_client_s=65,
        socket_path=str(file.with_name("admin.sock")),
        metrics_socket_path=str(file.with_name("metrics.sock")),
        server_state_base=str(file.parent),
        server_state_file=str(file.with_name("server-state")),
        has_received_routes=True,
        has_received_servers=True,
    )
    HAProxyApi(configuration, {backend.name: backend}, str(file))._generate_config_file_internal()
    return file


def checked(file: Path, environment: Mapping[str, str] = ENVIRONMENT) -> subprocess.CompletedProcess[str]:
    """By HAProxy itself, started by the launcher."""
    launcher = file.parent / "haproxy"
    write_haproxy_launcher(launcher)
    return subprocess.run(
        [launcher, "-c", "-f", file],
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_the_time_of_a_requests_headers_is_bounded_and_a_lost_host_noticed(tmp_path: Path) -> None:
    file = rays_file(tmp_path)
    for _ in range(2):  # Ray may start it again with the same file
        assert checked(file).returncode == 0
    added = ("timeout http-request 65s", "option srvtcpka", "srvtcpka-idle 5s", "srvtcpka-intvl 2s", "srvtcpka-cnt 3")
    assert "".join(f"    {line}\n" for line in ("timeout client 65s", *added)) in file.read_text()
    assert file.read_text().count("srvtcpka") == 4


@pytest.mark.parametrize(
    ("host", "bound"),
    [("", "127.0.0.1:8000"), ("0.0.0.0", "0.0.0.0:8000"), ("::1", "::1:8000"), ("10.1.2.3", "10.1.2.3:8000")],
)
def test_it_is_reached_where_it_is_told_and_its_own_metrics_on_this_machine_only(
    tmp_path: Path, host: str, bound: str
) -> None:
    file = rays_file(tmp_path)
    assert checked(file, {**ENVIRONMENT, "MILLSTREAM_HTTP_HOST": host}).returncode == 0
    binds = re.findall(r"(?m)^ *bind (.*)$", file.read_text())
    assert binds == ["127.0.0.1:9101", bound, "127.0.0.1:8404"]


@asynccontextmanager
async def ingress() -> AsyncIterator[int]:
    """The port of one that answers every request alike."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\ningress")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def test_serves_own_routes_are_closed_but_for_the_health_check(tmp_path: Path) -> None:
    with ExitStack() as taken:
        free = [taken.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        port, *others = (each.getsockname()[1] for each in free)
    async with ingress() as ingress_port:
        file = rays_file(tmp_path, (port, others[0], others[1]), ingress_port)
        launcher = tmp_path / "haproxy"
        write_haproxy_launcher(launcher)
        process = await asyncio.create_subprocess_exec(launcher, "-f", file, env={**os.environ, **ENVIRONMENT})
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

                async def is_up() -> bool:
                    try:
                        return (await client.get("/-/healthz")).text == "success"
                    except httpx.ConnectError:
                        return False

                await eventually(is_up, 10.0, every_s=0.05)
                for path in ("/-/routes", "/-/ROUTES", "/%2d/routes", "/%2D%2froutes", "/-/healthz/", "/-/anything"):
                    answer = await client.get(path)
                    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json"), path
                    assert answer.json()["error"]["type"] == "invalid_request_error"
                for path in ("/v1/models", "/-routes"):
                    assert (await client.get(path)).text == "ingress"
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), 10.0)


@pytest.mark.parametrize(
    ("line", "other", "words"),
    [
        (r"^    timeout client .*\n", "", "`defaults` has 0 lines"),
        (r"^defaults$", "defaults http", "the section `defaults` is not in it"),
        (r"^    bind :9101$", "    bind :9101 ssl", "`frontend prometheus` has 0 lines"),
        (r"^frontend prometheus$", "frontend exporter", "the section `frontend prometheus` is not in it"),
        (r"^    bind 127.0.0.1:8000$", r"\g<0>\n    bind :8001", "`frontend http_frontend` has 2 lines"),
        (r"^  bind \*:8404\n", "", "`listen stats` has 0 lines"),
        (r"^    acl routes .*\n", "", "`frontend http_frontend` has 0 lines"),
        (r"^(    http-request return .*) if routes$", r"\1 if is_routes", "`frontend http_frontend` has 0 lines"),
        (r"\Z", "listen admin\n    bind *:9999\n", "it listens in `listen admin`"),
        (r"\Z", "listen stats\n    bind *:9999\n", "the section `listen stats` stands in it twice"),
    ],
)
def test_haproxy_does_not_start_with_a_file_that_is_not_known(
    tmp_path: Path, line: str, other: str, words: str
) -> None:
    file = rays_file(tmp_path)
    changed, count = re.subn(line, other, file.read_text(), flags=re.MULTILINE)
    assert count == 1
    file.write_text(changed)
    result = checked(file)
    assert (result.returncode, result.stdout) == (1, "")  # HAProxy itself would have said more
    assert words in result.stderr
    assert "requirements/cpu.lock" in result.stderr
    assert refusals(tmp_path) == [result.stderr.rstrip("\n")]
    assert file.read_text() == changed
    rays_file(tmp_path)
    assert checked(file).returncode == 0
    assert refusals(tmp_path) == []


def test_it_does_not_start_without_the_time_that_a_client_has(tmp_path: Path) -> None:
    with pytest.raises(UnknownConfiguration, match="RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S is not set"):
        rewritten(rays_file(tmp_path).read_text(), {})
