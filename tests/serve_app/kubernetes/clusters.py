"""cluster.yaml files of the tests, as configurations that Kubernetes can run."""

from __future__ import annotations

from typing import Any

from serve_app.config import ClusterConfig

__all__ = ["cluster", "model"]


def model(name: str = "m", **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "source": "owner/model",
        "engine": {"kind": "vllm", "max_model_len": 2048},
        "resources": {"cpus": 2.0, "gpus": 1.0},
        **changes,
    }


def cluster(*models: dict[str, Any], **sections: Any) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {"meter": {"database": "env://MILLSTREAM_DATABASE"}, "models": [*(models or (model(),))], **sections}
    )
