"""Hosts on one machine: network namespaces on a bridge, whose links can be cut, as the kernel does it.

All of it is made in the network namespace of the rehearsal's own process, so it is gone when that process is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from ipaddress import IPv4Address, IPv4Interface
from typing import Final

__all__ = ["GATEWAY", "Network", "command", "listening_ports", "reachable_from"]

GATEWAY: Final = IPv4Interface("10.77.0.1/24")
"""The bridge: where the rehearsal itself is, and what stands outside the cluster."""
_BRIDGE: Final = "hosts"


def command(*arguments: str, stdin: str = "") -> str:
    """Run a command of the system; its output. Raises RuntimeError with what it says."""
    result = subprocess.run(arguments, input=stdin, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {result.returncode}: {result.stderr.strip()}")
    return result.stdout


def listening_ports(pid: int) -> list[int]:
    """TCP, in the network namespace of process `pid`, beyond its loopback."""
    lines = command("nsenter", "--target", str(pid), "--net", "ss", "--no-header", "--listening", "--tcp", "--numeric")
    addresses = (line.split()[3].rpartition(":") for line in lines.splitlines())
    return sorted({int(port) for host, _, port in addresses if not host.startswith(("127.", "[::1]", "[::ffff:127."))})


def reachable_from(pid: int, addresses: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those that take a TCP connection from the network namespace of process `pid`."""
    script = (sys.executable, "-c", _CONNECT)
    told = command("nsenter", "--target", str(pid), "--net", *script, stdin=json.dumps(addresses))
    return [(host, port) for host, port in json.loads(told)]


_CONNECT: Final = """
import asyncio, json, sys

async def connects(host, port):
    try:
        async with asyncio.timeout(2.0):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True

async def main(addresses):
    answers = await asyncio.gather(*(connects(*address) for address in addresses))
    print(json.dumps([address for address, answer in zip(addresses, answers) if answer]))

asyncio.run(main(json.load(sys.stdin)))
"""


class Network:
    """A bridge in this process's network namespace."""

    def __init__(self) -> None:
        self._links = 0
        command("ip", "link", "set", "lo", "up")
        command("ip", "link", "add", _BRIDGE, "type", "bridge")
        command("ip", "address", "add", str(GATEWAY), "dev", _BRIDGE)
        command("ip", "link", "set", _BRIDGE, "up")

    def next_address(self) -> IPv4Address:
        """An address that no host had yet."""
        self._links += 1
        return GATEWAY.network[10 + self._links]

    def attach(self, pid: int, address: IPv4Address) -> None:
        """Give the network namespace of process `pid` an interface with this address."""
        inside = ("nsenter", "--target", str(pid), "--net", "ip")
        link = _link(address)
        command("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        command("ip", "link", "set", link, "master", _BRIDGE, "up")
        command(*inside, "link", "set", "lo", "up")
        command(*inside, "address", "add", f"{address}/{GATEWAY.network.prefixlen}", "dev", "eth0")
        command(*inside, "link", "set", "eth0", "up")
        command(*inside, "route", "add", "default", "via", str(GATEWAY.ip))

    def cut(self, address: IPv4Address) -> None:
        """As if its cable were pulled: nobody is told."""
        command("ip", "link", "set", _link(address), "down")

    def mend(self, address: IPv4Address) -> None:
        command("ip", "link", "set", _link(address), "up")


def _link(address: IPv4Address) -> str:
    return f"host-{str(address).rpartition('.')[2]}"
