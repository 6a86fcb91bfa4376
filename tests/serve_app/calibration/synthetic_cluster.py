"""A cluster in closed form: its tokens arrive exactly when engines of known parameters would have made them."""

from __future__ import annotations

import math
from typing import Any

from serve_app.cluster_api import ClusterApi, ClusterApiError

__all__ = ["SyntheticCluster"]


class SyntheticCluster(ClusterApi):
    """Every method but `close`, without HTTP."""

    def __init__(self, replicas: int = 1, *, models: tuple[str, ...] = ("m",), max_model_len: int = 4096) -> None:
        self.prefill_tokens_per_s, self.step_s, self.step_s_per_sequence = 5000.0, 0.02, 0.003
        self.overhead_s = 0.007
        self.attention_s = 0.0
        """Of a prompt token to each before it."""
        self.cards: list[dict[str, Any]] = [
            {
                "id": f"{model}-{number}",
                "model": model,
                "in_rotation": True,
                "running": 0,
                "waiting": 0,
                "kv_blocks_total": 300 + number,
                "kv_block_tokens": 128,
                "max_num_seqs": 64,
                "start_up_s": 40.0 + number,
                "of_no_interest": True,
            }
            for model in models
            for number in range(replicas)
        ]
        self.max_model_len = max_model_len
        self.replicas_asked = 0
        self.prompts: list[list[int]] = []
        self.batches: list[tuple[int, int]] = []
        """Prompts and tokens of each."""
        self.refusal: str | None = None

    def close(self) -> None: ...

    def replicas(self) -> list[dict[str, Any]]:
        self.replicas_asked += 1
        return self.cards

    def context_lengths(self) -> dict[str, int]:
        return {card["model"]: self.max_model_len for card in self.cards}

    def tokenize(self, model: str, text: str) -> list[int]:
        return [ord(character) for character in text]

    def complete(self, model: str, prompts: list[list[int]], max_tokens: int) -> list[list[float]]:
        if self.refusal is not None:
            raise ClusterApiError(self.refusal)
        assert all(len(prompt) + max_tokens <= self.max_model_len for prompt in prompts)
        self.prompts += prompts
        self.batches.append((len(prompts), max_tokens))
        sequences = math.ceil(len(prompts) / sum(card["model"] == model for card in self.cards))
        step_s = self.step_s + self.step_s_per_sequence * (sequences - 1)
        tokens = len(prompts[0]) * sequences
        first_s = self.overhead_s + tokens / self.prefill_tokens_per_s + step_s * math.ceil(tokens / 2048)
        first_s += self.attention_s * len(prompts[0]) * tokens
        return [[first_s + number * step_s for number in range(max_tokens)] for _ in prompts]
