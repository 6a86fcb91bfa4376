"""Pods without Kubernetes: what the containers of one share, and the containers, in namespaces of the kernel.

A sandbox holds network, host name and IPC. Each container has processes and mounts of its own and, in a user
namespace, the user that the manifests ask for, without capabilities. The machine's own files stand for the image, with
what k8s/Dockerfile makes besides.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import psutil

from loadtests.certificates import Authority
from serve_app.ray_node import write_haproxy_launcher
from tests.conftest import ROOT
from tests.rehearsal.manifests import Container, PodTemplate
from tests.rehearsal.network import Network

__all__ = ["Pod", "PodFiles", "sandbox"]

_USER: Final = 1000
_HIDDEN: Final = Path("/var/lib")
"""Nothing that a pod needs of the machine; the image has Millstream's home there."""
_BIN: Final = Path("/usr/local/bin")
_SHARED_MEMORY: Final = "size=2g"


class PodFiles:
    """Where pods keep their files, and what all find in theirs."""

    def __init__(self, folder: Path, claims: dict[str, Path], hosts: dict[str, str]) -> None:
        """`claims`: folders by the name of the PersistentVolumeClaim. `hosts`: addresses by name."""
        self.folder = folder
        self.claims = claims
        self.image_bin = folder / "image-bin"
        self.image_bin.mkdir()
        write_haproxy_launcher(self.image_bin / "millstream-haproxy")
        self.checkout = folder / "checkout"
        self.checkout.mkdir()
        self.authority = Authority(folder / "certificates")
        self.names: dict[str, list[str]] = defaultdict(list)
        """Of hosts, by address."""
        for name, address in hosts.items():
            self.names[address].append(name)
        self.hosts = folder / "hosts"
        self.hosts.write_text(
            "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **hosts}.items())
        )
        self.no_resolver = folder / "resolv.conf"
        self.no_resolver.touch()
        self.account = folder / "account"
        """Of the API server: token, ca.crt and namespace."""
        self.account.mkdir()


