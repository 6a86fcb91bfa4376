"""Replicas listen for each other at the address of their node, where Ray Serve would listen everywhere."""

from __future__ import annotations

import pytest
from ray.serve._private import replica

from deployments.connections import _serve_listener
from deployments.connections._serve_listener import listen_at_node_address


class Server:
    """A gRPC server that opens no port."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    def add_insecure_port(self, address: str) -> int:
        self.addresses.append(address)
        return 1234


@pytest.mark.parametrize(("node", "address"), [("10.1.2.3", "10.1.2.3:0"), ("fd00::7", "[fd00::7]:0")])
def test_serves_port_is_opened_at_the_node(monkeypatch: pytest.MonkeyPatch, node: str, address: str) -> None:
    monkeypatch.setattr(replica, "add_port_to_grpc_server", replica.add_port_to_grpc_server)  # as it is afterwards
    monkeypatch.setattr(_serve_listener, "get_node_ip_address", lambda: node)
    server = Server()
    listen_at_node_address()
    listen_at_node_address()
    assert replica.add_port_to_grpc_server(server, "[::]:0") == 1234
    assert server.addresses == [address]


def test_a_port_that_serve_never_opened_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "add_port_to_grpc_server", replica.add_port_to_grpc_server)
    listen_at_node_address()
    with pytest.raises(ValueError, match=r"got 0\.0\.0\.0:50051"):
        replica.add_port_to_grpc_server(Server(), "0.0.0.0:50051")
