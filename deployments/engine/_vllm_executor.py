"""Where vLLM's workers run.

`distributed_executor_backend` takes a class, but the classes have no public path yet, hence this module and
tests/deployments/engine/test_vllm_faults.py, which notices when the one here no longer does what it is for.
"""

from __future__ import annotations

from vllm.platforms import current_platform
from vllm.v1.executor import Executor, UniProcExecutor

__all__ = ["executor_for"]


def executor_for(workers: int) -> type[Executor] | None:
    """What AsyncEngineArgs shall have as `distributed_executor_backend`; None leaves it to vLLM.

    On CPUs vLLM gives even a lone worker a process of its own, for which the engine core waits by yielding its core in
    a loop: that takes a whole one, and on some kernels holds up all else there for seconds (docs/performance.md).
    """
    return UniProcExecutor if workers == 1 and current_platform.is_cpu() else None
