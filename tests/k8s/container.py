"""A container without a container runtime: an image's files, read-only, under the user that the image names.

As a pod with `readOnlyRootFilesystem` and no rights has it; network and cgroup are the machine's. Needs root.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Container", "image_config"]


@dataclass(frozen=True)
class Container:
    """Each command runs in processes and mounts of its own."""

    root: Path
    """Where the image's files lie."""
    config: Mapping[str, Any]
    """Of the image, by OCI's specification: Env, User, WorkingDir."""
    writable: Mapping[str, Path]
    """Folders of this machine by where the container has them, beside /tmp and /dev/shm, which are its own."""
    read_only: Mapping[str, Path]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`arguments` until they end."""
        return subprocess.run(self._command(arguments), capture_output=True, text=True, timeout=120, check=False)

    @contextlib.contextmanager
    def running(self, *arguments: str, output: Path) -> Iterator[subprocess.Popen[bytes]]:
        """`arguments` as long as the context lasts; all of their processes end with it."""
        with output.open("wb") as file:
            process = subprocess.Popen(
                self._command(arguments), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                for first in psutil.Process(process.pid).children():
                    first.kill()  # with which all others of its namespace end, before its parent does
            process.wait(30)

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        uid, gid = self.config["User"].split(":")
        inside = [
            *("setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"),
            *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
            *("env", "-i", "-C", self.config["WorkingDir"], *self.config["Env"]),
            *arguments,
        ]
        root = self.root
        mounts = [
            ["mount", "--bind", root, root],
            ["mount", "-o", "remount,bind,ro", root],
            ["mount", "-t", "proc", "proc", root / "proc"],
            ["mount", "--bind", "-o", "ro", "/sys", root / "sys"],
            ["mount", "--rbind", "/dev", root / "dev"],
            ["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", root / "dev/shm"],
            ["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", root / "tmp"],
            *(["mount", "--bind", path, f"{root}{target}"] for target, path in self.writable.items()),
            *(["mount", "--bind", "-o", "ro", path, f"{root}{target}"] for target, path in self.read_only.items()),
            ["exec", "chroot", root, *inside],
        ]
        script = "set -e\n" + "\n".join(shlex.join(map(str, line)) for line in mounts)
        return ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--", "bash", "-c", script]


def image_config(inspected: str) -> dict[str, Any]:
    """The configuration in what `buildah inspect --type image` prints."""
    config: dict[str, Any] = json.loads(inspected)["OCIv1"]["config"]
    return config