class Pod:
    """One pod: it has an address as long as it is not removed, whatever happens to its containers."""

    def __init__(self, name: str, template: PodTemplate, address: IPv4Address, files: PodFiles) -> None:
        self.name = name
        self.template = template
        self.address = address
        self.ending = False
        """Told to end: not restarted, and of no account to the autoscaler."""
        self.may_run = asyncio.Event()
        """While it is clear, containers that have ended are not started again."""
        self.may_run.set()
        self._files = files
        self._folder = files.folder / "pods" / name
        self._sandbox: asyncio.subprocess.Process | None = None
        self._containers: dict[str, asyncio.subprocess.Process] = {}

    @property
    def group(self) -> str:
        return self.template.group

    @property
    def sandbox_pid(self) -> int:
        assert self._sandbox is not None
        return self._sandbox.pid

    @property
    def logs(self) -> Path:
        """Of its containers and, in `ray`, of Ray's sessions."""
        return self._folder

    @property
    def running(self) -> bool:
        """Whether all of its containers run."""
        return bool(self._containers) and all(each.returncode is None for each in self._containers.values())

    async def create(self, network: Network) -> None:
        """The sandbox, with an address; no container yet."""
        self._folder.mkdir(parents=True)
        self._sandbox = await _sandbox(self.name)
        network.attach(self._sandbox.pid, self.address)

    async def start(self) -> None:
        """Start the containers that do not run, with empty folders of their own."""
        assert self._sandbox is not None
        for container in self.template.containers:
            if (process := self._containers.get(container.name)) is None or process.returncode is not None:
                self._containers[container.name] = await self._start(container, self._sandbox.pid)

    async def wait(self) -> None:
        """Until one of its containers has ended."""
        waits = [asyncio.create_task(process.wait()) for process in self._containers.values()]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()

    async def kill(self) -> None:
        """SIGKILL for all processes of its containers at once; the sandbox keeps the address."""
        for process in self._containers.values():
            if process.returncode is None:
                process.kill()  # with which its child ends, the first process, once it is there
        await self._ended()

    async def end(self) -> None:
        """As Kubernetes ends a pod: SIGTERM for the first process of each container, SIGKILL after the grace period."""
        self.ending = True
        self._terminate()
        try:
            async with asyncio.timeout(self.template.grace_s):
                await self._ended()
        except TimeoutError:
            await self.kill()
        await self.remove()

    async def remove(self) -> None:
        """At once, with its address."""
        self.ending = True
        await self.kill()
        if self._sandbox is not None and self._sandbox.returncode is None:
            self._sandbox.kill()
            await self._sandbox.wait()

    async def execute(self, *arguments: str) -> str:
        """As `kubectl exec` does in the first container: what it prints. Raises RuntimeError with that if it fails."""
        (inside,) = psutil.Process(self._containers[self.template.containers[0].name].pid).children()
        environment = self._environment(self.template.containers[0])
        process = await asyncio.create_subprocess_exec(
            *("nsenter", "--target", str(inside.pid), "--all", "--preserve-credentials", "--wd=/tmp"),
            *("env", "-i", *environment, *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(arguments)} in {self.name}: {output.decode()}")
        return output.decode()

    def _terminate(self) -> None:
        """SIGTERM for the first process of each container."""
        for process in self._containers.values():
            if process.returncode is None:
                for first in psutil.Process(process.pid).children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        first.terminate()

    async def _ended(self) -> None:
        for process in self._containers.values():
            await process.wait()

    async def _start(self, container: Container, sandbox_pid: int) -> asyncio.subprocess.Process:
        folder = self._folder / container.name
        shutil.rmtree(folder, ignore_errors=True)
        script = "\n".join(["set -e", *self._mounts(container, folder), self._entry(container)])
        with (self._folder / f"{container.name}.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *("nsenter", "--target", str(sandbox_pid), "--net", "--uts", "--ipc", "--"),
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"),
                *("/bin/bash", "-c", script),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )

    def _mounts(self, container: Container, folder: Path) -> list[str]:
        """Commands that make the container's view of the files."""
        files, ray = self._files, self._folder / "ray"
        places = {Path(mount["mountPath"]): mount["name"] for mount in container.mounts}
        # The autoscaler's own image has a /tmp that can be written to.
        temporary = self._volume(name) if (name := places.get(Path("/tmp"))) else folder / "tmp"
        hidden = folder / "var-lib"
        for each in (temporary / "ray", hidden / "millstream", ray):
            each.mkdir(parents=True, exist_ok=True)
        lines = [
            _line("mount", "--bind", ROOT, files.checkout),
            _line("mount", "--bind", hidden, _HIDDEN),
            _line("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={files.image_bin}:{_BIN}", _BIN),
            _line("mount", "-t", "tmpfs", "-o", _SHARED_MEMORY, "tmpfs", "/dev/shm"),
            _line("mount", "--bind", files.hosts, "/etc/hosts"),
            _line("mount", "--bind", files.no_resolver, Path("/etc/resolv.conf").resolve()),
        ]
        for mount in container.mounts:
            if mount["mountPath"] == "/tmp":
                continue  # below
            source, target = self._volume(mount["name"]), Path(mount["mountPath"])
            lines.append(_line("mkdir", "--parents", target))
            lines.append(_line("mount", "--bind", *(("-o", "ro") if mount.get("readOnly") else ()), source, target))
        lines += [
            # A checkout below /tmp must be seen all the same; the pod's containers share /tmp/ray, as KubeRay has it.
            _line("mount", "--bind", temporary, "/tmp"),
            _line("mount", "--bind", ray, "/tmp/ray"),
            _line("mkdir", "--parents", ROOT),
            _line("mount", "--bind", files.checkout, ROOT),
        ]
        return lines

    def _volume(self, name: str) -> Path:
        volume = self.template.volumes[name]
        if "persistentVolumeClaim" in volume:
            return self._files.claims[volume["persistentVolumeClaim"]["claimName"]]
        if "projected" in volume:
            return self._files.account
        if "secret" in volume:  # as KubeRay has cert-manager make them, but one for each pod
            return self._files.authority.issue(
                self.name, str(self.address), "127.0.0.1", *self._files.names[str(self.address)]
            )
        folder = self._folder / "volumes" / name  # emptyDir: it outlives the container
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _entry(self, container: Container) -> str:
        """Becomes the first process of the container."""
        return _line(
            *("cd", "/tmp", "&&"),
            *("exec", "unshare", "--user", f"--map-user={_USER}", f"--map-group={_USER}", "--"),
            *("env", "-i", *self._environment(container), *container.arguments),
        ).replace("'&&'", "&&")

    def _environment(self, container: Container) -> list[str]:
        image = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "KUBERNETES_SERVICE_HOST": "kubernetes",
            "KUBERNETES_SERVICE_PORT_HTTPS": "443",
        }
        return [f"{name}={value}" for name, value in {**image, **container.environment}.items()]


async def _sandbox(name: str) -> asyncio.subprocess.Process:
    """Holds network, host name and IPC as long as it lives."""
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--net", "--uts", "--ipc", "--", "/bin/sh", "-c"),
        f"hostname {name} && echo ready && exec sleep infinity",
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    if await process.stdout.readline() != b"ready\n":
        raise RuntimeError(f"no sandbox for {name}")
    return process


@contextlib.asynccontextmanager
async def sandbox(name: str) -> AsyncIterator[int]:
    """A host without containers: the process that holds its namespaces."""
    process = await _sandbox(name)
    try:
        yield process.pid
    finally:
        process.kill()
        await process.wait()


def _line(*words: object) -> str:
    return shlex.join(str(word) for word in words)
