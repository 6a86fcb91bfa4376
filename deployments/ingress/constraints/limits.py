"""What worker.py may take for a check, what the engine may for what was checked, and the message by which worker.py is
told of a model. Apart from it, so that the ingress, which tells, does not import llguidance."""

from __future__ import annotations

import msgspec

__all__ = ["CHECK_CPU_S", "MAX_COMPILE_S", "MAX_STEP_S", "MEMORY_BYTES", "OUTPUTS_CPU_S", "LoadModel"]

CHECK_CPU_S = 0.15
"""For one constraint. vLLM compiles it once more for each candidate."""
OUTPUTS_CPU_S = 5.0
"""For one batch of outputs: 20,000 tokens take about 15 ms."""
MEMORY_BYTES = 512 * 2**20
"""More than the process has with its tokenizers."""
MAX_COMPILE_S = 1.0
"""CPU time of the grammars, one for each candidate: the engine compiles them beside its steps, on the same cores."""
MAX_STEP_S = 0.1
"""CPU time of masks, for all candidates of a request together: each step of the engine waits for them."""


class LoadModel(msgspec.Struct, frozen=True, tag="load"):
    """Get ready for a model; answered by itself."""

    folder: str
