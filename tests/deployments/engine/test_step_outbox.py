"""The sending end of a step stream. A test that must not see heartbeats makes them an hour apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from hypothesis import given
from hypothesis import strategies as st

from deployments.contracts import EngineLoad, EngineStep, PositionLogprobs, TokenDelta
from deployments.engine.step_outbox import MESSAGE_LOGPROBS, StepOutbox

NEVER_S = 3600.0


async def opened(outbox: StepOutbox) -> AsyncGenerator[EngineStep, None]:
    """The outbox's stream with its first message, which only tells the load, taken off."""
    steps = outbox.steps()
    assert (await anext(steps)).deltas == []
    return steps


def idle_outbox(heartbeat_s: float = NEVER_S) -> StepOutbox:
    return StepOutbox(EngineLoad, heartbeat_s=heartbeat_s)


async def test_the_first_message_comes_at_once_and_tells_the_load() -> None:
    load = EngineLoad(running=3, waiting=1)
    async with aclosing(StepOutbox(lambda: load, heartbeat_s=NEVER_S).steps()) as steps:
        assert await anext(steps) == EngineStep(0, load, [])


async def test_an_idle_outbox_sends_each_push_at_once() -> None:
    outbox = idle_outbox()
    received: asyncio.Queue[EngineStep] = asyncio.Queue()

    async def pull() -> None:
        async for step in outbox.steps():
            received.put_nowait(step)

    puller = asyncio.create_task(pull())
    assert (await received.get()).deltas == []
    for token in range(20):
        outbox.push(TokenDelta(7, [token], None))
        assert (await received.get()).deltas == [TokenDelta(7, [token])]
    outbox.close()
    await puller


async def test_pushes_that_were_not_pulled_are_merged_in_order() -> None:
    outbox = idle_outbox()
    async with aclosing(await opened(outbox)) as steps:
        outbox.push(TokenDelta(1, [10], None, cached_tokens=64))
        outbox.push(TokenDelta(2, [20], None))
        outbox.push(TokenDelta(1, [11, 12], None))
        outbox.push(TokenDelta(2, [21], "length"))
        outbox.push(TokenDelta(1, [13], "stop_token"))
        assert (await anext(steps)).deltas == [
            TokenDelta(1, [10, 11, 12, 13], "stop_token", 64),
            TokenDelta(2, [20, 21], "length"),
        ]


async def test_a_failure_keeps_its_words_and_the_tokens_before_it() -> None:
    outbox = idle_outbox()
    async with aclosing(await opened(outbox)) as steps:
        outbox.push(TokenDelta(1, [10], None))
        outbox.push(TokenDelta(1, [], "failed", message="OutOfBlocks"))
        assert (await anext(steps)).deltas == [TokenDelta(1, [10], "failed", 0, "OutOfBlocks")]


async def test_a_refusal_keeps_its_words_and_the_parameter_it_names() -> None:
    outbox = idle_outbox()
    async with aclosing(await opened(outbox)) as steps:
        outbox.push(TokenDelta(1, [], "refused", message="No such grammar.", param="guided_grammar"))
        assert (await anext(steps)).deltas == [TokenDelta(1, [], "refused", 0, "No such grammar.", "guided_grammar")]
        outbox.push(TokenDelta(2, [20], None))
        outbox.push(TokenDelta(2, [], "refused", message="Too long.", param="prompt"))
        assert (await anext(steps)).deltas == [TokenDelta(2, [20], "refused", 0, "Too long.", "prompt")]


def position(token_id: int) -> PositionLogprobs:
    return PositionLogprobs((token_id, 0), (-0.1 * token_id, -0.5), (2, 1))


async def test_log_probabilities_are_merged_with_their_tokens() -> None:
    outbox = idle_outbox()
    async with aclosing(await opened(outbox)) as steps:
        outbox.push(TokenDelta(1, [10], logprobs=[position(10)]))
        outbox.push(TokenDelta(2, [20]))  # of whose tokens nothing was asked
        outbox.push(TokenDelta(1, [11, 12], logprobs=[position(11), position(12)]))
        outbox.push(TokenDelta(2, [21]))
        outbox.push(TokenDelta(1, [], "length"))
        assert (await anext(steps)).deltas == [
            TokenDelta(1, [10, 11, 12], "length", logprobs=[position(10), position(11), position(12)]),
            TokenDelta(2, [20, 21]),
        ]


