"""The short form of the rehearsal; `make rehearsal` runs all of it."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from tests.conftest import ROOT
from tests.postgres import postgres_binaries

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

_COMMAND = [sys.executable, "-m", "tests.rehearsal"]
_PROBE = """
set -e
ip link add name probe type bridge
nft add table inet probe
mount -t tmpfs tmpfs /mnt
mkdir /mnt/bin
mount -t overlay overlay -o lowerdir=/mnt/bin:/usr/local/bin /usr/local/bin
unshare --user --map-user=1000 --map-group=1000 true
"""


@pytest.fixture(scope="module", autouse=True)
def _hosts_can_be_made() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes network namespaces")
    missing = [name for name in ("ip", "nft", "unshare", "nsenter", "redis-server") if shutil.which(name) is None]
    if missing or postgres_binaries() is None:
        pytest.skip(f"not on this machine: {', '.join(missing) or 'postgresql'}")
    probe = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "/bin/sh", "-c", _PROBE]
    result = subprocess.run(probe, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"no namespaces, packet filters or overlays can be made here: {result.stderr.strip()}")


def test_clients_notice_nothing_when_a_host_is_lost_and_strangers_reach_nothing_but_the_proxies() -> None:
    result = subprocess.run([*_COMMAND, "--short"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" 0 failed") == 2, result.stdout
    assert "only port 8000 can be reached" in result.stdout
    assert "none missing" in result.stdout


def test_nothing_is_left_after_ctrl_c() -> None:
    process = subprocess.Popen(
        _COMMAND, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    with process:
        assert process.stdout is not None
        lines = iter(process.stdout)
        told = list(itertools.takewhile(lambda line: "] pods: " not in line, lines))
        started = psutil.Process(process.pid).children(recursive=True)
        assert any(each.name() == "gcs_server" for each in started), told
        os.killpg(process.pid, signal.SIGINT)
        told += lines
        assert process.wait(60.0) == 130, told
    assert [each for each in started if each.is_running()] == []
