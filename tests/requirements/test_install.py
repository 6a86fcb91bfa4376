"""requirements/install.sh on machines unlike ours: where torch comes from, which Python, and what is never called done.

It runs from a tree of its own, with a lock of its own that names wheels of a few hundred bytes; uv is the real one.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.requirements.wheels import stranger, write_index, write_wheel

ROOT = Path(__file__).parents[2]
CUDA_LIKE = 'raise ImportError("libcudnn.so.9: cannot open shared object file: No such file or directory")\n'
LOCK = "setuptools==78.1.1\ntorch==2.13.0+cpu\nvllm-stand-in==1.0\n"
PYPROJECT = '[project]\nname = "tree"\nversion = "1"\n[tool.setuptools]\npy-modules = []\n'

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@dataclass(frozen=True)
class Tree:
    """A checkout with nothing but the installer, and a folder in which pip is told to look."""

    root: Path
    configured: Path

    @property
    def stamp(self) -> Path:
        return self.root / ".venv" / ".cpu-installed"

    def install(self, **added: str) -> subprocess.CompletedProcess[str]:
        """`requirements/install.sh cpu`; stdout and stderr together, as a terminal has them."""
        environment = stranger(PIP_FIND_LINKS=str(self.configured), UV_HTTP_RETRIES="0")
        environment["UV_CACHE_DIR"] = str(self.root / "cache")
        return subprocess.run(
            [self.root / "requirements" / "install.sh", "cpu"],
            env=environment | added,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=150,
            check=False,
        )

    def installed_torch(self) -> str:
        shown = subprocess.run(
            [self.root / ".venv" / "bin" / "python", "-c", "import torch; print(torch.__version__)"],
            capture_output=True,
            text=True,
            check=True,
        )
        return shown.stdout.strip()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    (root / "requirements").mkdir()
    for name in ("install.sh", "uv.py"):
        shutil.copy(ROOT / "requirements" / name, root / "requirements" / name)
    (root / "requirements" / "cpu.lock").write_text(LOCK)
    (root / "pyproject.toml").write_text(PYPROJECT)
    return root


@pytest.fixture
def tree(root: Path, tmp_path: Path) -> Tree:
    """The environment of the test before, without its torch and vLLM: making one takes seconds."""
    venv = root / ".venv"
    for name in (".cpu-installed", ".cpu-installing"):
        (venv / name).unlink(missing_ok=True)
    for pattern in ("torch*", "vllm*", "__pycache__/torch*", "__pycache__/vllm*"):
        for path in venv.glob(f"lib/python3.11/site-packages/{pattern}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    tree = Tree(root, tmp_path / "configured")
    write_wheel(tree.configured, "vllm-stand-in", "1.0", "vllm", "class AsyncLLMEngine: ...\n")
    return tree


@pytest.fixture
def cpu_builds(tmp_path: Path) -> Path:
    """What stands for PyTorch's index of CPU builds, with a build for CUDA beside it, as a folder."""
    folder = tmp_path / "builds of torch"
    write_wheel(folder, "torch", "2.13.0", "torch", CUDA_LIKE)
    write_wheel(folder, "torch", "2.13.0+cpu", "torch", "__version__ = '2.13.0+cpu'\n")
    return folder


@pytest.fixture
def index(cpu_builds: Path, tmp_path: Path) -> Iterator[str]:
    """The same over HTTP."""
    write_index(tmp_path / "index", cpu_builds / "torch-2.13.0+cpu-py3-none-any.whl")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "index"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_torch_is_the_cpu_build_of_the_folder_that_is_named(tree: Tree, cpu_builds: Path) -> None:
    result = tree.install(MILLSTREAM_TORCH_INDEX=str(cpu_builds))
    assert result.returncode == 0, result.stdout
    assert tree.installed_torch() == "2.13.0+cpu"
    assert tree.stamp.read_text().strip() == str(tree.root / ".venv")


def test_torch_is_the_cpu_build_of_the_index_that_is_named(tree: Tree, index: str) -> None:
    result = tree.install(MILLSTREAM_TORCH_INDEX=index)
    assert result.returncode == 0, result.stdout
    assert tree.installed_torch() == "2.13.0+cpu"
    assert f"torch, from {index}" in result.stdout


def test_a_configured_source_with_the_cpu_build_is_enough(tree: Tree, cpu_builds: Path) -> None:
    """PyTorch's index is not asked: where it cannot be reached that would take seconds for nothing."""
    result = tree.install(PIP_FIND_LINKS=f"{tree.configured} {cpu_builds.as_uri()}")
    assert result.returncode == 0, result.stdout
    assert tree.installed_torch() == "2.13.0+cpu"
    assert "torch, from the configured package sources" in result.stdout


