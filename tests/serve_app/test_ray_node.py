"""Starting a node fails early, with what to do, where it cannot work."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from serve_app.config import ClusterConfig
from serve_app.ray_node import RayNode, RayNodeError


def test_a_port_that_is_taken_is_told_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ClusterConfig.model_validate(
            {
                "cluster": {"http": {"host": "127.0.0.1", "port": port}},
                "models": [{"name": "m", "source": "/model", "engine": {"kind": "simulated"}}],
            }
        )
        with pytest.raises(RayNodeError, match=rf"cannot listen on 127.0.0.1:{port} .* with --port N"):
            RayNode.start(config, tmp_path)
    assert list(tmp_path.iterdir()) == []
