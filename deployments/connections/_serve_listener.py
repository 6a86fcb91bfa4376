"""Where a replica of Ray Serve listens for the calls of other replicas: at the address of its node alone.

Serve listens on all interfaces of the machine and unpickles what comes, without asking who sends it, and has no setting
for it. So the name by which it opens that port is replaced, before it does so: after the replica's constructor.
The name is private. tests/cluster/test_command_line.py looks at every port of a cluster: it notices a change of Ray.
"""

from __future__ import annotations

from typing import Any

from ray.serve._private import replica
from ray.util import get_node_ip_address

__all__ = ["listen_at_node_address"]

_ALL_INTERFACES = "[::]:0"
_add_port = replica.add_port_to_grpc_server


def listen_at_node_address() -> None:
    """Call it in the constructor of every deployment."""
    replica.add_port_to_grpc_server = _add_port_of_node


def _add_port_of_node(server: Any, address: str) -> int:
    """The port that was opened, as Serve's own function. Raises ValueError when Serve asks for what it never did."""
    if address != _ALL_INTERFACES:
        raise ValueError(f"expected Serve to listen at {_ALL_INTERFACES}, got {address}")
    node = get_node_ip_address()
    port: int = _add_port(server, f"[{node}]:0" if ":" in node else f"{node}:0")
    return port
