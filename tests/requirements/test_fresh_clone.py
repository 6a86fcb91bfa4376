"""Both commands of the README in a fresh clone, on a machine that is configured with no source of packages.

uv's cache is empty, as on a stranger's machine: the stand-in's address, another one each time, would fill it up.
With MILLSTREAM_THOROUGH=1 the model is converted too. That took 5.5 minutes on two busy cores.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import ROOT, THOROUGH, free_port, new_home
from tests.requirements.wheels import stranger, write_index

ONE_TEST = "test_everything_is_pinned_and_runs_as_nobody_in_particular"


@pytest.fixture
def pytorch_index(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What stands for PyTorch's index where pip is told of a CPU build; elsewhere the index itself serves."""
    locked = re.search(r"^torch==.*$", (ROOT / "requirements" / "cpu.lock").read_text(), re.MULTILINE)
    assert locked is not None
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(tmp_path / "wheel"), locked[0]]
    if subprocess.run(pip, stdout=subprocess.DEVNULL, check=False).returncode:
        yield {}
        return
    (wheel,) = (tmp_path / "wheel").iterdir()
    write_index(tmp_path / "index", wheel)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "index"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield {"MILLSTREAM_TORCH_INDEX": f"http://127.0.0.1:{server.server_port}"}
        server.shutdown()
        thread.join()


@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_both_commands_of_the_readme_work_in_a_fresh_clone(
    tmp_path: Path, smollm2: Path, pytorch_index: dict[str, str]
) -> None:
    clone, home = tmp_path / "clone", tmp_path / "home"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    home.mkdir()
    if not THOROUGH:
        new_home(smollm2, home)
    environment = stranger(MILLSTREAM_HOME=str(home), UV_CACHE_DIR=str(tmp_path / "cache"), **pytorch_index)
    try:
        begun = time.monotonic()
        with serving(clone, environment, tmp_path / "serve.txt") as (serve, curl):
            print(f"make serve: ready after {time.monotonic() - begun:.0f} s")
            answer = subprocess.run(
                ["bash", "-c", curl], env=environment, capture_output=True, text=True, timeout=60, check=False
            )
            assert " Paris" in answer.stdout, answer.stdout + answer.stderr
            os.killpg(serve.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
            serve.wait(90)
        assert "stopped: " in (tmp_path / "serve.txt").read_text()
        begun = time.monotonic()
        make = ["make", "test", f"ARGS=-k {ONE_TEST}"]
        tests = subprocess.run(
            make, cwd=clone, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        print(f"make test: {time.monotonic() - begun:.0f} s")
        assert tests.returncode == 0, tests.stdout + tests.stderr
        assert "1 passed" in tests.stdout
    finally:
        for folder in (clone, tmp_path / "cache", tmp_path / "wheel"):
            shutil.rmtree(folder, ignore_errors=True)  # 3 GB that pytest would keep


class serving:
    """`make serve` in a process group of its own; entered once it has printed its curl."""

    def __init__(self, clone: Path, environment: dict[str, str], output: Path) -> None:
        self.clone, self.environment, self.output = clone, environment, output

    def __enter__(self) -> tuple[subprocess.Popen[bytes], str]:
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                ["make", "serve", f"PORT={free_port()}"],
                cwd=self.clone,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"^curl (?:.*\\\n)*.*'\n", self.output.read_text(), re.MULTILINE)
            if found:
                return self.process, found[0]
            time.sleep(0.5)
        self.__exit__()
        raise AssertionError(self.output.read_text())

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            self.process.wait(90)
