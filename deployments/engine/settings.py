"""What an engine replica is told: how to run, on which model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from deployments.section import Section, unexpected

__all__ = ["EngineSettings", "ReplicaSettings", "SimulatedEngineSettings", "VllmSettings"]


class VllmSettings(Section):
    """A vLLM engine per replica; the meanings are those of vLLM's engine arguments."""

    kind: Literal["vllm"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations. float32 on CPUs without AVX-512 or AMX, where bfloat16 is slow."""
    max_model_len: PositiveInt | None = None
    """Tokens of prompt and completion together, >= 1; null takes what the model was trained for."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that share each layer, >= 1; keep them within one node."""
    pipeline_parallel_size: PositiveInt = 1
    """Groups of GPUs that hold successive layers, >= 1."""
    max_num_seqs: PositiveInt = 256
    """Sequences in the batch at most, >= 1."""
    max_num_batched_tokens: PositiveInt | None = None
    """Tokens that one step computes at most, >= `max_num_seqs`; null leaves it to vLLM. A long prompt takes so many
    in each step, and every other sequence waits for it: choose what the machine computes in well under a second."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of each GPU's memory for weights and KV cache, above 0 to 1. GPU only."""
    kv_cache_gib: PositiveInt = 1
    """GiB of memory for the KV cache, >= 1. CPU only (VLLM_CPU_KVCACHE_SPACE)."""
    enforce_eager: bool = False
    """Run without torch.compile and CUDA graphs: starts minutes sooner, slower on GPUs, no difference on
    CPUs."""
    enable_prefix_caching: bool = True
    """Keep the KV blocks of past prompts for prompts that begin alike."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """`priority` serves requests of a lower `priority` first; with `fcfs` requests must not give one."""

    @field_validator("max_num_batched_tokens")
    @classmethod
    def _hold_a_batch(cls, tokens: int | None, info: ValidationInfo) -> int | None:
        sequences = info.data.get("max_num_seqs")
        if tokens is not None and sequences and tokens < sequences:
            raise unexpected(f"at least max_num_seqs, {sequences}: a step computes one token of each sequence")
        return tokens


class SimulatedEngineSettings(Section):
    """An engine that takes time and makes up tokens, for load, fault and conformance tests."""

    kind: Literal["simulated"]
    max_model_len: PositiveInt = 2048
    """Tokens of prompt and completion together, >= 1."""
    prefill_tokens_per_s: PositiveFloat | None = 20_000.0
    """Prompt tokens per second, > 0; null prefills in no time."""
    step_s: NonNegativeFloat = 0.002
    """Seconds, >= 0, of a decode step of one sequence."""
    step_s_per_sequence: NonNegativeFloat = 0.0
    """Seconds, >= 0, that each further sequence in the batch adds to a step."""
    max_num_seqs: PositiveInt = 256
    """Sequences in the batch at most, >= 1."""
    kv_block_tokens: PositiveInt = 16
    """Tokens per KV block, >= 1."""
    kv_blocks: PositiveInt = 8192
    """KV blocks of a replica, >= 1, together enough for one sequence of `max_model_len` tokens."""
    prefix_cache: bool = True
    """Keep the KV blocks of past prompts for prompts that begin alike."""
    start_up_s: NonNegativeFloat = 0.0
    """Seconds, >= 0, that a replica takes to start."""

    @field_validator("kv_blocks")
    @classmethod
    def _hold_a_sequence(cls, blocks: int, info: ValidationInfo) -> int:
        tokens, block_tokens = info.data.get("max_model_len"), info.data.get("kv_block_tokens")
        if tokens and block_tokens and blocks < (needed := -(-tokens // block_tokens)):
            raise unexpected(f"at least {needed} blocks: one sequence of max_model_len {tokens} tokens")
        return blocks


EngineSettings = Annotated[VllmSettings | SimulatedEngineSettings, Field(discriminator="kind")]


class ReplicaSettings(Section):
    """What of a model's section a replica must know. A change of it replaces the replicas."""

    name: str
    source: str
    engine: EngineSettings
    max_waiting: NonNegativeInt
    stall_timeout_s: PositiveFloat
