"""The same comparison on a real cluster of simulated engines, in real time, and what `millstream plan` foretold.

    millstream up loadtests/clusters/scaled.yaml --detach
    python -m loadtests.benchmarks.autoscaling_on_cluster [--seeds 3] [--targets 2,4,6] [--json FILE]

Every policy gets the same requests at the same times, one after the other, each from one replica on. Replica-seconds
count from the order to start a replica until it is gone, as Serve's REST API tells; first tokens as the client sees
them. Takes about two minutes per policy and seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx

from deployments.engine.model_source import prepare_model
from deployments.engine.settings import SimulatedEngineSettings
from deployments.scaling.decision import PoolScaler
from deployments.scaling.engine_policy import PoolPolicy
from loadtests.benchmarks.autoscaling_comparison import Row, ServeDefaultPolicy, best_of
from serve_app.applications import ENGINE, application_name, serve_config
from serve_app.cli.tables import print_table
from serve_app.config import ClusterConfig, millstream_home
from serve_app.config_reading import load_cluster_config
from serve_app.planning.model_pool import PLATFORM_START_UP_S, pool_settings, scaling_targets
from serve_app.planning.pool_simulation import PoolSimulation
from serve_app.planning.workload import PoissonWorkload, RateStage, TokenRange, Workload
from serve_app.ray_node import RayNode
from serve_app.serve_api import ServeApi

__all__ = ["ServeDefaultPoolPolicy", "main"]

_MODEL: Final = "scaled"
_APPLICATION: Final = application_name(_MODEL)
_SERVE_DOWNSCALE_S: Final = 600.0
_SAMPLE_S: Final = 0.25
_CLUSTER: Final = Path(__file__).parents[1] / "clusters" / "scaled.yaml"


def bursts(seed: int) -> PoissonWorkload:
    """A minute and a half: one request per second, and two bursts of up to twelve times as many."""
    stages = ((1, 10), (8, 20), (1, 20), (12, 15), (1, 25))
    return PoissonWorkload(
        stages=tuple(RateStage(rate, seconds) for rate, seconds in stages),
        prompt_tokens=TokenRange(50, 400),
        max_tokens=TokenRange(20, 100),
        seed=seed,
    )


class ServeDefaultPoolPolicy(PoolPolicy):
    """Serve's default policy in the place of ours, on the number of requests that run, wait or are held.

    Serve's own count is of calls, of which an ingress makes one per engine replica, whatever it carries.
    """

    def __init__(
        self, model: str, targets: Mapping[str, Any], needs: Mapping[str, float], target_ongoing: float
    ) -> None:
        super().__init__(model, targets, needs)
        delay_scale = targets["scale_down_after_s"] / _SERVE_DOWNSCALE_S
        policy = ServeDefaultPolicy(targets["min"], targets["max"], target_ongoing, delay_scale=delay_scale)
        self._decide = policy.decide


class Measured(NamedTuple):
    requests: int
    failed: int
    within: int
    replica_seconds: float
    turns: int


class _Cluster:
    def __init__(self, home: Path, config: ClusterConfig) -> None:
        node = RayNode.running(home)
        if node is None:
            raise SystemExit(f"no cluster runs under {home}")
        self.api = ServeApi(node.dashboard_url, node.token)
        self.url = node.http_url
        self._described = serve_config(
            config, home, {_MODEL: prepare_model(config.models[0].source, home, report=print)}
        )

    def apply(self, change: Callable[[dict[str, Any]], None]) -> None:
        described = json.loads(json.dumps(self._described))
        [application] = [each for each in described["applications"] if each["name"] == _APPLICATION]
        [deployment] = application["deployments"]
        change(deployment)
        self.api.apply(described)

    def replicas(self) -> list[str]:
        """States of all that are, starting and stopping ones too."""
        [application] = [each for each in self.api.applications() if each.name == _APPLICATION]
        return [replica.state for replica in application.deployments.get(ENGINE, [])]

    def to_one_replica(self) -> None:
        def fixed(deployment: dict[str, Any]) -> None:
            del deployment["autoscaling_config"]
            deployment["num_replicas"] = 1

        self.apply(fixed)
        deadline = time.monotonic() + 120
        while self.replicas() != ["RUNNING"]:
            if time.monotonic() > deadline:
                raise SystemExit(f"the pool does not come back to one replica: {self.replicas()}")
            time.sleep(0.5)


async def _request(client: httpx.AsyncClient, prompt_tokens: int, max_tokens: int) -> float | None:
    """Seconds to the first token; None if it failed or was not whole."""
    begun = time.monotonic()
    first: float | None = None
    body = {
        "model": _MODEL,
        "prompt": [1000 + (index * 7919 + time.time_ns()) % 40_000 for index in range(prompt_tokens)],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    usage = ""
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.monotonic()
                    usage = line
    except httpx.HTTPError:
        return None
    whole = first is not None and f'"completion_tokens":{max_tokens},' in usage
    return first - begun if whole and first is not None else None


async def _measure(cluster: _Cluster, workload: Workload, target_s: float) -> Measured:
    numbers: list[int] = []
    replica_seconds = 0.0
    done = asyncio.Event()

    async def watch() -> None:
        nonlocal replica_seconds
        last = time.monotonic()
        while not done.is_set():
            states = await asyncio.to_thread(cluster.replicas)
            now = time.monotonic()
            replica_seconds += len(states) * (now - last)
            last = now
            kept = sum(state in ("STARTING", "RUNNING") for state in states)
            if numbers[-1:] != [kept]:
                numbers.append(kept)
            await asyncio.sleep(_SAMPLE_S)

    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=cluster.url, timeout=300.0, limits=limits, trust_env=False) as client,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(watch())
        begun = time.monotonic()
        tasks = []
        for chunk in workload.requests():
            for at_s, prompt_tokens, max_tokens in zip(*chunk, strict=True):
                await asyncio.sleep(begun + at_s - time.monotonic())
                tasks.append(asyncio.create_task(_request(client, prompt_tokens, max_tokens)))
        await asyncio.sleep(begun + workload.duration_s - time.monotonic())
        first_tokens = await asyncio.gather(*tasks)
        done.set()
    ups = [after > before for before, after in pairwise(numbers)]
    return Measured(
        len(first_tokens),
        first_tokens.count(None),
        sum(each is not None and each <= target_s for each in first_tokens),
        replica_seconds,
        sum(before != after for before, after in pairwise(ups)),
    )


def _row(policy: str, measured: list[Measured]) -> Row:
    requests = sum(each.requests for each in measured)
    return Row(
        policy,
        requests,
        sum(each.within for each in measured) / requests,
        sum(each.replica_seconds for each in measured),
        sum(each.turns for each in measured),
    )


def _foretold(config: ClusterConfig, seeds: int, platform_start_up_s: float) -> Row:
    model = config.models[0]
    assert isinstance(model.engine, SimulatedEngineSettings)
    targets = scaling_targets(model)
    measured = []
    for seed in range(seeds):
        settings = pool_settings(model, model.engine, platform_start_up_s=platform_start_up_s)
        outcome = PoolSimulation(settings, PoolScaler(targets).decide, seed=seed).run(bursts(seed))
        within = round(outcome.share_within(targets.target_first_token_s) * outcome.requests)
        measured.append(Measured(outcome.requests, 0, within, outcome.replica_seconds, outcome.direction_changes))
    return _row("Millstream, as planned", measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", default="2,4,6", help="values of target_ongoing_requests")
    parser.add_argument("--platform-start-up-s", type=float, default=PLATFORM_START_UP_S, help="for the plan")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    arguments = parser.parse_args()
    config = load_cluster_config(_CLUSTER)
    target_s = config.models[0].replicas.target_first_token_s
    cluster = _Cluster(millstream_home(os.environ), config)
    policies: dict[str, Callable[[dict[str, Any]], None]] = {"Millstream": lambda _: None}

    def serve_default(target: float) -> Callable[[dict[str, Any]], None]:
        def change(deployment: dict[str, Any]) -> None:
            policy = deployment["autoscaling_config"]["policy"]
            policy["policy_function"] = f"{__spec__.name}:{ServeDefaultPoolPolicy.__name__}"
            policy["policy_kwargs"]["target_ongoing"] = target

        return change

    for target in map(float, arguments.targets.split(",")):
        policies[f"Ray Serve, target_ongoing_requests={target:g}"] = serve_default(target)
    measured: dict[str, list[Measured]] = {name: [] for name in policies}
    for seed in range(arguments.seeds):
        for name, change in policies.items():
            cluster.to_one_replica()
            cluster.apply(change)
            measured[name].append(asyncio.run(_measure(cluster, bursts(seed), target_s)))
            print(f"seed {seed}, {name}: {measured[name][-1]}", flush=True)
    cluster.to_one_replica()
    rows = [_row(name, each) for name, each in measured.items()]
    best = best_of(rows[1:])
    planned = _foretold(config, arguments.seeds, arguments.platform_start_up_s)
    head = ("POLICY", "REQUESTS", "FAILED", f"WITHIN {target_s:g} S", "REPLICA-SECONDS", "TURNS")
    print_table(
        head,
        [
            (
                row.policy + (" (best)" if row is best else ""),
                f"{row.requests:,}",
                f"{sum(each.failed for each in measured.get(row.policy, []))}",
                f"{row.share_within:.2%}",
                f"{row.replica_seconds:,.0f}",
                f"{row.direction_changes}",
            )
            for row in (*rows, planned)
        ],
        numbers=head[1:],
    )
    ours = rows[0]
    cost, gain = ours.replica_seconds / best.replica_seconds, ours.share_within - best.share_within
    print(f"\nAgainst the best: {cost:.2f} times its replica-seconds, {100 * gain:+.1f} points within the target.")
    cost, gain = planned.replica_seconds / ours.replica_seconds, planned.share_within - ours.share_within
    print(f"The plan against the cluster: {cost:.2f} times its replica-seconds, {100 * gain:+.1f} points.")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({name: [each._asdict() for each in all_] for name, all_ in measured.items()})
        )


if __name__ == "__main__":
    main()
