"""Millstream's scaling decision beside Ray Serve's default policy, on the same bursts, in virtual time.

    python -m loadtests.benchmarks.autoscaling_comparison [--delay-scale 0.1] [--targets 8,16,32] [--seeds 3]

Serve's policy knows the number of ongoing requests and wants `target_ongoing_requests` of them on each replica; the
best of several values stands for what tuning would find. Its delays are scaled, since the bursts are minutes apart.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from ray.serve.autoscaling_policy import (
    _apply_delay_logic,
    _apply_scaling_factors,
    default_autoscaling_policy,
)
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.engine.simulator import SimulatorSettings
from deployments.scaling.decision import Decision, PoolScaler, PoolSignals, ScalingTargets
from serve_app.cli.tables import print_table
from serve_app.planning.pool_simulation import Policy, PoolSettings, PoolSimulation
from serve_app.planning.workload import PoissonWorkload, RateStage, TokenRange

__all__ = ["Row", "ServeDefaultPolicy", "best_of", "bursts", "measure"]

_POOL: Final = PoolSettings(
    engine=SimulatorSettings(
        vocabulary_tokens=1,
        prefill_tokens_per_s=8000.0,
        step_s=0.02,
        step_s_per_sequence=0.0003,
        max_num_seqs=64,
        kv_blocks=4096,
    ),
    max_model_len=2048,
    max_waiting=512,
    max_held=512,
    max_held_tokens=1_000_000,
    hold_timeout_s=30.0,
    drain_timeout_s=60.0,
    platform_start_up_s=2.0,
    start_up_s=8.0,
    replicas_at_start=1,
)
_TARGETS: Final = ScalingTargets(
    min=1,
    max=40,
    target_first_token_s=2.0,
    target_kv_use=0.85,
    scale_down_after_s=60.0,
    idle_to_zero_after_s=600.0,
)
_TUNED_SHARE: Final = 0.95
"""Of requests within the target, which who tunes Serve's policy wants at least."""


def bursts(seed: int) -> PoissonWorkload:
    """Twenty minutes: a quiet load with four bursts, short and long, of up to thirty times as much."""
    stages = [(2, 120), (40, 60), (2, 180), (60, 90), (5, 180), (30, 150), (2, 120), (50, 30), (2, 270)]
    return PoissonWorkload(
        stages=tuple(RateStage(rate, seconds) for rate, seconds in stages),
        prompt_tokens=TokenRange(50, 1000),
        max_tokens=TokenRange(20, 300),
        seed=seed,
    )


