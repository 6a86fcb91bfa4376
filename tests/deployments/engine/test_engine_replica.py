"""EngineReplica over an engine that does only what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
import pytest

from deployments.contracts import (
    EngineCommands,
    EngineLoad,
    EngineStep,
    FinishReason,
    PositionLogprobs,
    RepetitionDetection,
    Sampling,
    Sibling,
    Submission,
    TokenDelta,
    pack,
    unpack,
)
from deployments.engine.engine import Deliver, EngineQueueFull, EngineUnhealthy
from deployments.engine.orphans import OrphanedRequests
from deployments.engine.replica import EngineReplica
from deployments.engine.step_outbox import HEARTBEAT_S
from deployments.engine.step_times import StepTimes
from tests.deployments.accounts import RecordedOutbox, account


class ScriptedEngine:
    """Delivers when told to, refuses when `full`, and is as healthy as the test wants."""

    max_num_seqs = 4

    def __init__(self) -> None:
        self.step_times = StepTimes()
        self.on_death: Callable[[], None] = lambda: None
        self.alive: dict[str, Deliver] = {}
        self.submitted: list[tuple[list[int], Sampling]] = []
        self.aborted: list[str] = []
        self.waiting_prefill_tokens = 0
        self.full = False
        self.healthy = True
        self.shutdowns = 0

    async def start(self) -> None: ...

    def submit(
        self, key: str, token_ids: list[int], sampling: Sampling, deliver: Deliver, *, resumed: bool = False
    ) -> None:
        if self.full and not resumed:
            raise EngineQueueFull
        assert key not in self.alive
        self.alive[key] = deliver
        self.submitted.append((token_ids, sampling))

    def abort(self, key: str) -> None:
        if self.alive.pop(key, None) is not None:
            self.aborted.append(key)

    def load(self) -> EngineLoad:
        return EngineLoad(
            running=len(self.alive),
            waiting_prefill_tokens=self.waiting_prefill_tokens,
            kv_blocks_free=5,
            kv_blocks_total=9,
        )

    async def check_health(self) -> None:
        if not self.healthy:
            raise EngineUnhealthy("told so by the test")

    async def shutdown(self) -> None:
        self.shutdowns += 1

    def generate(self, request_id: str, token_ids: list[int], finish_reason: FinishReason | None = None) -> None:
        """Deliver to the one living generation of `request_id`."""
        (key,) = (key for key in self.alive if key.startswith(f"{request_id}-"))
        deliver = self.alive[key]
        if finish_reason is not None:
            del self.alive[key]
        deliver(token_ids, finish_reason)


def submission(generation: int, request_id: str = "r", *, resumed: bool = False) -> Submission:
    return Submission(generation, [1, 2, 3], Sampling(max_tokens=8), account(request_id), "Meter", resumed=resumed)


def submit(replica: EngineReplica, stream_id: str, *submissions: Submission) -> None:
    packed = [msgspec.Raw(pack(submission)) for submission in submissions]
    replica.take_commands(stream_id, pack(EngineCommands([], packed, [])))


def abort(replica: EngineReplica, stream_id: str, *generations: int) -> None:
    replica.take_commands(stream_id, pack(EngineCommands([], [], list(generations))))


async def take(steps: AsyncGenerator[bytes, None]) -> EngineStep:
    return unpack(await anext(steps), EngineStep)


async def rest(steps: AsyncGenerator[bytes, None]) -> list[TokenDelta]:
    """What still comes until the replica ends the stream."""
    async with asyncio.timeout(10):
        return [delta async for message in steps for delta in unpack(message, EngineStep).deltas]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def replica(engine: ScriptedEngine) -> EngineReplica:
    return EngineReplica(engine, OrphanedRequests(RecordedOutbox()))


async def opened(replica: EngineReplica, stream_id: str = "s") -> AsyncGenerator[bytes, None]:
    steps = replica.steps(stream_id)
    assert (await take(steps)).deltas == []
    return steps


# --- submissions --------------------------------------------------------------------------------------------------


async def test_tokens_travel_on_the_stream_they_were_submitted_on(
    replica: EngineReplica, engine: ScriptedEngine
) -> None:
    async with aclosing(await opened(replica)) as steps:
        submit(replica, "s", submission(7), submission(8, "q"))
        assert engine.submitted == [([1, 2, 3], Sampling(max_tokens=8))] * 2
        engine.generate("r", [10])
        engine.generate("q", [20], "length")
        step = await take(steps)
        assert step == EngineStep(
            1, replica.load(), [TokenDelta(7, [10]), TokenDelta(8, [20], "length")], acknowledged=8
        )


@pytest.mark.parametrize("stream_id", ["never-opened", "closed"])
async def test_a_submission_on_a_stream_that_is_not_open_is_ignored(
    replica: EngineReplica, engine: ScriptedEngine, stream_id: str
) -> None:
    await (await opened(replica, "closed")).aclose()
    submit(replica, stream_id, submission(1), submission(2))
    assert engine.submitted == []


async def test_a_full_engine_takes_resumed_generations_only(replica: EngineReplica, engine: ScriptedEngine) -> None:
    async with aclosing(await opened(replica)) as steps:
        engine.full = True
        submit(replica, "s", submission(1), submission(2, "q", resumed=True), submission(3))
        engine.generate("q", [20])
        step = await take(steps)
        assert (step.deltas, step.acknowledged, step.refused) == ([TokenDelta(2, [20])], 3, [1, 3])
        engine.generate("q", [21])
        step = await take(steps)
        assert (step.deltas, step.acknowledged, step.refused) == ([TokenDelta(2, [21])], 3, [])
    assert [key.split("-")[0] for key in engine.aborted] == ["q"]  # the refused ones have nothing to abort


async def test_choices_of_one_request_are_apart(replica: EngineReplica, engine: ScriptedEngine) -> None:
    async with aclosing(await opened(replica)) as steps:
        submit(replica, "s", submission(1), submission(2))
        for token, deliver in enumerate(engine.alive.values()):
            deliver([token], None)
        assert (await take(steps)).deltas == [TokenDelta(1, [0]), TokenDelta(2, [1])]


async def test_what_the_prefix_cache_spares_counts_once_a_generation_with_its_first_token(
    replica: EngineReplica, engine: ScriptedEngine
) -> None:
    engine.waiting_prefill_tokens = 1000
    async with aclosing(await opened(replica)):
        submit(replica, "s", submission(1))
        [deliver] = engine.alive.values()
        for token_ids in ([], [], [10], [11]):
            deliver(token_ids, None, cached_tokens=3)
        assert replica.signals().waiting_prefill_tokens == pytest.approx(950)
        deliver([], "failed")
        submit(replica, "s", submission(2, "q"))
        engine.generate("q", [], "refused")
        assert replica.signals().waiting_prefill_tokens == pytest.approx(950)


@pytest.mark.parametrize(
    ("reason", "message", "param"),
    [
        ("failed", "KeyError", None),
        ("refused", "too long", None),
        ("refused", "no such grammar", "guided_grammar"),
    ],
)
async def test_a_generation_that_ends_while_it_is_submitted_is_told_on_the_stream(
    replica: EngineReplica,
    engine: ScriptedEngine,
    monkeypatch: pytest.MonkeyPatch,
    reason: FinishReason,
    message: str,
    param: str | None,
) -> None:
    def refuse(key: str, token_ids: list[int], sampling: Sampling, deliver: Deliver, *, resumed: bool = False) -> None:
        deliver([], reason, message=message, param=param)

    monkeypatch.setattr(engine, "submit", refuse)
    async with aclosing(await opened(replica)) as steps:
        submit(replica, "s", submission(1))
        step = await take(steps)
        assert (step.deltas, step.refused) == ([TokenDelta(1, [], reason, message=message, param=param)], [])
    assert engine.aborted == []


async def test_everything_that_the_engine_tells_travels_on_the_stream(
    replica: EngineReplica, engine: ScriptedEngine
) -> None:
    of_prompt = [None, PositionLogprobs((2, 7), (-3.5, -0.25), (90, 1)), PositionLogprobs((3,), (-0.5,), (1,))]
    of_token = PositionLogprobs((10, 11), (-0.125, -float("inf")), (1, 40_000))
    async with aclosing(await opened(replica)) as steps:
        submit(replica, "s", submission(1))
        [deliver] = engine.alive.values()
        deliver([10], None, cached_tokens=2, logprobs=[of_token], prompt_logprobs=of_prompt)
        deliver([11], "refused", message="The grammar allows no token.", param="guided_grammar", logprobs=[of_token])
        assert (await take(steps)).deltas == [
            TokenDelta(
                1,
                [10, 11],
                "refused",
                2,
                "The grammar allows no token.",
                "guided_grammar",
                [of_token, of_token],
                of_prompt,
            )
        ]


async def test_what_a_generation_is_asked_to_do_reaches_the_engine_whole(
    replica: EngineReplica, engine: ScriptedEngine
) -> None:
    sampling = Sampling(
        max_tokens=8,
        logprobs=2,
        prompt_logprobs=0,
        logprob_token_ids=(5, 6),
        logit_bias={5: -100.0, 6: 2.5},
        allowed_token_ids=(5, 6),
        bad_words=("worse",),
        grammar='start: "yes" | "no"',
        repetition_detection=RepetitionDetection(8, 1, 3),
        extra_args={"watermark": [1, "a", 0.5]},
        priority=-3,
        cache_salt="salt",
    )
    sent = unpack(pack(Submission(1, [1, 2, 3], sampling, account("r"), "Meter")), Submission)
    async with aclosing(await opened(replica)):
        submit(replica, "s", sent)
        assert engine.submitted == [([1, 2, 3], sampling)]


async def test_a_submission_is_told_to_have_been_heard_at_once(replica: EngineReplica) -> None:
    async with aclosing(await opened(replica)) as steps:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        submit(replica, "s", submission(4))
        step = await take(steps)
        assert (step.deltas, step.acknowledged, step.refused, step.load.running) == ([], 4, [], 1)
        assert loop.time() - begun < HEARTBEAT_S / 2


async def test_a_submission_that_the_engine_chokes_on_fails_alone(
    replica: EngineReplica, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aclosing(await opened(replica)) as steps:
        submit(replica, "s", submission(1))
        await take(steps)

        def choke(*_arguments: object, **_more: object) -> None:
            raise ValueError("a bug in the engine")

        monkeypatch.setattr(engine, "submit", choke)
        submit(replica, "s", submission(2, "q"))
        step = await take(steps)
        assert step.deltas == [TokenDelta(2, [], "failed", message="ValueError('a bug in the engine')")]
        engine.generate("r", [10])
        assert (await take(steps)).deltas == [TokenDelta(1, [10])]


async def test_a_submission_that_cannot_be_read_fails_alone(replica: EngineReplica, engine: ScriptedEngine) -> None:
    async with aclosing(await opened(replica)) as steps:
        unreadable = msgspec.Raw(msgspec.msgpack.encode({"generation": 1, "token_ids": "?"}))
        readable = msgspec.Raw(pack(submission(2)))
        replica.take_commands("s", pack(EngineCommands([], [unreadable, readable], [])))
        engine.generate("r", [10])
        [failed, healthy] = (await take(steps)).deltas
        assert (failed.generation, failed.finish_reason, healthy) == (1, "failed", TokenDelta(2, [10]))


# --- aborts and the end of a stream -------------------------------------------------------------------------------


async def test_an_abort_reaches_the_engine_and_drops_what_was_not_sent(
    replica: EngineReplica, engine: ScriptedEngine
) -> None:
    async with aclosing(await opened(replica)) as steps:
        submit(replica, "s", submission(1), submission(2, "q"))
        engine.generate("r", [10])
        engine.generate("q", [20])
        abort(replica, "s", 1)
        assert list(engine.alive) == ["q-2"]
        assert (await take(steps)).deltas == [TokenDelta(2, [20])]
        assert replica.load().running == 1


async def test_an_abort_tells_the_load_at_once(replica: EngineReplica, engine: ScriptedEngine) -> None:
    async with aclosing(await opened(replica)) as steps:
        submit(replica, "s", submission(1))
        engine.generate("r", [10])
        assert (await take(steps)).load.running == 1
        loop = asyncio.get_running_loop()
        begun = loop.time()
        abort(replica, "s", 1)
        assert (await take(steps)).load.running == 0
        assert loop.time() - begun < HEARTBEAT_S / 2


async def test_aborting_what_has_ended_or_never_was_is_harmless(replica: EngineReplica, engine: ScriptedEngine) -> None:
    async with aclosing(await opened(replica)) as steps:
        submit(replica, "s", submission(1), submission(2, "q"))
        engine.generate("r", [10], "length")
        await take(steps)
        abort(replica, "s", 1, 99)
        abort(replica, "no such stream", 2)
        assert engine.aborted == []
        assert list(engine.alive) == ["q-2"]


async def test_closing_a_stream_aborts_its_generations(replica: EngineReplica, engine: ScriptedEngine) -> None:
    steps = await opened(replica)
    submit(replica, "s", submission(1), submission(2, "q"))
    engine.generate("q", [20], "length")
    await steps.aclose()
    assert engine.aborted == ["r-1"]
    assert replica.load().running == 0


async def test_cancelling_a_receiver_that_waits_aborts_its_generations(
    replica: EngineReplica, engine: ScriptedEngine
) -> None:
    steps = await opened(replica)
    submit(replica, "s", submission(1))
    await take(steps)
    receiver = asyncio.create_task(take(steps))
    await asyncio.sleep(0)
    receiver.cancel()
    await asyncio.wait([receiver])
    assert receiver.cancelled()
    assert engine.aborted == ["r-1"]


async def test_two_streams_are_isolated(replica: EngineReplica, engine: ScriptedEngine) -> None:
    ours, theirs = await opened(replica, "ours"), await opened(replica, "theirs")
    submit(replica, "ours", submission(1, "r"))
    submit(replica, "theirs", submission(1, "q"))
    abort(replica, "theirs", 2)
    engine.generate("r", [10])
    engine.generate("q", [20])
    assert (await take(ours)).deltas == [TokenDelta(1, [10])]
    assert (await take(theirs)).deltas == [TokenDelta(1, [20])]
    await ours.aclose()
    assert engine.aborted == ["r-1"]
    engine.generate("q", [21], "length")
    assert await take(theirs) == EngineStep(2, replica.load(), [TokenDelta(1, [21], "length")], acknowledged=1)
    await theirs.aclose()


# --- health and shutdown ------------------------------------------------------------------------------------------


async def test_the_death_of_the_engine_ends_all_streams(replica: EngineReplica, engine: ScriptedEngine) -> None:
    """So that every ingress resumes its generations elsewhere at once."""
    ours, theirs = await opened(replica, "ours"), await opened(replica, "theirs")
    submit(replica, "ours", submission(1))
    engine.generate("r", [10])
    engine.on_death()
    assert await rest(ours) == [TokenDelta(1, [10])]
    assert await rest(theirs) == []
    submit(replica, "ours", submission(2))
    assert len(engine.submitted) == 1


async def test_a_failed_health_check_ends_all_streams_and_is_told(
    replica: EngineReplica, engine: ScriptedEngine
) -> None:
    steps = await opened(replica)
    submit(replica, "s", submission(1))
    await replica.check_health()
    engine.generate("r", [10])
    assert (await take(steps)).deltas == [TokenDelta(1, [10])]
    engine.healthy = False
    with pytest.raises(EngineUnhealthy):
        await replica.check_health()
    assert await rest(steps) == []
    assert engine.aborted == ["r-1"]


async def test_no_stream_is_opened_to_an_unhealthy_engine(replica: EngineReplica, engine: ScriptedEngine) -> None:
    engine.healthy = False
    with pytest.raises(EngineUnhealthy):
        await anext(replica.steps("s"))
    submit(replica, "s", submission(1))
    assert engine.submitted == []


async def test_shutting_down_ends_the_streams_and_can_be_repeated(
    replica: EngineReplica, engine: ScriptedEngine
) -> None:
    steps = await opened(replica)
    submit(replica, "s", submission(1))
    await replica.shutdown()
    assert await rest(steps) == []
    assert engine.aborted == ["r-1"]
    await replica.shutdown()
    assert engine.shutdowns == 2


# --- the drain rate -----------------------------------------------------------------------------------------------


async def test_the_load_is_the_engines_with_the_drain_rate(replica: EngineReplica, engine: ScriptedEngine) -> None:
    assert replica.load() == EngineLoad(kv_blocks_free=5, kv_blocks_total=9, finished_per_s=0.0, max_num_seqs=4)


async def test_finished_generations_make_the_drain_rate(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("deployments.engine.replica.time.monotonic", lambda: now)
    replica = EngineReplica(engine, OrphanedRequests(RecordedOutbox()))
    async with aclosing(await opened(replica)):
        submit(replica, "s", submission(1), submission(2, "q"), submission(3, "p"))
        engine.generate("r", [10], "length")
        engine.generate("q", [20], "stop_token")
        engine.generate("p", [30])
        now += 10.0
        assert replica.load().finished_per_s == pytest.approx(0.2)


# --- a request of many choices ------------------------------------------------------------------------------------


async def test_the_engine_is_handed_a_large_request_in_bounded_turns_of_the_event_loop(
    replica: EngineReplica, engine: ScriptedEngine
) -> None:
    async with aclosing(await opened(replica)) as steps:
        siblings = tuple(Sibling(1 + n, n, n) for n in range(1, 1024))
        submit(replica, "s", msgspec.structs.replace(submission(1), siblings=siblings))
        turns = [len(engine.submitted)]
        while len(engine.submitted) < 1024:
            await asyncio.sleep(0)
            turns.append(len(engine.submitted) - sum(turns))
        assert max(turns) <= 8
        assert [sampling.seed for _, sampling in engine.submitted] == [None, *range(1, 1024)]
        assert (await take(steps)).acknowledged == 1024


async def test_what_is_aborted_before_the_engine_has_it_never_reaches_it(
    replica: EngineReplica, engine: ScriptedEngine
) -> None:
    async with aclosing(await opened(replica)) as steps:
        siblings = tuple(Sibling(1 + n, n) for n in range(1, 100))
        submit(replica, "s", msgspec.structs.replace(submission(1), siblings=siblings))
        abort(replica, "s", *range(1, 101))
        submit(replica, "s", submission(101, "q"))
        while (await take(steps)).acknowledged < 101:
            pass
        begun = len(engine.submitted) - 1
        assert begun <= 16
        assert len(engine.aborted) == begun
        assert list(engine.alive) == [key for key in engine.alive if key.startswith("q-")]


async def test_what_a_stream_that_has_ended_had_submitted_never_reaches_the_engine(
    replica: EngineReplica, engine: ScriptedEngine
) -> None:
    async with aclosing(await opened(replica)):
        siblings = tuple(Sibling(1 + n, n) for n in range(1, 100))
        submit(replica, "s", msgspec.structs.replace(submission(1), siblings=siblings))
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(engine.submitted) <= 16
    assert engine.alive == {}


async def test_the_siblings_of_a_submission_that_cannot_be_read_fail_with_it(replica: EngineReplica) -> None:
    async with aclosing(await opened(replica)) as steps:
        unreadable = msgspec.Raw(msgspec.msgpack.encode({"generation": 1, "token_ids": "?", "siblings": [[2, 1]]}))
        replica.take_commands("s", pack(EngineCommands([], [unreadable], [])))
        step = await take(steps)
        assert [(each.generation, each.finish_reason) for each in step.deltas] == [(1, "failed"), (2, "failed")]
        assert step.acknowledged == 2
