"""vLLM's own OpenAI server on a CPU: what Millstream is compared with, in figures and in what it answers."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["vllm_server_start"]


def vllm_server_start(model: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """Command, and what it needs in its environment; as smollm2-135m, with the engine settings of
    loadtests/clusters/vllm.yaml and tests/clusters/vllm.yaml."""
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", "smollm2-135m", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager", "--max-num-seqs", "32"),
    ]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return command, environment
