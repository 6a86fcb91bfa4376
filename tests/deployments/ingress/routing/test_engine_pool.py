"""EnginePool over replicas in memory: who gets a generation, and that none is lost with its replica."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.contracts import EngineLoad, FinishReason, PositionLogprobs, Sampling, TokenDelta
from deployments.ingress.errors import ApiError, GivenUp, InternalError, ModelNotReady, NotResumable, Overloaded
from deployments.ingress.inference.generation import DeltaQueue, Generation
from deployments.ingress.routing.engine_pool import EnginePool
from deployments.scaling.ingress_demand import ModelDemand
from tests.deployments.accounts import RecordedOutbox, account
from tests.deployments.ingress.memory_replicas import (
    LIMITS,
    SETTINGS,
    MemoryReplica,
    ScriptedReplica,
    opened_pool,
    replicas_of,
    undisturbed,
)
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet, run_in_virtual_time, write_scheduler

PROMPT = [1, 2, 3]
_request_numbers = count()


@dataclass
class Request:
    """One generation with a mailbox of its own, and all that came into it."""

    prompt: list[int]
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[list[PositionLogprobs | None]] = field(default_factory=list)
    """Each time that they were told."""
    finish: FinishReason | None = None
    message: str = ""
    param: str | None = None
    error: ApiError | None = None
    ends: int = 0

    def __post_init__(self) -> None:
        self.mailbox = DeltaQueue(write_scheduler())
        self.generation = Generation(
            account(f"req-{next(_request_numbers)}"), "Meter", 0, self.prompt, self.sampling, self.mailbox
        )

    async def receive(self) -> None:
        for _candidate, delta, error in await self.mailbox.take():
            self.error = error
            self.ends += error is not None
            if delta is not None:
                self.tokens += delta.token_ids
                self.logprobs += delta.logprobs or []
                if delta.prompt_logprobs is not None:
                    self.prompt_logprobs.append(delta.prompt_logprobs)
                self.finish, self.message, self.param = delta.finish_reason, delta.message, delta.param
                self.ends += delta.finish_reason is not None

    async def until_ended(self) -> None:
        while not self.ends:
            await self.receive()

    async def until(self, tokens: int) -> None:
        while len(self.tokens) < tokens:
            await self.receive()

    def assert_undisturbed(self) -> None:
        assert (self.tokens, self.finish) == undisturbed(self.prompt, self.sampling)
        assert (self.ends, self.error) == (1, None)
        told = [] if self.sampling.logprobs is None else self.tokens
        assert [position.token_ids[0] for position in self.logprobs] == told
        told_of_prompt = [] if self.sampling.prompt_logprobs is None else [len(self.prompt)]
        assert [len(positions) for positions in self.prompt_logprobs] == told_of_prompt


def start(pool: EnginePool, *prompt: int, max_tokens: int = 10, logprobs: int | None = None) -> Request:
    """With `logprobs` those of the prompt are asked for too."""
    sampling = Sampling(max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=logprobs)
    request = Request(list(prompt) or PROMPT, sampling)
    pool.start([request.generation])
    return request


def start_together(pool: EnginePool, number: int, max_tokens: int = 50) -> list[Request]:
    requests = [Request([n + 1], Sampling(max_tokens=max_tokens)) for n in range(number)]
    pool.start([request.generation for request in requests])
    return requests


def home(replicas: dict[str, MemoryReplica]) -> str:
    """The only replica that has work."""
    [busy] = [replica_id for replica_id, replica in replicas.items() if replica.sequences]
    return busy


def rotation(pool: EnginePool) -> list[str]:
    return sorted(card["id"] for card in pool.cards() if card["in_rotation"])


def now() -> float:
    return asyncio.get_running_loop().time()


async def watch_for_silence(pool: EnginePool) -> None:
    while True:
        await asyncio.sleep(0.25)
        pool.check_silence(now())


# --- who gets a generation -----------------------------------------------------------------------------------------


async def chosen(*loads: EngineLoad) -> str:
    scripted = {f"r{number}": ScriptedReplica() for number in range(len(loads))}
    for replica, load in zip(scripted.values(), loads, strict=True):
        replica.load = load
    async with opened_pool(scripted) as pool:
        await quiet()
        start(pool)
        await quiet()
    [winner] = [replica_id for replica_id, replica in scripted.items() if replica.submissions]
    return winner


@in_virtual_time
async def test_the_replica_with_the_fewest_sequences_is_chosen() -> None:
    assert (
        await chosen(EngineLoad(running=3), EngineLoad(running=1, waiting=1), EngineLoad(running=2, waiting=3)) == "r1"
    )


@in_virtual_time
async def test_among_equals_the_fewest_tokens_to_prefill_and_then_the_most_free_memory_decide() -> None:
    assert await chosen(EngineLoad(waiting_prefill_tokens=10), EngineLoad(waiting_prefill_tokens=9)) == "r1"
    assert await chosen(EngineLoad(kv_blocks_free=9), EngineLoad(kv_blocks_free=10)) == "r1"


@in_virtual_time
async def test_what_a_replica_has_not_reported_yet_counts_until_it_reports() -> None:
    scripted = {"r0": ScriptedReplica(), "r1": ScriptedReplica()}
    scripted["r1"].load = EngineLoad(running=2)
    async with opened_pool(scripted) as pool:
        await quiet()
        for _ in range(4):
            start(pool)
            await quiet()
        placed = [len(replica.submissions) for replica in scripted.values()]
        assert placed == [3, 1]  # 0, 1, 2 and then, both being equal but r0 with more unreported, 2 again

        scripted["r1"].tell(load=EngineLoad())
        await quiet()
        start(pool)
        await quiet()
        assert len(scripted["r1"].submissions) == 2


@in_virtual_time
async def test_the_choices_of_one_request_are_spread() -> None:
    async with replicas_of(3) as replicas, opened_pool(replicas) as pool:
        await quiet()
        requests = start_together(pool, 7)
        await asyncio.sleep(0.005)
        assert sorted(replica.sequences for replica in replicas.values()) == [2, 2, 3]
        for request in requests:
            await request.until_ended()
            request.assert_undisturbed()


@in_virtual_time
async def test_requests_that_come_at_the_same_moment_are_spread() -> None:
    scripted = {f"r{number}": ScriptedReplica() for number in range(4)}
    async with opened_pool(scripted) as pool:
        await quiet()
        for _ in range(40):
            start(pool)
        await quiet()
    assert [len(replica.submissions) for replica in scripted.values()] == [10] * 4


@in_virtual_time
async def test_a_large_pool_is_used_evenly_though_few_of_it_are_looked_at() -> None:
    scripted = {f"r{number}": ScriptedReplica() for number in range(200)}
    async with opened_pool(scripted) as pool:
        await quiet()
        for _ in range(2000):
            start(pool)
        await quiet()
    assert max(len(replica.submissions) for replica in scripted.values()) <= 15  # ten on average


@in_virtual_time
async def test_a_full_replica_passes_the_generation_on_to_another() -> None:
    scripted = {"full": ScriptedReplica(), "busy": ScriptedReplica()}
    scripted["full"].full = True
    scripted["busy"].load = EngineLoad(running=5)
    async with opened_pool(scripted) as pool:
        await quiet()
        request = start(pool)
        await quiet()
        assert [len(replica.submissions) for replica in scripted.values()] == [1, 1]
        number = scripted["busy"].submissions[0].generation
        scripted["busy"].tell(TokenDelta(number, [7], "length"))
        await request.until_ended()
        assert (request.tokens, request.finish) == ([7], "length")


@pytest.mark.parametrize(
    ("load", "retry_after_s"),
    [
        (EngineLoad(waiting=400, finished_per_s=10.0), 20.0),
        (EngineLoad(waiting=400), 1.0),
        (EngineLoad(waiting=4000, finished_per_s=1.0), 60.0),
        (EngineLoad(waiting=1, finished_per_s=100.0), 1.0),
    ],
)
def test_when_all_are_full_the_caller_hears_when_half_the_queue_will_be_done(
    load: EngineLoad, retry_after_s: float
) -> None:
    async def scenario() -> None:
        replica = ScriptedReplica()
        replica.load, replica.full = load, True
        async with opened_pool({"r0": replica}) as pool:
            await quiet()
            request = start(pool)
            await request.until_ended()
            assert isinstance(request.error, Overloaded)
            assert request.error.retry_after_s == retry_after_s

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_what_one_replica_cannot_take_of_a_request_is_refused_and_the_rest_can_be_aborted() -> None:
    tight = replace(SETTINGS, max_num_seqs=1)
    async with replicas_of(1, tight, max_waiting=2) as replicas, opened_pool(replicas) as pool:
        await quiet()
        requests = start_together(pool, 5)
        await quiet()
        await asyncio.sleep(0.001)
        refused = [request for request in requests if request.generation.ended]
        assert refused
        for request in refused:
            await request.until_ended()
            assert isinstance(request.error, Overloaded)
        pool.abort([request.generation for request in requests])
        await asyncio.sleep(0.001)
        assert replicas["r0"].sequences == 0


# --- no replica ----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_without_a_replica_a_generation_is_held_until_one_is_live() -> None:
    async with replicas_of(1) as replicas, opened_pool(replicas) as pool:
        pool.replicas_changed(frozenset())
        await quiet()
        assert not pool.ready
        request = start(pool)
        await asyncio.sleep(29.0)
        assert not request.generation.ended
        pool.replicas_changed(frozenset(replicas))
        await request.until_ended()
        request.assert_undisturbed()
        assert pool.ready


@in_virtual_time
async def test_a_held_generation_ends_as_model_not_ready_after_the_hold_time() -> None:
    async with opened_pool(dict[str, ScriptedReplica]()) as pool:
        request = start(pool)
        await request.until_ended()
        assert isinstance(request.error, ModelNotReady)
        assert now() == pytest.approx(LIMITS.hold_timeout_s)


@in_virtual_time
async def test_no_more_than_the_bound_are_held() -> None:
    async with opened_pool(dict[str, ScriptedReplica](), replace(LIMITS, max_held=2)) as pool:
        held = [start(pool), start(pool)]
        await quiet()
        refused = start(pool)
        await refused.until_ended()
        assert isinstance(refused.error, ModelNotReady)
        assert now() < 1
        assert not any(request.generation.ended for request in held)
        for request in held:
            await request.until_ended()
        waiting = start(pool)  # there is room again
        await quiet()
        assert not waiting.generation.ended
        pool.abort([waiting.generation])


@in_virtual_time
async def test_no_more_prompt_tokens_than_the_bound_are_held() -> None:
    async with opened_pool(dict[str, ScriptedReplica](), replace(LIMITS, max_held_tokens=10)) as pool:
        held = start(pool, *range(6))
        await quiet()
        refused = start(pool, *range(5))
        await refused.until_ended()
        assert isinstance(refused.error, ModelNotReady)
        fitting = start(pool, *range(4))
        await quiet()
        assert pool.demand() == ModelDemand(held=2, held_tokens=10)
        pool.abort([held.generation, fitting.generation])


@in_virtual_time
async def test_a_pool_at_zero_is_ready_and_holds_longer() -> None:
    limits = replace(LIMITS, cold_start_timeout_s=120.0)
    async with replicas_of(1) as replicas, opened_pool(replicas, limits) as pool:
        pool.replicas_changed(frozenset())
        await quiet()
        assert pool.ready
        assert pool.cold
        request = start(pool)
        await asyncio.sleep(119.0)
        assert not request.generation.ended
        pool.replicas_changed(frozenset(replicas))
        await request.until_ended()
        request.assert_undisturbed()
        assert not pool.cold


@in_virtual_time
async def test_retry_after_is_what_is_left_of_a_start_like_the_last() -> None:
    limits = replace(LIMITS, cold_start_timeout_s=120.0, max_held=1)
    async with replicas_of(1) as replicas, opened_pool(replicas, limits) as pool:
        pool.replicas_changed(frozenset())
        await asyncio.sleep(100.0)
        first = start(pool)
        await quiet()
        assert await retry_after(pool) == 10.0  # no start is known
        await asyncio.sleep(40.0)
        pool.replicas_changed(frozenset(replicas))
        await first.until_ended()
        pool.replicas_changed(frozenset())
        await asyncio.sleep(100.0)
        start(pool)
        await asyncio.sleep(15.0)
        assert await retry_after(pool) == pytest.approx(25.0, abs=0.5)
        await asyncio.sleep(60.0)
        assert await retry_after(pool) == pytest.approx(10.0, abs=0.5)  # it takes longer: a quarter of the last


async def retry_after(pool: EnginePool) -> float | None:
    """What one more request is told while as many are held as may be."""
    refused = start(pool)
    await refused.until_ended()
    assert isinstance(refused.error, ModelNotReady)
    return refused.error.retry_after_s


@in_virtual_time
async def test_first_tokens_of_the_last_seconds_are_averaged() -> None:
    async with opened_pool(dict[str, ScriptedReplica]()) as pool:
        assert pool.demand().first_token_s == 0.0
        for first_token_s in (1.0, 3.0):
            pool.first_token(first_token_s)
        await asyncio.sleep(3.0)
        pool.first_token(5.0)
        assert pool.demand().first_token_s == pytest.approx(3.0)
        await asyncio.sleep(3.0)
        assert pool.demand().first_token_s == pytest.approx(5.0)
        await asyncio.sleep(3.0)
        assert pool.demand().first_token_s == 0.0


@in_virtual_time
async def test_generations_that_lost_their_replica_are_held_whatever_the_bound() -> None:
    async with replicas_of(1) as replicas, opened_pool(replicas, replace(LIMITS, max_held=2)) as pool:
        await quiet()
        requests = start_together(pool, 20)
        await asyncio.sleep(0.1)
        replicas["r0"].reachable = False
        replicas["r0"].break_streams()
        await asyncio.sleep(60)
        replicas["r0"].reachable = True
        for request in requests:
            await request.until_ended()
            request.assert_undisturbed()


# --- lost replicas -------------------------------------------------------------------------------------------------


def lose_by_breaking(replica: MemoryReplica) -> None:
    replica.reachable = False
    replica.break_streams()


def lose_by_silence(replica: MemoryReplica) -> None:
    replica.fall_silent()


@pytest.mark.parametrize("lose", [lose_by_breaking, lose_by_silence])
def test_generations_of_a_lost_replica_go_on_elsewhere_without_a_token_lost_or_repeated(
    lose: Callable[[MemoryReplica], None],
) -> None:
    async def scenario() -> None:
        async with replicas_of(3) as replicas, opened_pool(replicas) as pool:
            watcher = asyncio.create_task(watch_for_silence(pool))
            await quiet()
            requests = start_together(pool, 12)
            for request in requests:
                await request.until(10)
            lose(replicas["r1"])
            for request in requests:
                await request.until_ended()
                request.assert_undisturbed()
            moved = [request for request in requests if request.generation.resumes]
            assert len(moved) == 4
            resumed = [s for s in [*replicas["r0"].submissions, *replicas["r2"].submissions] if s.resumed]
            assert sorted(s.account.request_id for s in resumed) == sorted(r.generation.request_id for r in moved)
            assert all(len(s.token_ids) + s.sampling.max_tokens == 1 + 50 for s in resumed)
            assert rotation(pool) == ["r0", "r2"]
            watcher.cancel()

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_a_resumed_generation_is_taken_by_a_full_replica() -> None:
    tight = replace(SETTINGS, max_num_seqs=1)
    async with replicas_of(2, tight, max_waiting=1) as replicas, opened_pool(replicas) as pool:
        await quiet()
        requests: list[Request] = []
        for _ in range(4):  # on each replica one that runs and one that waits
            requests.append(start(pool, max_tokens=20))
            await asyncio.sleep(0.02)
        refused = start(pool)
        await refused.until_ended()
        assert isinstance(refused.error, Overloaded)

        replicas["r0"].reachable = False
        replicas["r0"].break_streams()
        for request in requests:
            await request.until_ended()
            request.assert_undisturbed()


@in_virtual_time
async def test_a_generation_that_kills_its_replicas_is_given_up_and_the_others_are_not() -> None:
    async with replicas_of(2) as replicas, opened_pool(replicas) as pool:
        await quiet()
        for replica in replicas.values():
            replica.killed_by = 27
        other = start(pool, 9, max_tokens=400)
        await other.until(1)
        killer = start(pool, 27)
        await killer.until_ended()
        assert isinstance(killer.error, GivenUp)
        assert killer.error.headers() == {"x-should-retry": "false"}
        assert killer.generation.resumes == 2
        assert (pool.counters().given_up, pool.counters().suspects) == (1, 0)
        await other.until_ended()
        other.assert_undisturbed()
        assert other.generation.resumes in (1, 2)


@in_virtual_time
async def test_what_may_have_killed_a_replica_goes_on_alone_and_never_together_with_bystanders() -> None:
    async with replicas_of(3) as replicas, opened_pool(replicas) as pool:
        await quiet()
        bystanders = start_together(pool, 9, max_tokens=400)
        for request in bystanders:
            await request.until(2)
        for replica in replicas.values():
            replica.killed_by = 27
        innocent = start_together(pool, 3, max_tokens=40)
        killer = start(pool, 27)
        await killer.until_ended()
        for request in [*bystanders, *innocent]:
            await request.until_ended()
            request.assert_undisturbed()
        assert isinstance(killer.error, GivenUp)
        for replica in replicas.values():  # nothing was resumed in one batch with the killer
            together = [each.account.request_id for each in replica.submissions if each.resumed]
            assert killer.generation.request_id not in together
        assert pool._suspects == deque()
        assert pool._trials == {}


@in_virtual_time
async def test_suspects_are_tried_one_at_a_time_once_the_first_steps_of_bystanders_are_over() -> None:
    first, second = ScriptedReplica(), ScriptedReplica()
    async with opened_pool({"r0": first, "r1": second}) as pool:
        await quiet()
        first.load = second.load = EngineLoad(max_num_seqs=8)
        requests = start_together(pool, 6)
        await quiet()
        own = [each for each in requests if each.prompt in [submission.token_ids for submission in first.submissions]]
        first.tell(TokenDelta(1, [5]))  # of three only the first is beyond its first step
        await quiet()
        first.greeting = False  # it does not come back
        first.end_stream()
        await quiet()

        def resumed() -> list[list[int]]:
            return [submission.token_ids for submission in second.submissions if submission.resumed]

        bystander, *suspects = own
        assert resumed() == [[*bystander.prompt, 5]]
        second.tell(TokenDelta(second.submissions[-1].generation, [6]))
        await quiet()
        assert resumed()[1:] == [suspects[0].prompt]
        second.tell()
        await quiet()
        assert resumed()[1:] == [suspects[0].prompt]
        second.tell(TokenDelta(second.submissions[-1].generation, [7]))
        await quiet()
        assert resumed()[1:] == [suspects[0].prompt, suspects[1].prompt]


@in_virtual_time
async def test_nothing_new_is_placed_beside_a_suspect_while_another_replica_is_there() -> None:
    replicas = {f"r{number}": ScriptedReplica() for number in range(3)}
    async with opened_pool(replicas) as pool:
        await quiet()
        suspect = start(pool, 27)
        await quiet()
        [home] = [replica for replica in replicas.values() if replica.submissions]
        home.greeting = False
        home.end_stream()
        await quiet()
        assert suspect.generation.placement is not None
        trying = replicas[suspect.generation.placement.stream.replica_id]
        for number in range(6):
            start(pool, number)
        await quiet()
        assert [submission.token_ids for submission in trying.submissions] == [[27]]


@in_virtual_time
async def test_what_waited_behind_a_full_batch_is_no_suspect() -> None:
    first, second = ScriptedReplica(), ScriptedReplica()
    async with opened_pool({"r0": first, "r1": second}) as pool:
        await quiet()
        second.tell(load=EngineLoad(running=100))
        await quiet()
        requests = start_together(pool, 6)
        await quiet()
        first.tell(TokenDelta(1, [5]), load=EngineLoad(running=1, waiting=5, max_num_seqs=2))
        await quiet()
        assert len(first.submissions) == 6
        first.greeting = False
        first.end_stream()
        await quiet()
        moved = [submission.token_ids for submission in second.submissions]
        assert moved == [[*requests[0].prompt, 5], *(each.prompt for each in requests[2:])]  # all but the second


@in_virtual_time
async def test_a_suspect_that_finds_no_replica_in_time_is_told_so() -> None:
    replica = ScriptedReplica()
    async with opened_pool({"r0": replica}) as pool:
        watcher = asyncio.create_task(watch_for_silence(pool))
        await quiet()
        suspect = start(pool, 27)
        await quiet()
        replica.greeting = False
        replica.end_stream()
        began = now()
        await suspect.until_ended()
        assert isinstance(suspect.error, ModelNotReady)
        assert now() - began == pytest.approx(LIMITS.resume_timeout_s, abs=0.5)
        watcher.cancel()


@in_virtual_time
async def test_an_answer_in_a_required_form_ends_with_an_error_rather_than_begin_anew_inside_itself() -> None:
    async with replicas_of(2) as replicas, opened_pool(replicas) as pool:
        await quiet()
        sampling = Sampling(max_tokens=40, grammar="start: %json {}")
        begun, fresh = Request([3], sampling), Request([4], sampling)
        pool.start([begun.generation])
        await begun.until(3)
        pool.start([fresh.generation])
        replicas[home(replicas)].break_streams()
        await begun.until_ended()
        assert isinstance(begun.error, NotResumable)
        assert pool.counters().not_resumable == 1
        await fresh.until_ended()
        fresh.assert_undisturbed()


@in_virtual_time
async def test_a_generation_that_gains_a_token_between_losses_is_never_given_up() -> None:
    async with replicas_of(2) as replicas, opened_pool(replicas) as pool:
        await quiet()
        request = start(pool, max_tokens=40)
        for tokens in range(1, 31):
            await request.until(tokens)
            replicas[home(replicas)].break_streams()
        await request.until_ended()
        request.assert_undisturbed()
        assert request.generation.resumes == 30


@in_virtual_time
async def test_what_a_lost_replica_made_is_noted_unless_its_request_is_settled() -> None:
    outbox, mailbox = RecordedOutbox(), DeltaQueue(write_scheduler())
    use = account("two-choices", prompt_tokens=len(PROMPT), choices=2)
    async with replicas_of(2) as replicas, opened_pool(replicas, outbox=outbox) as pool:
        await quiet()
        short, long = (
            Generation(use, "Meter-1", candidate, PROMPT, Sampling(max_tokens=max_tokens), mailbox)
            for candidate, max_tokens in enumerate((5, 500))
        )
        pool.start([short, long])
        while not short.ended:
            await mailbox.take()
        ran_short, ran_long = (each.placement.stream.replica_id for each in (short, long) if each.placement)
        assert ran_short != ran_long
        replicas[ran_short].break_streams()
        await quiet()
        noted = outbox.checkpoints["two-choices"]
        assert (noted.parts, noted.witness, noted.prompt_tokens) == ({0: 5, 1: len(long.tokens)}, "engine", 3)
        while not long.ended:
            await mailbox.take()
        pool.release("two-choices")
        outbox.checkpoints.clear()
        for replica in replicas.values():
            replica.break_streams()
        await quiet()
        assert outbox.checkpoints == {}


@in_virtual_time
async def test_a_lost_replica_leaves_the_rotation_and_returns_when_it_speaks_again() -> None:
    async with replicas_of(2) as replicas, opened_pool(replicas) as pool:
        watcher = asyncio.create_task(watch_for_silence(pool))
        await quiet()
        assert rotation(pool) == ["r0", "r1"]
        replicas["r0"].fall_silent()
        await asyncio.sleep(2.9)
        assert rotation(pool) == ["r0", "r1"]
        await asyncio.sleep(1.5)
        assert rotation(pool) == ["r1"]
        await asyncio.sleep(60)
        assert rotation(pool) == ["r1"]
        replicas["r0"].speak_again()
        await asyncio.sleep(10)
        assert rotation(pool) == ["r0", "r1"]
        watcher.cancel()


@in_virtual_time
async def test_prompt_tokens_found_in_a_cache_are_those_of_the_first_replica() -> None:
    prompt = [1 + n % 20 for n in range(64)]
    async with replicas_of(2) as replicas, opened_pool(replicas) as pool:
        await quiet()
        first = start(pool, *prompt, max_tokens=30)
        await first.until(20)
        replicas[home(replicas)].break_streams()
        await first.until_ended()
        assert first.generation.cached_tokens == 0
        again = start(pool, *prompt)
        await again.until_ended()
        assert again.generation.cached_tokens == 63


@pytest.mark.parametrize("lost_after", [0, 1, 20])
def test_log_probabilities_survive_a_replica_and_those_of_the_prompt_are_told_once(lost_after: int) -> None:
    async def scenario() -> None:
        async with replicas_of(2) as replicas, opened_pool(replicas) as pool:
            await quiet()
            request = start(pool, max_tokens=40, logprobs=2)
            if lost_after:
                await request.until(lost_after)
            else:
                await asyncio.sleep(0.001)  # placed, and without a token
            first = home(replicas)
            replicas[first].break_streams()
            await request.until_ended()
            request.assert_undisturbed()
            assert request.generation.resumes == 1
            [resumed] = [s for replica in replicas.values() for s in replica.submissions if s.resumed]
            assert resumed.sampling.logprobs == 2
            assert resumed.sampling.prompt_logprobs == (None if lost_after else 2)
            assert resumed.token_ids == PROMPT + request.tokens[:lost_after]

    run_in_virtual_time(scenario())


@in_virtual_time
async def test_a_refusal_ends_a_generation_with_its_reason_and_is_not_tried_elsewhere() -> None:
    scripted = {"r0": ScriptedReplica(), "r1": ScriptedReplica()}
    async with opened_pool(scripted) as pool:
        await quiet()
        request = start(pool)
        await quiet()
        [replica] = [replica for replica in scripted.values() if replica.submissions]
        number = replica.submissions[0].generation
        replica.tell(TokenDelta(number, [], "refused", message="No such grammar.", param="guided_grammar"))
        await request.until_ended()
        assert (request.finish, request.message, request.param) == ("refused", "No such grammar.", "guided_grammar")
        assert (request.ends, request.error, request.generation.ended) == (1, None, True)
        await asyncio.sleep(10)
        assert [len(replica.submissions) for replica in scripted.values()].count(0) == 1
        assert [replica.aborts for replica in scripted.values()] == [[], []]


# --- leaving replicas ----------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_leaving_replica_gets_nothing_new_and_finishes_what_it_has() -> None:
    async with replicas_of(2) as replicas, opened_pool(replicas) as pool:
        await quiet()
        request = start(pool, max_tokens=100)
        await request.until(1)
        leaving = home(replicas)
        [staying] = replicas.keys() - {leaving}
        pool.replicas_changed(frozenset({staying}))
        later = start_together(pool, 3, max_tokens=10)
        for one in [*later, request]:
            await one.until_ended()
            one.assert_undisturbed()
        assert request.generation.resumes == 0
        assert len(replicas[staying].submissions) == 3
        await quiet()
        assert replicas[leaving].streams == 0
        assert [card["id"] for card in pool.cards()] == [staying]


@in_virtual_time
async def test_what_a_leaving_replica_does_not_finish_in_time_goes_on_elsewhere() -> None:
    async with replicas_of(2) as replicas, opened_pool(replicas, replace(LIMITS, drain_timeout_s=0.5)) as pool:
        await quiet()
        request = start(pool, max_tokens=100)
        await request.until(1)
        leaving = home(replicas)
        pool.replicas_changed(frozenset(replicas.keys() - {leaving}))
        await request.until_ended()
        request.assert_undisturbed()
        assert request.generation.resumes == 1
        [resumed] = replicas[next(iter(replicas.keys() - {leaving}))].submissions
        assert len(resumed.token_ids) >= 40
        assert replicas[leaving].sequences == 0


@in_virtual_time
async def test_a_leaving_replica_that_is_lost_gives_its_generations_back_at_once() -> None:
    async with replicas_of(2) as replicas, opened_pool(replicas) as pool:
        await quiet()
        request = start(pool, max_tokens=100)
        await request.until(10)
        leaving = home(replicas)
        pool.replicas_changed(frozenset(replicas.keys() - {leaving}))
        await request.until(20)
        replicas[leaving].break_streams()
        await request.until_ended()
        request.assert_undisturbed()
        assert now() < 1.2
        assert [card["id"] for card in pool.cards()] != [leaving]


@in_virtual_time
async def test_a_replica_that_is_listed_again_while_it_leaves_returns_after_the_drain() -> None:
    async with replicas_of(1) as replicas, opened_pool(replicas) as pool:
        await quiet()
        request = start(pool, max_tokens=50)
        await request.until(1)
        pool.replicas_changed(frozenset())
        await quiet()
        pool.replicas_changed(frozenset(replicas))
        assert rotation(pool) == []
        held = start(pool)
        for one in (request, held):
            await one.until_ended()
            one.assert_undisturbed()
        assert rotation(pool) == ["r0"]


@in_virtual_time
async def test_changes_that_follow_each_other_at_once_drain_a_replica_once() -> None:
    async with replicas_of(2) as replicas, opened_pool(replicas) as pool:
        await quiet()
        pool.replicas_changed(frozenset({"r1"}))
        pool.replicas_changed(frozenset())
        pool.replicas_changed(frozenset(replicas))
        await asyncio.sleep(1)
        assert rotation(pool) == ["r0", "r1"]
        assert [replica.streams for replica in replicas.values()] == [1, 1]


@in_virtual_time
async def test_a_replica_that_leaves_before_it_ever_spoke_is_forgotten() -> None:
    async with replicas_of(1) as replicas:
        replicas["r0"].fall_silent()
        async with opened_pool(replicas) as pool:
            await quiet()
            pool.replicas_changed(frozenset())
            await quiet()
            assert pool.cards() == []


# --- aborting and closing ------------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_abort_frees_the_engine_and_no_token_comes_any_more() -> None:
    async with replicas_of(1) as replicas, opened_pool(replicas) as pool:
        await quiet()
        requests = start_together(pool, 3)
        for request in requests:
            await request.until(5)
        pool.abort([request.generation for request in requests[:2]])
        await asyncio.sleep(0.001)
        assert replicas["r0"].sequences == 1
        assert len(replicas["r0"].aborts) == 2
        known = [list(request.generation.tokens) for request in requests[:2]]
        await requests[2].until_ended()
        requests[2].assert_undisturbed()
        assert [request.generation.tokens for request in requests[:2]] == known


@in_virtual_time
async def test_an_abort_of_what_has_ended_asks_nothing_of_the_replica() -> None:
    async with replicas_of(1) as replicas, opened_pool(replicas) as pool:
        await quiet()
        request = start(pool)
        await request.until_ended()
        pool.abort([request.generation])
        await asyncio.sleep(0.001)
        assert replicas["r0"].aborts == []


@in_virtual_time
async def test_a_held_generation_that_is_aborted_is_never_placed() -> None:
    async with replicas_of(1) as replicas, opened_pool(replicas) as pool:
        pool.replicas_changed(frozenset())
        request = start(pool)
        await quiet()
        pool.abort([request.generation])
        pool.replicas_changed(frozenset(replicas))
        await asyncio.sleep(1)
        assert replicas["r0"].submissions == []
        assert request.ends == 0


@in_virtual_time
async def test_a_generation_aborted_while_a_full_replica_refuses_it_goes_nowhere() -> None:
    scripted = {"full": ScriptedReplica(), "busy": ScriptedReplica()}
    scripted["busy"].load = EngineLoad(running=5)
    async with opened_pool(scripted) as pool:
        await quiet()
        request = start(pool)
        await quiet()
        pool.abort([request.generation])
        scripted["full"].tell(refused=[scripted["full"].submissions[0].generation])
        await quiet()
        assert len(scripted["full"].submissions) == 1
        assert scripted["busy"].submissions == []


@in_virtual_time
async def test_a_submission_that_has_no_form_on_the_wire_fails_alone() -> None:
    replica = ScriptedReplica()
    async with opened_pool({"r0": replica}) as pool:
        await quiet()
        healthy = start(pool)
        poisonous = Request(PROMPT, Sampling(max_tokens=5, extra_args={"watermark": 2**70}))
        pool.start([poisonous.generation])
        await poisonous.until_ended()
        assert isinstance(poisonous.error, InternalError)
        assert rotation(pool) == ["r0"]
        [submitted] = replica.submissions
        replica.tell(TokenDelta(submitted.generation, [5], "length"))
        await healthy.until_ended()
        assert (healthy.tokens, healthy.generation.resumes) == ([5], 0)


@in_virtual_time
async def test_close_ends_every_stream_and_so_frees_the_replicas() -> None:
    async with replicas_of(2) as replicas:
        async with opened_pool(replicas) as pool:
            await quiet()
            requests = start_together(pool, 4)
            for request in requests:
                await request.until(1)
            await pool.close()
            assert [(replica.streams, replica.sequences) for replica in replicas.values()] == [(0, 0), (0, 0)]
            assert not any(request.generation.ended for request in requests)
        await pool.close()


# --- whatever happens ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    at_s: float
    replica: int
    kind: str
    lasts_s: float


faults = st.builds(
    Fault,
    at_s=st.floats(0, 4).map(lambda s: round(s, 3)),
    replica=st.integers(0, 2),
    kind=st.sampled_from(["break", "silence", "unreachable", "leaves"]),
    lasts_s=st.floats(0.01, 8).map(lambda s: round(s, 3)),
)
arrivals = st.tuples(st.floats(0, 3).map(lambda s: round(s, 3)), st.integers(1, 120))


async def inflict(fault: Fault, replicas: dict[str, MemoryReplica], pool: EnginePool, away: list[str]) -> None:
    await asyncio.sleep(fault.at_s)
    replica_id = f"r{fault.replica}"
    replica = replicas[replica_id]
    match fault.kind:
        case "break":
            replica.break_streams()
        case "silence":
            replica.fall_silent()
            await asyncio.sleep(fault.lasts_s)
            replica.speak_again()
        case "unreachable":
            replica.reachable = False
            replica.break_streams()
            await asyncio.sleep(fault.lasts_s)
            replica.reachable = True
        case "leaves":
            away.append(replica_id)
            pool.replicas_changed(frozenset(replicas.keys() - set(away)))
            await asyncio.sleep(fault.lasts_s)
            away.remove(replica_id)
            pool.replicas_changed(frozenset(replicas.keys() - set(away)))


async def arrive(pool: EnginePool, at_s: float, prompt: int, max_tokens: int) -> Request:
    await asyncio.sleep(at_s)
    request = start(pool, prompt, prompt + 1, max_tokens=max_tokens, logprobs=prompt % 2 or None)
    await request.until_ended()
    return request


async def live_through(schedule: list[Fault], load: list[tuple[float, int]]) -> None:
    limits = replace(LIMITS, hold_timeout_s=600.0, resume_timeout_s=600.0, drain_timeout_s=1.0)
    async with replicas_of(3) as replicas, opened_pool(replicas, limits) as pool:
        watcher = asyncio.create_task(watch_for_silence(pool))
        away: list[str] = []
        async with asyncio.TaskGroup() as group:
            arriving = [
                group.create_task(arrive(pool, at_s, number, max_tokens))
                for number, (at_s, max_tokens) in enumerate(load)
            ]
            for fault in schedule:
                group.create_task(inflict(fault, replicas, pool, away))
        await asyncio.sleep(30)
        for request in ended(arriving):
            assert request.generation.tokens == request.tokens
            if isinstance(request.error, GivenUp):  # each time its first step was under way
                assert request.generation.resumes >= 2
                assert request.ends == 1
            else:
                request.assert_undisturbed()
        assert [replica.sequences for replica in replicas.values()] == [0, 0, 0], "work that nobody waits for"
        assert rotation(pool) == ["r0", "r1", "r2"]
        watcher.cancel()


def ended(tasks: Iterable[asyncio.Task[Request]]) -> list[Request]:
    return [task.result() for task in tasks]


@settings(max_examples=40)
@given(st.lists(faults, max_size=12), st.lists(arrivals, min_size=1, max_size=40))
def test_whatever_happens_to_the_replicas_every_generation_ends_once_with_exactly_its_tokens(
    schedule: list[Fault], load: list[tuple[float, int]]
) -> None:
    run_in_virtual_time(live_through(schedule, load))