class ServeDefaultPolicy:
    """What Serve does with `autoscaling_config` when it names no policy, on the time that it is told.

    Serve's public policy function makes the number of ongoing requests a number of replicas. What Serve wraps around
    it reads the clock, so its private parts are put together here;
    tests/loadtests/benchmarks/test_autoscaling_comparison.py compares the whole with Serve's own.
    """

    def __init__(self, minimum: int, maximum: int, target_ongoing_requests: float, *, delay_scale: float = 1.0) -> None:
        """`delay_scale`: of Serve's default delays and of the time over which it averages."""
        default = AutoscalingConfig()
        self._config = AutoscalingConfig(
            min_replicas=minimum,
            max_replicas=maximum,
            target_ongoing_requests=target_ongoing_requests,
            upscale_delay_s=delay_scale * default.upscale_delay_s,
            downscale_delay_s=delay_scale * default.downscale_delay_s,
        )
        self._minimum, self._maximum = minimum, maximum
        self._look_back_s = delay_scale * default.look_back_period_s
        self._ongoing: deque[tuple[float, float]] = deque()
        """When, and how many there were."""
        self._state: dict[str, Any] = {}

    def decide(self, now: float, signals: PoolSignals) -> Decision:
        ongoing = sum(replica.running + replica.waiting for replica in signals.replicas) + signals.held
        self._ongoing.append((now, ongoing))
        while self._ongoing[0][0] < now - self._look_back_s:
            self._ongoing.popleft()
        mean = sum(number for _, number in self._ongoing) / len(self._ongoing)
        replicas, self._state = self._wanted(now, self.context(now, signals, mean, self._state))
        return Decision(min(max(replicas, self._minimum), self._maximum), f"{mean:.1f} ongoing requests")

    def context(self, now: float, signals: PoolSignals, ongoing: float, state: dict[str, Any]) -> AutoscalingContext:
        return AutoscalingContext(
            deployment_id=None,
            deployment_name="Engine",
            app_name=None,
            current_num_replicas=len(signals.replicas),
            target_num_replicas=signals.target,
            running_replicas=[],
            total_num_requests=ongoing,
            total_queued_requests=None,
            aggregated_metrics=None,
            raw_metrics=None,
            capacity_adjusted_min_replicas=self._minimum,
            capacity_adjusted_max_replicas=self._maximum,
            policy_state=state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now,
            config=self._config,
        )

    def _wanted(self, now: float, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        wanted, _ = default_autoscaling_policy(ctx)
        if ctx.current_num_replicas == 0 and ctx.total_num_requests > 0:
            return int(wanted), ctx.policy_state
        scaled = _apply_scaling_factors(wanted, ctx.current_num_replicas, self._config)
        if ctx.current_num_replicas == 0 and scaled > 0:
            return scaled, ctx.policy_state
        replicas, state = _apply_delay_logic(
            max(0, scaled), ctx.target_num_replicas, self._config, dict(ctx.policy_state), _now=now
        )
        return replicas, state


class Row(NamedTuple):
    """One policy over all seeds."""

    policy: str
    requests: int
    share_within: float
    replica_seconds: float
    direction_changes: int


def measure(name: str, make: Callable[[], Policy], seeds: int) -> Row:
    outcomes = [PoolSimulation(_POOL, make(), seed=seed).run(bursts(seed)) for seed in range(seeds)]
    requests = sum(outcome.requests for outcome in outcomes)
    target_s = _TARGETS.target_first_token_s
    return Row(
        name,
        requests,
        sum(outcome.share_within(target_s) * outcome.requests for outcome in outcomes) / requests,
        sum(outcome.replica_seconds for outcome in outcomes),
        sum(outcome.direction_changes for outcome in outcomes),
    )


def best_of(rows: list[Row]) -> Row:
    """The cheapest of those with enough requests within the target; if there is none, that with most of them."""
    enough = [row for row in rows if row.share_within >= _TUNED_SHARE]
    if enough:
        return min(enough, key=lambda row: row.replica_seconds)
    return max(rows, key=lambda row: row.share_within)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--delay-scale", type=float, default=0.1, help="of Serve's default delays")
    parser.add_argument("--targets", default="8,16,32", help="values of target_ongoing_requests")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()

    def serve_default(target: float) -> Row:
        return measure(
            f"Ray Serve, target_ongoing_requests={target:g}",
            lambda: ServeDefaultPolicy(_TARGETS.min, _TARGETS.max, target, delay_scale=arguments.delay_scale).decide,
            arguments.seeds,
        )

    ours = measure("Millstream", lambda: PoolScaler(_TARGETS).decide, arguments.seeds)
    others = [serve_default(float(target)) for target in arguments.targets.split(",")]
    best = best_of(others)
    head = ("POLICY", "REQUESTS", f"WITHIN {_TARGETS.target_first_token_s:g} S", "REPLICA-SECONDS", "TURNS")
    print_table(
        head,
        [
            (
                row.policy + (" (best)" if row is best else ""),
                f"{row.requests:,}",
                f"{row.share_within:.2%}",
                f"{row.replica_seconds:,.0f}",
                f"{row.direction_changes}",
            )
            for row in (ours, *others)
        ],
        numbers=head[1:],
    )
    cost, gain = ours.replica_seconds / best.replica_seconds, ours.share_within - best.share_within
    print(f"\nAgainst the best: {cost:.2f} times its replica-seconds, {100 * gain:+.1f} points within the target.")


if __name__ == "__main__":
    main()
