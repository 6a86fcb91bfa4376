"""`make image` without building: which builder is taken, what it is told, and how it gets the sources of packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from requirements.image import package_sources
from tests.requirements.wheels import stranger

ROOT = Path(__file__).parents[2]
PASSWORD = "swordfish"
INDEX = f"https://reader:{PASSWORD}@packages.test/simple"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder that alone is on PATH; what a builder in it was told, and the secrets it saw, lie in `told`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "told").mkdir()
    for command in ("bash", "cp"):
        (folder / command).symlink_to(f"/bin/{command}")
    return folder


def add_builder(machine: Path, name: str, *, version_status: int = 0, build_status: int = 0) -> None:
    told = machine.parent / "told"
    script = f"""#!/bin/bash
[[ $1 == version ]] && exit {version_status}
echo "{name} $*" >"{told}/command"
for word; do
    [[ $word == id=* ]] || continue
    id=${{word%%,*}}
    cp "${{word#*src=}}" "{told}/${{id#id=}}"
done
exit {build_status}
"""
    (machine / name).write_text(script)
    (machine / name).chmod(0o755)


def build(machine: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "requirements.image", *arguments],
        cwd=ROOT,
        env=stranger(PATH=str(machine)) | {"PIP_CERT": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def command(machine: Path) -> list[str]:
    return (machine.parent / "told" / "command").read_text().split()


@pytest.mark.parametrize(
    ("installed", "taken"),
    [
        ({"docker": 0, "podman": 0, "buildah": 0}, "docker"),
        ({"docker": 1, "podman": 0, "buildah": 0}, "podman"),  # no daemon
        ({"docker": 1, "buildah": 0}, "buildah"),
    ],
)
def test_the_first_builder_that_works_is_taken(machine: Path, installed: dict[str, int], taken: str) -> None:
    for name, status in installed.items():
        add_builder(machine, name, version_status=status)
    result = build(machine, "cpu")
    assert result.returncode == 0, result.stderr
    assert command(machine)[:2] == [taken, "build"]
    assert result.stdout == f"millstream-cpu:0.1.0, built with {taken}\n"


def test_one_line_says_what_to_install_where_there_is_no_builder(machine: Path) -> None:
    add_builder(machine, "docker", version_status=1)
    result = build(machine, "cpu")
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert "apt-get install buildah" in result.stderr


def test_variant_tag_base_and_whatever_else_reach_the_builder(machine: Path) -> None:
    add_builder(machine, "podman")
    add_builder(machine, "buildah")
    build(machine, "gpu", "--tag", "registry.test/a:1", "--base", "debian:12", "--builder", "buildah", "--no-cache")
    told = " ".join(command(machine))
    assert told.startswith("buildah build --file k8s/Dockerfile --tag registry.test/a:1 ")
    assert "--build-arg VARIANT=gpu --build-arg BASE=debian:12" in told
    assert told.endswith("--no-cache .")


def test_a_build_that_fails_is_not_told_as_built(machine: Path) -> None:
    add_builder(machine, "buildah", build_status=7)
    result = build(machine, "cpu")
    assert (result.returncode, result.stdout) == (7, "")


def test_sources_and_certificates_are_secrets_of_the_build(machine: Path, tmp_path: Path) -> None:
    add_builder(machine, "docker")
    certificate = tmp_path / "ca.pem"
    certificate.write_text("a certificate\n")
    result = build(machine, "cpu", PIP_INDEX_URL=INDEX, PIP_CERT=str(certificate), UV_INDEX="https://more.test/simple")
    assert result.returncode == 0, result.stderr
    assert PASSWORD not in " ".join(command(machine)) + result.stdout + result.stderr
    told = tmp_path / "told"
    shell = '. "$1" && printf "%s\\n" "$PIP_INDEX_URL" "$PIP_CERT" "$UV_INDEX"'
    variables = subprocess.run(
        ["bash", "-c", shell, "bash", told / "sources"], env={}, capture_output=True, text=True, check=True
    )
    assert variables.stdout.splitlines() == [INDEX, "/run/secrets/cert", "https://more.test/simple"]
    assert (told / "cert").read_text() == "a certificate\n"
    (source,) = [word.split("src=")[1] for word in command(machine) if word.startswith("id=sources,")]
    assert not os.path.exists(source)


def test_folders_are_mounted_where_a_build_can_and_left_out_where_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An index on the disk links to wheels beside it."""
    wheels, index = tmp_path / "wheels", tmp_path / "mirror" / "simple"
    wheels.mkdir()
    (index / "torch").mkdir(parents=True)
    (index / "torch" / "index.html").touch()
    configuration = {"find-links": f"{wheels} https://a.test/wheels", "extra-index-url": index.as_uri()}
    mounted = package_sources(configuration, {}, folders=True)
    assert mounted.variables["PIP_EXTRA_INDEX_URL"] == index.as_uri()
    assert set(mounted.folders) == {wheels, tmp_path / "mirror"}
    assert capsys.readouterr().err == ""
    left_out = package_sources(configuration, {}, folders=False)
    assert (left_out.variables, left_out.folders) == ({"PIP_FIND_LINKS": "https://a.test/wheels"}, [])
    assert str(wheels) in capsys.readouterr().err