def test_a_source_with_only_the_build_for_cuda_is_noticed_before_anything_is_fetched(
    tree: Tree, cpu_builds: Path
) -> None:
    (cpu_builds / "torch-2.13.0+cpu-py3-none-any.whl").unlink()
    result = tree.install(MILLSTREAM_TORCH_INDEX=str(cpu_builds))
    assert result.returncode == 1
    assert "The CPU build of torch (torch==2.13.0+cpu) cannot be had" in result.stdout
    assert "MILLSTREAM_TORCH_INDEX" in result.stdout
    assert "[3/4]" not in result.stdout
    assert not tree.stamp.exists()


def test_an_index_that_cannot_be_reached_is_told_before_anything_is_fetched(tree: Tree) -> None:
    result = tree.install(MILLSTREAM_TORCH_INDEX="http://127.0.0.1:9")
    assert result.returncode == 1
    assert "http://127.0.0.1:9" in result.stdout
    assert "The CPU build of torch (torch==2.13.0+cpu) cannot be had" in result.stdout
    assert "[3/4]" not in result.stdout


def test_a_torch_that_cannot_be_imported_is_not_called_installed(tree: Tree, cpu_builds: Path, tmp_path: Path) -> None:
    """A build for CUDA under the CPU build's name; once the right one is there, the next run puts it in its place."""
    mislabelled = tmp_path / "mislabelled"
    write_wheel(mislabelled, "torch", "2.13.0+cpu", "torch", CUDA_LIKE)
    result = tree.install(MILLSTREAM_TORCH_INDEX=str(mislabelled))
    assert result.returncode == 1
    assert "libcudnn.so.9" in result.stdout
    assert f"The torch that {mislabelled} has as 2.13.0+cpu cannot be imported" in result.stdout
    assert not tree.stamp.exists()
    again = tree.install(MILLSTREAM_TORCH_INDEX=str(cpu_builds))
    assert again.returncode == 0, again.stdout
    assert tree.installed_torch() == "2.13.0+cpu"


def test_a_vllm_that_cannot_be_imported_is_not_called_installed(tree: Tree, cpu_builds: Path) -> None:
    write_wheel(tree.configured, "vllm-stand-in", "1.0", "vllm", "import libnuma_is_missing\n")
    result = tree.install(MILLSTREAM_TORCH_INDEX=str(cpu_builds))
    assert result.returncode == 1
    assert "libnuma_is_missing" in result.stdout
    assert "This step failed with exit status 1: [4/4]" in result.stdout
    assert not tree.stamp.exists()


REAL_PYTHON = Path(os.path.realpath(sys.executable))


@pytest.fixture
def other_machine(tree: Tree, tmp_path: Path) -> Path:
    """The only folder of a PATH with what a small Debian has, and a python3 that is not 3.11."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for command in ("bash", "flock", "dirname", "mkdir", "rm", "find", "grep", "env", "cat", "sed", "mv"):
        found = shutil.which(command)
        assert found is not None
        (folder / command).symlink_to(found)
    write_command(folder / "python3", "exit 1")
    return folder


def write_command(path: Path, script: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("uv", '[[ $2 == find ]] && echo "{python}"; exit 0'),
        ("pyenv", '[[ $1 == latest ]] && echo 3.11.7; [[ $1 == prefix ]] && echo "{prefix}"; exit 0'),
        ("apt", ""),
    ],
)
def test_python_comes_from_what_the_machine_has(
    tree: Tree, cpu_builds: Path, other_machine: Path, tmp_path: Path, name: str, script: str
) -> None:
    prefix = tmp_path / "found"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "python").symlink_to(REAL_PYTHON)
    if name == "apt":
        write_command(other_machine / "apt-cache", "exit 0")
        install = f'[[ " $* " != *" install "* ]] || ln -s "{REAL_PYTHON}" "{other_machine}/python3.11"'
        write_command(other_machine / "apt-get", install.replace("ln -s", str(shutil.which("ln")) + " -s"))
        write_command(other_machine / "sudo", 'shift; exec "$@"')
    else:
        write_command(other_machine / name, script.format(python=prefix / "bin" / "python", prefix=prefix))
    result = tree.install(MILLSTREAM_TORCH_INDEX=str(cpu_builds), PATH=str(other_machine))
    assert result.returncode == 0, result.stdout
    source = "Debian" if name == "apt" else name
    told = [line for line in result.stdout.splitlines() if line.startswith("Python 3.11: not on PATH, so from")]
    assert len(told) == 1
    assert source in told[0]


def test_a_machine_that_has_and_gets_no_python_3_11_is_told_so(tree: Tree, other_machine: Path) -> None:
    result = tree.install(PATH=str(other_machine))
    assert result.returncode == 1
    assert "Python 3.11 is needed" in result.stdout
    assert not tree.stamp.exists()
