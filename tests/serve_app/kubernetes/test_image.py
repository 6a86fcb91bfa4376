"""The image: its Dockerfile is linted, and what it copies is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "k8s" / "Dockerfile"


def test_hadolint_finds_nothing() -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    hadolint = shutil.which("hadolint", path=path)
    assert hadolint is not None, "the dev set has it: make setup"
    command = [hadolint, "--failure-threshold", "style", str(DOCKERFILE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_everything_is_pinned_and_runs_as_nobody_in_particular() -> None:
    text = DOCKERFILE.read_text()
    assert re.search(r"^ARG BASE=python:\d+\.\d+\.\d+-slim-\w+$", text, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${BASE}", "packages"}
    assert re.search(r"^USER 1000:1000$", text, re.MULTILINE)
    for name in ("cpu", "gpu"):
        lines = (ROOT / "requirements" / f"{name}.lock").read_text().splitlines()
        assert all("==" in line for line in lines if line and not line.startswith("#"))


def test_what_is_copied_reaches_the_build() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE):
        for source in line.split():
            pattern = source.replace("${VARIANT}", "*")
            assert f"!{pattern}" in ignore
            assert list(ROOT.glob(pattern))
