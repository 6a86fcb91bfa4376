"""requirements/gpu.lock, by its packages' metadata: wheels for the image's Debian, whole, and without conflicts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEBIAN_12 = "x86_64-manylinux_2_36"
"""By its glibc. Some wheels need 2.31."""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_it_resolves_to_itself(tmp_path: Path) -> None:
    """With dependencies: what a package demands and the lock lacks would be added, what contradicts it be refused."""
    resolved = tmp_path / "resolved"
    lock = ROOT / "requirements" / "gpu.lock"
    options = [
        *("--python-version", "3.11", "--python-platform", DEBIAN_12, "--only-binary", ":all:"),
        *("--no-header", "--no-annotate", "--output-file", str(resolved)),
    ]
    result = subprocess.run(
        [sys.executable, ROOT / "requirements" / "uv.py", "pip", "compile", lock, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = [line.replace("===", "==") for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    assert sorted(resolved.read_text().splitlines()) == sorted(lines)
    assert "torch==2.13.0" in lines  # and not +cpu
