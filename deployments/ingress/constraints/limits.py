"""What worker.py may take for a check, and the message by which it is told of a model. Apart from it, so
that the ingress, which tells, does not import llguidance."""

from __future__ import annotations

import msgspec

__all__ = ["CHECK_CPU_S", "MEMORY_BYTES", "OUTPUTS_CPU_S", "LoadModel"]

CHECK_CPU_S = 0.15
"""For one constraint. vLLM does the same work once for each candidate, half of it on its event loop."""
OUTPUTS_CPU_S = 5.0
"""For one batch of outputs: 20,000 tokens take about 15 ms."""
MEMORY_BYTES = 512 * 2**20
"""More than the process has with its tokenizers."""


class LoadModel(msgspec.Struct, frozen=True, tag="load"):
    """Get ready for a model; answered by itself."""

    folder: str
