"""What an engine replica without load reports: tests of scaling change what they are about."""

from __future__ import annotations

from deployments.scaling.decision import ReplicaSignals

__all__ = ["IDLE"]

IDLE = ReplicaSignals(
    running=0,
    waiting=0,
    waiting_prefill_tokens=0,
    kv_blocks_used=0,
    kv_blocks_total=1000,
    max_num_seqs=100,
    arrivals_per_s=0,
    arriving_prefill_tokens_per_s=0,
    generated_tokens=0,
    prefill_tokens_per_s=10_000,
    step_s=0.01,
    step_s_per_sequence=0,
    start_up_s=4.0,
)
