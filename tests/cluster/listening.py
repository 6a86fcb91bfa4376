"""Where the processes of a cluster on one machine listen."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

import psutil

from serve_app.ray_node import RayNode, processes_of
from tests.conftest import RunningCluster

__all__ = ["ListeningSocket", "listening_sockets"]


class ListeningSocket(NamedTuple):
    process: str
    address: str
    port: int

    @property
    def on_loopback(self) -> bool:
        parsed = ipaddress.ip_address(self.address)
        # ::ffff:127.0.0.1 is how an IPv6 socket tells it; Python below 3.13 does not see through that.
        mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
        return (mapped or parsed).is_loopback


def listening_sockets(cluster: RunningCluster) -> list[ListeningSocket]:
    node = RayNode.running(cluster.home)
    assert node is not None
    return [
        ListeningSocket(process.name(), connection.laddr.ip, connection.laddr.port)
        for process in processes_of(node.cluster_id)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