async def test_log_probabilities_of_the_prompt_are_kept_by_a_merge_and_sent_once() -> None:
    outbox = idle_outbox()
    of_prompt = [None, position(3)]
    async with aclosing(await opened(outbox)) as steps:
        outbox.push(TokenDelta(1, [10], cached_tokens=1, logprobs=[position(10)], prompt_logprobs=of_prompt))
        outbox.push(TokenDelta(1, [11], logprobs=[position(11)]))
        merged = TokenDelta(1, [10, 11], None, 1, logprobs=[position(10), position(11)], prompt_logprobs=of_prompt)
        assert (await anext(steps)).deltas == [merged]
        outbox.push(TokenDelta(1, [12], "length", logprobs=[position(12)]))
        assert (await anext(steps)).deltas == [TokenDelta(1, [12], "length", logprobs=[position(12)])]


async def test_a_merge_leaves_the_pushed_log_probabilities_as_they_are() -> None:
    outbox = idle_outbox()
    async with aclosing(await opened(outbox)) as steps:
        pushed = [position(10)]
        outbox.push(TokenDelta(1, [10], logprobs=pushed))
        outbox.push(TokenDelta(1, [11], logprobs=[position(11)]))
        taken = await anext(steps)
        outbox.push(TokenDelta(1, [12], logprobs=[position(12)]))
        assert pushed == [position(10)]
        assert taken.deltas[0].logprobs == [position(10), position(11)]


async def test_what_was_pulled_is_not_sent_again() -> None:
    outbox = idle_outbox()
    async with aclosing(await opened(outbox)) as steps:
        outbox.push(TokenDelta(1, [10], None, cached_tokens=64))
        await anext(steps)
        outbox.push(TokenDelta(1, [11], None))
        assert (await anext(steps)).deltas == [TokenDelta(1, [11])]


async def test_pushing_changes_neither_the_pushed_list_nor_a_message_that_was_taken() -> None:
    outbox = idle_outbox()
    async with aclosing(await opened(outbox)) as steps:
        pushed = [10]
        outbox.push(TokenDelta(1, pushed, None))
        outbox.push(TokenDelta(1, [11], None))
        taken = await anext(steps)
        outbox.push(TokenDelta(1, [12], None))
        assert pushed == [10]
        assert taken.deltas == [TokenDelta(1, [10, 11])]


async def test_an_idle_stream_carries_heartbeats_with_the_load_of_that_moment() -> None:
    loads = iter(EngineLoad(running=number) for number in range(100))
    outbox = StepOutbox(lambda: next(loads), heartbeat_s=0.001)
    async with aclosing(await opened(outbox)) as steps:
        assert [await anext(steps) for _ in range(3)] == [
            EngineStep(number, EngineLoad(running=number), []) for number in (1, 2, 3)
        ]


async def test_a_push_after_a_heartbeat_is_delivered() -> None:
    outbox = idle_outbox(heartbeat_s=0.001)
    async with aclosing(await opened(outbox)) as steps:
        assert (await anext(steps)).deltas == []
        outbox.push(TokenDelta(1, [10], None))
        assert (await anext(steps)).deltas == [TokenDelta(1, [10])]


async def test_closing_ends_the_stream_after_what_was_pushed() -> None:
    outbox = idle_outbox()
    steps = await opened(outbox)
    outbox.push(TokenDelta(1, [10], None))
    outbox.close()
    assert [step.deltas async for step in steps] == [[TokenDelta(1, [10])]]


async def test_closing_wakes_a_receiver_that_waits() -> None:
    outbox = idle_outbox()
    steps = await opened(outbox)
    waiting = asyncio.create_task(anext(steps))
    await asyncio.sleep(0)
    outbox.close()
    assert (await waiting).deltas == []
    assert [step async for step in steps] == []


async def test_an_engine_that_goes_on_does_not_keep_a_closed_stream_open() -> None:
    outbox = idle_outbox()
    steps = await opened(outbox)
    outbox.push(TokenDelta(1, [10], None))
    outbox.close()
    seen = []
    async for step in steps:
        seen += step.deltas
        outbox.push(TokenDelta(1, [11], None))
    assert seen == [TokenDelta(1, [10])]


async def test_an_outbox_closed_before_it_is_read_ends_after_one_message() -> None:
    outbox = idle_outbox()
    outbox.close()
    assert len([step async for step in outbox.steps()]) == 1


