"""Tiny wheels that stand for torch's builds and for vLLM, and the environment of a machine without local sources."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

SETTINGS_KEPT = {"PIP_CERT", "PIP_DEFAULT_TIMEOUT"}
"""How the network is reached, not what is found there."""


def stranger(**added: str) -> dict[str, str]:
    """The environment of a machine on which neither pip nor uv is told of anything but the default index."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if (not name.startswith(("PIP_", "UV_", "MILLSTREAM_")) or name in SETTINGS_KEPT)
        and name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VIRTUAL_ENV")
        and not name.startswith("PYTEST_")
    }
    return environment | {"PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1"} | added


def write_wheel(folder: Path, name: str, version: str, module: str, source: str) -> Path:
    """A wheel with one module."""
    folder.mkdir(parents=True, exist_ok=True)
    distribution = f"{name.replace('-', '_')}-{version}"
    info = f"{distribution}.dist-info"
    files = {
        f"{module}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    wheel = folder / f"{distribution}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return wheel


def write_index(folder: Path, wheel: Path) -> None:
    """`folder` as the root of an index that has one wheel of torch, which it links to."""
    page = folder / "torch"
    page.mkdir(parents=True)
    (page / wheel.name).symlink_to(wheel)
    (page / "index.html").write_text(f'<!DOCTYPE html><a href="{wheel.name}">{wheel.name}</a>')
