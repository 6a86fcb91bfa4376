"""One suite over both engines: what deployments/engine/engine.py promises holds for vLLM and the simulated engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from deployments.contracts import EngineLoad, Sampling
from deployments.engine.engine import Engine, EngineQueueFull
from deployments.engine.simulated_engine import SimulatedEngine
from deployments.engine.simulator import SimulatorSettings
from tests.deployments.engine.engines_under_test import (
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    MAX_WAITING,
    PROMPT,
    VLLM_MARKS,
    Receiver,
    complete,
    greedy,
    until,
    vllm_engine,
)


def simulated_engine() -> SimulatedEngine:
    settings = SimulatorSettings(vocabulary_tokens=49_152, step_s=0.001, max_num_seqs=MAX_NUM_SEQS, kv_blocks=256)
    return SimulatedEngine(settings, max_waiting=MAX_WAITING)


@pytest.fixture(scope="module", params=["simulated", pytest.param("vllm", marks=VLLM_MARKS)])
def make_engine(request: pytest.FixtureRequest) -> Iterator[Callable[[], Engine]]:
    """Makes engines that are not started yet, on a machine without a compiler, as images are."""
    if request.param == "simulated":
        yield simulated_engine
        return
    model: Path = request.getfixturevalue("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "no-compiler")
        yield lambda: vllm_engine(model, stall_timeout_s=30.0)


@pytest.fixture(scope="module")
async def engine(make_engine: Callable[[], Engine]) -> AsyncIterator[Engine]:
    """Started once for all tests below; each leaves it idle."""
    engine = make_engine()
    await engine.start()
    yield engine
    await engine.shutdown()
    await engine.shutdown()  # safe twice


@pytest.fixture(autouse=True)
async def _engine_is_left_idle(engine: Engine) -> AsyncIterator[None]:
    yield
    await until(lambda: is_idle(engine.load()), engine)


def is_idle(load: EngineLoad) -> bool:
    return (
        load.running == load.waiting == load.waiting_prefill_tokens == 0 and load.kv_blocks_free == load.kv_blocks_total
    )


# --- tokens -----------------------------------------------------------------------------------------------------------


async def test_a_generation_ends_once_with_all_its_tokens(engine: Engine) -> None:
    receiver = await complete(engine, "a", PROMPT, greedy(24))
    assert len(receiver.tokens) == 24
    assert receiver.finishes == ["length"]


async def test_a_single_token_is_a_whole_generation(engine: Engine) -> None:
    receiver = await complete(engine, "a", PROMPT, greedy(1))
    assert len(receiver.tokens) == 1
    assert receiver.finishes == ["length"]


async def test_a_greedy_generation_resumed_anywhere_ends_with_the_same_tokens(engine: Engine) -> None:
    """Also shows that tokens come in order and once: a prompt that repeats or lacks one continues otherwise."""
    whole = (await complete(engine, "whole", PROMPT, greedy(24))).tokens
    for split in (1, 11, 23):
        rest = await complete(engine, f"rest-{split}", PROMPT + whole[:split], greedy(24 - split))
        assert whole[:split] + rest.tokens == whole


async def test_concurrent_generations_get_their_own_tokens(engine: Engine) -> None:
    prompts = [[*PROMPT, 1000 + number] for number in range(4)]
    alone = [(await complete(engine, f"alone-{n}", prompt, greedy(6))).tokens for n, prompt in enumerate(prompts)]
    async with asyncio.TaskGroup() as group:
        together = [
            group.create_task(complete(engine, f"together-{n}", prompt, greedy(6 + n)))
            for n, prompt in enumerate(prompts)
        ]
    assert [len(task.result().tokens) for task in together] == [6, 7, 8, 9]
    assert [task.result().tokens[:6] for task in together] == alone


async def test_the_same_seed_gives_the_same_tokens(engine: Engine) -> None:
    first, again, other = [
        (await complete(engine, f"{seed}-{run}", PROMPT, Sampling(max_tokens=16, seed=seed, ignore_eos=True))).tokens
        for run, seed in enumerate((7, 7, 8))
    ]
    assert first == again
    assert first != other


# --- log probabilities ------------------------------------------------------------------------------------------------


async def test_log_probabilities_come_only_where_asked_for(engine: Engine) -> None:
    receiver = await complete(engine, "a", PROMPT, greedy(4))
    assert receiver.logprobs == []
    assert receiver.prompt_logprobs == []


@pytest.mark.parametrize("likeliest", [0, 3])
async def test_each_token_comes_with_its_log_probability_and_those_of_the_likeliest(
    engine: Engine, likeliest: int
) -> None:
    plain = await complete(engine, "plain", PROMPT, greedy(4))
    receiver = await complete(engine, "told", PROMPT, greedy(4, logprobs=likeliest))
    assert receiver.tokens == plain.tokens
    assert [position.token_ids[0] for position in receiver.logprobs] == receiver.tokens
    for position in receiver.logprobs:
        assert len(position.token_ids) == max(1, likeliest) == len(set(position.token_ids))
        assert list(position.ranks) == sorted(position.ranks) == list(range(1, len(position.ranks) + 1))
        assert list(position.logprobs) == sorted(position.logprobs, reverse=True)
        assert max(position.logprobs) <= 0


async def test_a_token_that_is_not_the_likeliest_comes_before_those_that_are(engine: Engine) -> None:
    likely = (await complete(engine, "likely", PROMPT, greedy(1, logprobs=2))).logprobs[0].token_ids
    receiver = await complete(engine, "told", [*PROMPT, 7, 8], greedy(1, prompt_logprobs=2))
    after_prompt = receiver.prompt_logprobs[len(PROMPT)]
    assert after_prompt is not None
    assert after_prompt.token_ids == (7, *likely)
    assert after_prompt.ranks[0] > 2
    assert after_prompt.ranks[1:] == (1, 2)
    assert after_prompt.logprobs[0] < after_prompt.logprobs[2] <= after_prompt.logprobs[1]


async def test_the_prompts_log_probabilities_come_once_for_all_tokens_but_the_first(engine: Engine) -> None:
    prompt = list(range(3000, 3100))
    for run in range(2):  # a cached prefix must not hide them
        receiver = await complete(engine, str(run), prompt, greedy(3, prompt_logprobs=0))
        assert receiver.prompt_logprobs[0] is None
        assert [position and position.token_ids for position in receiver.prompt_logprobs[1:]] == [
            (token,) for token in prompt[1:]
        ]
        assert not any(receiver.cached_tokens)


async def test_log_probabilities_of_chosen_tokens_come_where_asked_for(engine: Engine) -> None:
    receiver = await complete(engine, "a", PROMPT, greedy(2, logprob_token_ids=(900, 901)))
    for token, position in zip(receiver.tokens, receiver.logprobs, strict=True):
        assert position.token_ids == (token, 900, 901)


# --- the end of a generation ------------------------------------------------------------------------------------------


async def test_a_stop_token_ends_a_generation_and_is_delivered(engine: Engine) -> None:
    whole = (await complete(engine, "whole", PROMPT, greedy(12))).tokens
    stop = max(whole, key=whole.index)  # the token that first appears last
    receiver = await complete(engine, "stopped", PROMPT, greedy(12, stop_token_ids=(stop,)))
    assert receiver.tokens == whole[: whole.index(stop) + 1]
    assert receiver.finishes == ["stop_token"]


async def test_stop_tokens_end_nothing_before_min_tokens(engine: Engine) -> None:
    whole = (await complete(engine, "whole", PROMPT, greedy(12))).tokens
    receiver = await complete(engine, "a", PROMPT, greedy(12, min_tokens=6, stop_token_ids=tuple(whole)))
    assert len(receiver.tokens) > 6


async def test_a_generation_that_can_never_run_is_refused_once(engine: Engine) -> None:
    receiver = await complete(engine, "too long", [1000] * 5000, greedy(4))
    assert receiver.tokens == []
    assert receiver.finishes == ["refused"]
    assert receiver.message
    assert "/" not in receiver.message
    assert (await complete(engine, "next", PROMPT, greedy(2))).finishes == ["length"]


# --- aborts -----------------------------------------------------------------------------------------------------------


async def test_aborting_a_running_generation_stops_its_deliveries_and_frees_its_load(engine: Engine) -> None:
    aborted, other = Receiver(), Receiver()
    engine.submit("aborted", PROMPT, greedy(400), aborted)
    engine.submit("other", [*PROMPT, 1], greedy(40), other)
    await asyncio.gather(aborted.until_tokens(3), other.until_tokens(3))
    engine.abort("aborted")
    seen = list(aborted.tokens)
    assert engine.load().running + engine.load().waiting == 1
    await other.until_finished()
    assert aborted.tokens == seen
    assert aborted.finishes == []
    assert len(other.tokens) == 40


async def test_an_abort_frees_the_kv_blocks_of_an_engine_that_has_nothing_else_to_do(engine: Engine) -> None:
    receiver = Receiver()
    engine.submit("a", PROMPT, greedy(400), receiver)
    await receiver.until_tokens(1)
    engine.abort("a")
    assert engine.load().running + engine.load().waiting == 0
    await until(lambda: is_idle(engine.load()), engine)
    assert receiver.finishes == []


async def test_a_generation_aborted_before_it_started_delivers_nothing(engine: Engine) -> None:
    aborted = Receiver()
    engine.submit("aborted", PROMPT, greedy(4), aborted)
    engine.abort("aborted")
    assert is_idle(engine.load())
    await complete(engine, "other", PROMPT, greedy(8))
    assert aborted.tokens == []
    assert aborted.finishes == []


async def test_aborting_an_unknown_key_is_ignored(engine: Engine) -> None:
    await complete(engine, "ended", PROMPT, greedy(1))
    engine.abort("ended")
    engine.abort("unknown")
    assert (await complete(engine, "next", PROMPT, greedy(1))).finishes == ["length"]


# --- load -------------------------------------------------------------------------------------------------------------


async def test_a_full_engine_refuses_new_generations_but_not_resumed_ones(engine: Engine) -> None:
    receivers = [Receiver() for _ in range(MAX_NUM_SEQS + MAX_WAITING)]
    for number, receiver in enumerate(receivers):
        engine.submit(str(number), [*PROMPT, number], greedy(3), receiver)
    refused, resumed = Receiver(), Receiver()
    with pytest.raises(EngineQueueFull):
        engine.submit("refused", PROMPT, greedy(3), refused)
    engine.submit("resumed", PROMPT, greedy(3), resumed, resumed=True)
    assert [await receiver.until_finished() for receiver in (*receivers, resumed)] == ["length"] * 13
    assert [len(receiver.tokens) for receiver in (*receivers, resumed)] == [3] * 13
    assert refused.tokens == []
    engine.submit("refused", PROMPT, greedy(3), refused)  # there is room again, and its key is free
    assert await refused.until_finished() == "length"


async def test_the_load_tells_what_waits_what_runs_and_the_kv_blocks(engine: Engine) -> None:
    idle = engine.load()
    assert is_idle(idle)
    assert idle.kv_blocks_total > 0
    assert idle.kv_blocks_total * idle.kv_block_tokens >= MAX_MODEL_LEN
    receiver = Receiver()
    engine.submit("a", PROMPT, greedy(8), receiver)
    submitted = engine.load()
    assert (submitted.running, submitted.waiting, submitted.waiting_prefill_tokens) == (0, 1, len(PROMPT))
    await receiver.until_tokens(1)
    running = engine.load()
    assert (running.running, running.waiting, running.waiting_prefill_tokens) == (1, 0, 0)
    assert 0 < running.kv_blocks_free < running.kv_blocks_total == idle.kv_blocks_total
    await receiver.until_finished()
    ended = engine.load()
    assert (ended.running, ended.waiting) == (0, 0)


async def test_generations_that_share_a_prefix_report_cached_tokens(engine: Engine) -> None:
    prefix = list(range(2000, 2300))
    first = await complete(engine, "first", [*prefix, 1], greedy(3))
    second = await complete(engine, "second", [*prefix, 2], greedy(3))
    assert not any(first.cached_tokens)
    assert len(prefix) / 2 < second.cached_tokens[0] <= len(prefix)
    assert not any(second.cached_tokens[1:])


# --- health and shutdown ----------------------------------------------------------------------------------------------


async def test_a_busy_engine_is_healthy(engine: Engine) -> None:
    receivers = [Receiver() for _ in range(MAX_NUM_SEQS)]
    for number, receiver in enumerate(receivers):
        engine.submit(str(number), list(range(100 * number, 100 * number + 100)), greedy(12), receiver)
    checks = 0
    while not all(receiver.finishes for receiver in receivers):
        await engine.check_health()
        await asyncio.sleep(0)
        checks += 1
    assert checks > 1
    assert [len(receiver.tokens) for receiver in receivers] == [12] * MAX_NUM_SEQS


async def test_an_engine_that_was_never_started_can_be_shut_down(make_engine: Callable[[], Engine]) -> None:
    engine = make_engine()
    await engine.shutdown()
    await engine.shutdown()