async def test_what_an_aborted_generation_left_is_dropped() -> None:
    outbox = idle_outbox()
    async with aclosing(await opened(outbox)) as steps:
        outbox.push(TokenDelta(1, [10], None))
        outbox.push(TokenDelta(2, [20], None))
        outbox.forget(1)
        outbox.forget(3)
        assert (await anext(steps)).deltas == [TokenDelta(2, [20])]


async def test_a_change_of_the_load_can_be_told_without_news_of_a_generation() -> None:
    loads = iter(EngineLoad(running=number) for number in range(100))
    outbox = StepOutbox(lambda: next(loads), heartbeat_s=NEVER_S)
    async with aclosing(await opened(outbox)) as steps:
        outbox.touch()
        assert await anext(steps) == EngineStep(1, EngineLoad(running=1), [])


async def test_a_receiver_that_never_pulls_costs_one_delta_per_generation() -> None:
    outbox = idle_outbox()
    async with aclosing(await opened(outbox)) as steps:
        for token in range(3000):
            outbox.push(TokenDelta(token % 3, [token], None))
        assert [delta.token_ids for delta in (await anext(steps)).deltas] == [
            list(range(generation, 3000, 3)) for generation in range(3)
        ]


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=50))
def test_every_token_is_sent_once_in_order_and_sequence_numbers_have_no_gaps(script: list[int | None]) -> None:
    """None pulls, a number pushes the next token of that generation. Odd ones tell log probabilities."""
    outbox = idle_outbox()
    pushed: dict[int, list[int]] = {}
    received: dict[int, list[int]] = {}
    sequence: list[int] = []

    def receive(step: EngineStep) -> None:
        sequence.append(step.sequence)
        for delta in step.deltas:
            received.setdefault(delta.generation, []).extend(delta.token_ids)
            asked = delta.generation % 2 == 1
            assert delta.logprobs == ([position(token_id) for token_id in delta.token_ids] if asked else None)

    async def play() -> None:
        steps = outbox.steps()
        receive(await anext(steps))
        news = False
        for token, generation in enumerate(script):
            if generation is not None:
                logprobs = [position(token)] if generation % 2 else None
                outbox.push(TokenDelta(generation, [token], None, logprobs=logprobs))
                pushed.setdefault(generation, []).append(token)
                news = True
            elif news:  # else the receiver would wait for the heartbeat
                receive(await anext(steps))
                news = False
        outbox.close()
        async for step in steps:
            receive(step)

    with asyncio.Runner() as runner:
        runner.run(play())
    assert received == pushed
    assert sequence == list(range(len(sequence)))


async def test_log_probabilities_are_split_into_messages_that_are_read_in_one_turn() -> None:
    outbox = StepOutbox(EngineLoad)
    position = PositionLogprobs(tuple(range(20)), (0.0,) * 20, (1,) * 20)
    for generation in range(1, 9):
        outbox.push(TokenDelta(generation, [1], prompt_logprobs=[None, *[position] * 500]))
    outbox.close()
    messages = [step.deltas async for step in outbox.steps()]
    assert [delta.generation for deltas in messages for delta in deltas] == list(range(1, 9))
    assert [len(deltas) for deltas in messages if deltas] == [1] * 8
    assert MESSAGE_LOGPROBS < 500 * 20 * 2


async def test_of_a_long_prompt_they_come_in_parts_before_the_tokens() -> None:
    outbox = StepOutbox(EngineLoad)
    told = [None, *[PositionLogprobs((1, 2), (-0.5, -1.0), (1, 2))] * MESSAGE_LOGPROBS]
    outbox.push(TokenDelta(1, [7], prompt_logprobs=told, cached_tokens=3))
    outbox.push(TokenDelta(2, [8], "length"))
    outbox.push(TokenDelta(1, [9], "length"))
    outbox.close()
    deltas = [delta for step in [step async for step in outbox.steps()] for delta in step.deltas]
    assert [(delta.generation, delta.token_ids) for delta in deltas] == [(1, []), (1, [7, 9]), (2, [8])]
    assert [position for delta in deltas[:2] for position in delta.prompt_logprobs or ()] == told
    assert max(len(delta.prompt_logprobs or ()) for delta in deltas) <= MESSAGE_LOGPROBS // 2 + 1
    assert (deltas[1].cached_tokens, deltas[1].finish_reason) == (3, "length")
