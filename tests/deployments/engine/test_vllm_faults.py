"""VllmEngine and the process of vLLM's engine core: when that compiles, and what becomes of the engine when it hangs or
dies. In the order of the tests."""

from __future__ import annotations

import asyncio
import importlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from deployments.contracts import Sampling
from deployments.engine.engine import EngineUnhealthy
from deployments.engine.vllm_engine import VllmEngine
from tests.deployments.engine.engines_under_test import (
    MAX_NUM_BATCHED_TOKENS,
    PROMPT,
    VLLM_MARKS,
    Receiver,
    complete,
    greedy,
    vllm_engine,
)

pytestmark = VLLM_MARKS


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where torch tells of each function that the engine core compiles."""
    importlib.import_module("torch")  # it looks at these variables but once: this process compiles nothing
    told = tmp_path_factory.mktemp("torch") / "compilations.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "0")  # as on GPUs
        patch.setenv("TORCH_LOGS", "dynamo")
        patch.setenv("TORCH_LOGS_OUT", str(told))
        yield told


@pytest.fixture(scope="module")
async def engine(smollm2: Path, compilations: Path) -> AsyncIterator[VllmEngine]:
    engine = vllm_engine(smollm2, stall_timeout_s=5.0)
    await engine.start()
    yield engine
    await engine.shutdown()
    assert engine_cores() == []


def engine_cores() -> list[psutil.Process]:
    """Those that this process has started, not vLLM's server beside it."""
    return [child for child in psutil.Process().children() if "EngineCore" in " ".join(child.cmdline())]


def test_on_cpus_a_lone_worker_has_no_process_for_which_the_engine_core_would_spin(engine: VllmEngine) -> None:
    """vLLM's own executor on CPUs names it so; the class that takes its place is vLLM's, but has moved before."""
    (core,) = engine_cores()
    assert [child for child in core.children() if "Worker" in " ".join(child.cmdline())] == []


ASKED = [
    greedy(4, logprobs=5),
    greedy(4, prompt_logprobs=5),
    greedy(4, logprob_token_ids=(1, 2, 3)),
    greedy(4, grammar='start: "yes" | "no"'),
    Sampling(max_tokens=4, seed=7, top_k=10, logprobs=20),
    Sampling(max_tokens=4, top_p=0.5, min_p=0.2, logit_bias={5: 2.0}),
    Sampling(max_tokens=4, min_tokens=3, presence_penalty=1.0, repetition_penalty=1.5, stop_token_ids=(9,)),
    Sampling(max_tokens=4, allowed_token_ids=tuple(range(100)), bad_words=("stone", "river")),
]


async def test_no_request_waits_for_a_compiler(engine: VllmEngine, compilations: Path) -> None:
    """On a machine that had never compiled it, the first request for log probabilities held every stream of the replica
    for 28 s."""
    before = await asyncio.to_thread(compilations.read_text)
    assert "batched_count_greater_than" in before
    for number, sampling in enumerate(ASKED):
        await complete(engine, f"alone {number}", PROMPT, sampling)
    await asyncio.gather(*(complete(engine, f"{n}", PROMPT * 3, sampling) for n, sampling in enumerate(ASKED)))
    after = await asyncio.to_thread(compilations.read_text)
    assert after.removeprefix(before) == ""


async def test_a_seeded_prompt_that_is_read_in_chunks_draws_as_one_that_is_read_at_once(engine: VllmEngine) -> None:
    """vLLM turns the generator back after each chunk, which it cannot on CPUs: the engine core died of it."""
    prompt = [*range(100, 100 + 5 * MAX_NUM_BATCHED_TOKENS // 2)]
    seeded = Sampling(max_tokens=8, seed=7)
    in_chunks = await complete(engine, "in chunks", prompt, seeded)
    at_once = await complete(engine, "at once", prompt, seeded)
    assert in_chunks.cached_tokens[0] == 0
    assert at_once.cached_tokens[0] >= 2 * MAX_NUM_BATCHED_TOKENS
    assert in_chunks.tokens == at_once.tokens


async def test_a_grammar_that_was_checked_is_not_compiled_again_on_the_event_loop(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []
    guidance = importlib.import_module("vllm.v1.structured_output.backend_guidance")
    monkeypatch.setattr(guidance, "validate_guidance_grammar", lambda *given, **_: compiled.append(given))
    receiver = await complete(engine, "form", PROMPT, Sampling(max_tokens=9, grammar='start: "yes" | "no"'))
    assert receiver.finishes == ["end_of_text"]
    assert compiled == []


async def test_an_engine_core_that_hangs_is_unhealthy_until_it_goes_on(engine: VllmEngine) -> None:
    (core,) = engine_cores()
    await engine.check_health()
    core.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(EngineUnhealthy, match="no answer for 5 s"):
            await engine.check_health()
    finally:
        core.send_signal(signal.SIGCONT)
    await engine.check_health()
    assert (await complete(engine, "after", PROMPT, greedy(3))).finishes == ["length"]


async def test_a_hanging_core_does_not_keep_a_generation_from_being_aborted(engine: VllmEngine) -> None:
    (core,) = engine_cores()
    receiver = Receiver()
    engine.submit("a", PROMPT, greedy(400), receiver)
    await receiver.until_tokens(2)
    core.send_signal(signal.SIGSTOP)
    try:
        engine.abort("a")
        assert engine.load().running == engine.load().waiting == 0
        seen = len(receiver.tokens)
    finally:
        core.send_signal(signal.SIGCONT)
    await complete(engine, "after", PROMPT, greedy(3))
    assert len(receiver.tokens) == seen


async def test_the_death_of_the_engine_core_is_told_once_and_ends_no_generation(
    engine: VllmEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """They are not failed: the owner resumes them on other replicas."""
    died: asyncio.Queue[None] = asyncio.Queue()
    engine.on_death = lambda: died.put_nowait(None)
    receivers = [Receiver() for _ in range(3)]
    for number, receiver in enumerate(receivers):
        engine.submit(str(number), [*PROMPT, number], greedy(400), receiver)
    for receiver in receivers:
        await receiver.until_tokens(2)
    (core,) = engine_cores()
    workers = core.children(recursive=True)
    core.kill()
    async with asyncio.timeout(10):
        await died.get()
    with pytest.raises(EngineUnhealthy, match="died"):
        await engine.check_health()
    await engine.shutdown()
    assert died.empty()
    assert [receiver.finishes for receiver in receivers] == [[], [], []]
    assert engine.load().running == engine.load().waiting == 0
    _, left = await asyncio.to_thread(psutil.wait_procs, workers, 20)
    assert left == []
    caplog.clear()  # the records hold the dead engine by their tracebacks
