"""A vLLM worker on CPUs that lives through a prompt read in chunks with a `seed`.

After a step that reads only a part of a prompt vLLM throws the sampled token away, and turns the request's generator of
random numbers back by the offset that it has on GPUs. A generator on CPUs has none: `CPU Generator does not use
offset` ends the engine core, with every generation of the replica. `worker_cls` is public, but what is mended here is
not: tests/deployments/engine/test_vllm_faults.py notices when that changes.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker

__all__ = ["SeededCPUWorker", "worker_class"]


class SeededCPUWorker(CPUWorker):  # type: ignore[misc]  # vLLM is not type-checked here
    def sample_tokens(self, grammar_output: Any) -> Any:
        """Draw no number from the generators of requests whose token is thrown away: then none must be turned back."""
        batch = self.model_runner.input_batch
        unread = self.model_runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        kept = {index: batch.generators.pop(index) for index in unread if index in batch.generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            batch.generators.update(kept)


def worker_class() -> str:
    """What AsyncEngineArgs shall have as `worker_cls`: by its name, as vLLM imports it in the workers' processes."""
    return f"{__name__}.{SeededCPUWorker.__qualname__}" if current_platform.is_cpu() else "auto"
