"""An engine for ray.serve.llm that streams one token per request every 2 ms and costs next to nothing.

It implements what the completions route calls and nothing else: Ray's engine protocol is not public, so this knows the
version that is pinned.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, Final

from ray.llm._internal.serve.core.engine.protocol import LLMEngine

__all__ = ["CostlessEngine"]

STEP_S: Final = 0.002


class CostlessEngine(LLMEngine):  # type: ignore[misc]  # untyped
    def __init__(self, llm_config: Any) -> None: ...

    async def start(self) -> None: ...

    async def check_health(self) -> None: ...

    def routing_stats(self) -> dict[str, Any]:
        return {}

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[str, None]:
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": request.model}
        for _ in range(request.max_tokens):
            await asyncio.sleep(STEP_S)
            choice = {"index": 0, "text": "word", "logprobs": None, "finish_reason": None}
            yield "data: " + json.dumps({**head, "choices": [choice]}) + "\n\n"
        usage = {"prompt_tokens": 1, "completion_tokens": request.max_tokens, "total_tokens": 1 + request.max_tokens}
        yield "data: " + json.dumps({**head, "choices": [], "usage": usage}) + "\n\n"
        yield "data: [DONE]\n\n"

    async def _absent(self, *_arguments: Any, **_options: Any) -> None:
        raise NotImplementedError("the comparison uses completions alone")

    resolve_lora = chat = embeddings = transcriptions = score = tokenize = detokenize = _absent
    reset_prefix_cache = sleep = wakeup = is_sleeping = pause = resume = is_paused = _absent
    start_profile = stop_profile = collective_rpc = _absent
