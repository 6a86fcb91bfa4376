"""Sampling parameters whose grammar was checked before.

vLLM compiles the grammar of each request on the event loop of its caller, to see whether it can be: 60 to 190 ms for
one of 64 KiB, for each choice. The ingress has done so, once for all choices, in a process of its own. How vLLM's check
is named is not public: tests/deployments/engine/test_vllm_faults.py notices when that changes.
"""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams

__all__ = ["CheckedSamplingParams"]


class CheckedSamplingParams(SamplingParams):  # type: ignore[misc]  # vLLM is not type-checked here
    def _validate_structured_outputs(self, _model_config: Any, structured_outputs_config: Any, _tokenizer: Any) -> None:
        """What is left of it: the engine core looks here for what compiles the grammar."""
        if self.structured_outputs is not None:
            self.structured_outputs._backend = structured_outputs_config.backend
