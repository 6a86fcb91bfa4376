"""ReplicaStream over a scripted replica: when it counts as live, when as lost, and what is believed of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from deployments.contracts import EngineLoad, PositionLogprobs, Sampling, Sibling, TokenDelta, pack
from deployments.engine.step_outbox import HEARTBEAT_S
from deployments.ingress.inference.generation import DeltaQueue, Generation, GenerationEvent
from deployments.ingress.routing.replica_stream import COMMAND_BYTES, SILENCE_LIMIT_S, ReplicaStream
from tests.deployments.accounts import account
from tests.deployments.ingress.memory_replicas import ScriptedReplica
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet, write_scheduler


class Owner:
    """What the pool is to a stream."""

    def __init__(self, replica: ScriptedReplica) -> None:
        self.times_live = 0
        self.lost: list[Generation] = []
        self.suspects: frozenset[Generation] = frozenset()
        self.refused: list[Generation] = []
        self.stream = ReplicaStream(
            "r0",
            replica,
            name="i/m/r0",
            on_live=self._on_live,
            on_lost=self._on_lost,
            on_refused=self.refused.extend,
            on_message=lambda: None,
        )

    def _on_live(self) -> None:
        self.times_live += 1

    def _on_lost(self, generations: list[Generation], suspects: frozenset[Generation]) -> None:
        self.lost += generations
        self.suspects = suspects


@asynccontextmanager
async def running(replica: ScriptedReplica) -> AsyncIterator[Owner]:
    owner = Owner(replica)
    task = asyncio.create_task(owner.stream.run())
    await quiet()
    try:
        yield owner
    finally:
        task.cancel()
        await asyncio.wait([task])


def generation() -> Generation:
    return Generation(account("req"), "Meter", 0, [1, 2], Sampling(max_tokens=5), DeltaQueue(write_scheduler()))


def now() -> float:
    return asyncio.get_running_loop().time()


def test_heartbeats_come_often_enough_for_one_to_be_lost() -> None:
    assert 2 * HEARTBEAT_S < SILENCE_LIMIT_S


@in_virtual_time
async def test_a_replica_is_live_from_its_first_message_on() -> None:
    replica = ScriptedReplica()
    replica.greeting = False
    async with running(replica) as owner:
        assert not owner.stream.live
        replica.tell(load=EngineLoad(running=3))
        await quiet()
        assert (owner.stream.live, owner.times_live, owner.stream.sequences) == (True, 1, 3)


@in_virtual_time
async def test_a_stream_without_a_first_message_is_opened_anew() -> None:
    replica = ScriptedReplica()
    replica.greeting = False
    async with running(replica) as owner:
        await asyncio.sleep(SILENCE_LIMIT_S + 0.3)
        first, second = (int(stream_id.removeprefix("i/m/r0#")) for stream_id in replica.opened)
        assert first < second  # none is used again
        assert not owner.stream.live


@in_virtual_time
async def test_attempts_grow_rarer_and_a_success_makes_them_frequent_again() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        async with asyncio.timeout(10):
            while len(replica.opened) < 10:
                replica.end_stream()
                await asyncio.sleep(0.11)  # each was live: the next attempt follows at once
        replica.greeting = False
        replica.end_stream()
        begin, opened = now(), len(replica.opened)
        while now() - begin < 100:
            await asyncio.sleep(0.5)
            replica.end_stream()
        assert 20 < len(replica.opened) - opened < 35  # every 4 s
        assert not owner.stream.live


@in_virtual_time
async def test_silence_is_measured_from_the_last_message() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        stream = owner.stream
        await asyncio.sleep(2.0)
        replica.tell()
        await quiet()
        assert stream.last_heard == pytest.approx(2.0, abs=1e-3)
        stream.check_silence(stream.last_heard + SILENCE_LIMIT_S)
        assert stream.live
        stream.check_silence(stream.last_heard + SILENCE_LIMIT_S + 0.01)
        assert not stream.live
        await asyncio.sleep(0.2)
        assert (stream.live, owner.times_live, len(replica.opened)) == (True, 2, 2)


@in_virtual_time
async def test_a_stream_that_is_not_live_is_not_given_up_for_silence() -> None:
    replica = ScriptedReplica()
    replica.greeting = False
    async with running(replica) as owner:
        owner.stream.check_silence(now() + 100)
        await quiet()
        assert len(replica.opened) == 1
        replica.tell()
        await quiet()
        assert owner.stream.live


@in_virtual_time
async def test_what_a_lost_replica_reported_is_forgotten() -> None:
    replica = ScriptedReplica()
    replica.load = EngineLoad(running=7)
    async with running(replica) as owner:
        replica.greeting = False
        replica.end_stream()
        await quiet()
        assert (owner.stream.load, owner.stream.sequences) == (EngineLoad(), 0)


@in_virtual_time
async def test_a_missing_message_gives_the_replica_up_before_a_token_is_lost() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        hurt = generation()
        owner.stream.submit([hurt])
        replica.tell(TokenDelta(1, [5]))
        await quiet()
        replica.skipped = 1
        replica.tell(TokenDelta(1, [7]))
        await quiet()
        assert (hurt.tokens, owner.lost) == ([5], [hurt])


@in_virtual_time
async def test_everything_that_a_delta_tells_reaches_the_mailbox_of_its_generation() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        mailbox = DeltaQueue(write_scheduler())
        first = Generation(
            account("req"), "Meter", 3, [1, 2], Sampling(max_tokens=5, logprobs=1, prompt_logprobs=0), mailbox
        )
        owner.stream.submit([first])
        told = TokenDelta(
            1,
            [5],
            cached_tokens=1,
            logprobs=[PositionLogprobs((5, 6), (-1.5, -float("inf")), (2, 1))],
            prompt_logprobs=[None, PositionLogprobs((2,), (-0.25,), (1,))],
        )
        refused = TokenDelta(1, [], "refused", message="Too long.", param="prompt")
        replica.tell(told)
        replica.tell(refused)
        await quiet()
        assert await mailbox.take() == [GenerationEvent(3, told), GenerationEvent(3, refused)]
        assert (first.tokens, first.cached_tokens, first.ended) == ([5], 1, True)
        assert (owner.lost, list(owner.stream.generations)) == ([], [])


async def test_parts_of_a_prompt_are_told_as_a_whole_with_the_first_token_and_those_of_a_lost_replica_never() -> None:
    mailbox = DeltaQueue(write_scheduler())
    parted = Generation(account("req"), "Meter", 0, [1, 2, 3], Sampling(max_tokens=2, prompt_logprobs=0), mailbox)
    told = [None, PositionLogprobs((2,), (-0.25,), (1,)), PositionLogprobs((3,), (-0.5,), (2,))]
    parted.deliver(TokenDelta(1, [], prompt_logprobs=told[:2]))
    parted.lost()
    for part in told[:2]:
        parted.deliver(TokenDelta(1, [], prompt_logprobs=[part]))
    parted.deliver(TokenDelta(1, [5], prompt_logprobs=told[2:]))
    parted.deliver(TokenDelta(1, [6], "length"))
    assert await mailbox.take() == [
        GenerationEvent(0, TokenDelta(1, [5], prompt_logprobs=told)),
        GenerationEvent(0, TokenDelta(1, [6], "length")),
    ]


@in_virtual_time
async def test_messages_of_an_old_connection_are_ignored() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        moved = generation()
        owner.stream.submit([moved])
        replica.tell(TokenDelta(1, [5], None))
        await quiet()
        replica.tell(TokenDelta(1, [6], None))  # on its way when the stream is given up
        owner.stream.check_silence(now() + 10)
        assert owner.lost == [moved]
        await asyncio.sleep(0.2)
        assert owner.stream.live
        replica.tell(TokenDelta(1, [6], None), stream=0)
        replica.tell(TokenDelta(1, [6], "length"), stream=1)
        await quiet()
        assert moved.tokens == [5]
        assert not moved.ended


@in_virtual_time
async def test_news_of_an_aborted_generation_are_ignored() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        aborted = generation()
        owner.stream.submit([aborted])
        await quiet()
        owner.stream.abort([1])
        replica.tell(TokenDelta(1, [5], "length"))
        await asyncio.sleep(10)
        assert (aborted.tokens, aborted.ended) == ([], False)
        assert (owner.stream.live, len(replica.opened), replica.aborts) == (True, 1, [1])


@in_virtual_time
async def test_numbers_are_never_used_again() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        owner.stream.submit([generation(), generation()])
        await quiet()
        replica.end_stream()
        await asyncio.sleep(0.2)
        owner.stream.submit([generation()])
        await quiet()
        assert [submission.generation for submission in replica.submissions] == [1, 2, 3]


@in_virtual_time
async def test_what_is_ordered_at_the_same_moment_travels_together() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        owner.stream.submit([generation()])
        owner.stream.submit([generation(), generation()])
        owner.stream.abort([2])
        owner.stream.release("settled")
        await quiet()
        [orders] = replica.orders
        assert [submission.generation for submission in replica.submissions] == [1, 2, 3]
        assert (orders.aborted, orders.released) == ([2], ["settled"])


@in_virtual_time
async def test_settled_requests_are_told_when_there_is_time() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        owner.stream.submit([generation()])
        await quiet()
        owner.stream.release("settled")
        replica.tell(TokenDelta(1, [5]))
        await quiet()
        assert replica.released == []
        replica.tell()
        await quiet()
        assert replica.released == ["settled"]


@in_virtual_time
async def test_a_generation_is_accepted_when_the_replica_says_so() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        first, second = generation(), generation()
        owner.stream.submit([first])
        owner.stream.submit([second])
        await quiet()
        replica.tell(acknowledged=1)
        await quiet()
        assert (first.accepted_at is None, second.accepted_at is None) == (False, True)
        assert owner.stream.sequences == 2
        replica.tell(acknowledged=2)
        await quiet()
        assert second.accepted_at is not None


@in_virtual_time
async def test_what_was_ordered_of_a_stream_that_is_lost_at_once_goes_to_nobody() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        new = generation()
        owner.stream.submit([new])
        owner.stream.check_silence(now() + 10)
        await asyncio.sleep(0.2)
        assert (owner.lost, replica.submissions) == ([new], [])
        assert (owner.stream.live, len(replica.opened)) == (True, 2)


@in_virtual_time
async def test_what_a_full_replica_refuses_comes_back() -> None:
    replica = ScriptedReplica()
    replica.full = True
    async with running(replica) as owner:
        refused = [generation(), generation()]
        owner.stream.submit(refused)
        await quiet()
        assert owner.refused == refused
        assert owner.stream.generations == {}
        assert owner.lost == []
        assert [each.accepted_at for each in refused] == [None, None]


@in_virtual_time
async def test_one_of_two_is_refused() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        taken, refused = generation(), generation()
        owner.stream.submit([taken, refused])
        await quiet()
        replica.tell(TokenDelta(1, [5]), refused=[2])
        await quiet()
        assert (owner.refused, taken.tokens, list(owner.stream.generations)) == ([refused], [5], [1])


# --- what many choices weigh ------------------------------------------------------------------------------------------


def choices_of(prompt: list[int], number: int, *, seed: int | None = None) -> list[Generation]:
    use, mailbox = account("req", choices=number), DeltaQueue(write_scheduler())
    return [
        Generation(
            use,
            "Meter",
            index,
            prompt,
            Sampling(max_tokens=5, seed=None if seed is None else seed + index),
            mailbox,
        )
        for index in range(number)
    ]


@in_virtual_time
async def test_a_prompt_crosses_the_wire_once_for_all_its_choices() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        first, second = [7] * 8000, [8] * 8000
        owner.stream.submit([*choices_of(first, 128, seed=5), *choices_of(second, 2)])
        await quiet()
        assert [each.token_ids[0] for each in replica.submissions] == [7, 8]
        one, two = replica.submissions
        assert (one.generation, one.choice, one.sampling.seed) == (1, 0, 5)
        assert one.siblings == tuple(Sibling(2 + n, 1 + n, 6 + n) for n in range(127))
        assert (two.generation, [each.generation for each in two.siblings]) == (129, [130])
        assert len(owner.stream.generations) == 130
        assert sum(len(pack(each)) for each in replica.submissions) < 30_000


@in_virtual_time
async def test_choices_that_have_lost_a_replica_travel_each_with_tokens_of_its_own() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        generations = choices_of([1, 2], 2)
        for generation, token in zip(generations, (5, 6), strict=True):
            generation.tokens.append(token)
            generation.lost()
        owner.stream.submit(generations)
        await quiet()
        assert [each.token_ids for each in replica.submissions] == [[1, 2, 5], [1, 2, 6]]
        assert [each.siblings for each in replica.submissions] == [(), ()]


@in_virtual_time
async def test_submissions_are_split_into_frames_that_are_read_in_one_turn() -> None:
    replica = ScriptedReplica()
    async with running(replica) as owner:
        long = [100_000 + n for n in range(50_000)]  # 250 kB each
        owner.stream.submit([each for _ in range(10) for each in choices_of(list(long), 1)])
        owner.stream.abort([1])
        await quiet()
        sizes = [sum(len(memoryview(each)) for each in orders.submissions) for orders in replica.orders]
        assert len(sizes) > 2
        assert all(0 < size <= COMMAND_BYTES for size in sizes)
        assert [each.generation for each in replica.submissions] == list(range(1, 11))
        assert [orders.aborted for orders in replica.orders if orders.aborted] == [[1]]
        assert replica.orders[-1].aborted == [1]
