"""The simulator alone: no clock, no event loop."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.contracts import FinishReason, PositionLogprobs, Sampling
from deployments.engine.simulator import SimulatedOutput, Simulator, SimulatorSettings, Step
from tests.conftest import THOROUGH

tokens = st.integers(0, 99)
prompts = st.lists(tokens, min_size=1, max_size=40)


def simulator(**changed: Any) -> Simulator:
    return Simulator(SimulatorSettings(**{"vocabulary_tokens": 100, **changed}))


def submit(
    engine: Simulator, key: str, prompt: list[int], *, max_tokens: int = 8, seed: int | None = None, **sampling: Any
) -> None:
    engine.submit(key, prompt, Sampling(max_tokens=max_tokens, seed=seed, **sampling))


def run(engine: Simulator) -> list[Step]:
    """All steps until the simulator is idle."""
    steps: list[Step] = []
    while not engine.idle:
        steps.append(engine.step())
        assert len(steps) < 10_000, "the simulator makes no progress"
    return steps


def outputs_of(steps: list[Step], key: str) -> list[SimulatedOutput]:
    return [output for step in steps for output in step.outputs if output.key == key]


def complete(prompt: list[int], *, max_tokens: int = 8, seed: int | None = None, **sampling: Any) -> list[int]:
    """The tokens of one generation that is alone in a new simulator."""
    engine = simulator()
    submit(engine, "a", prompt, max_tokens=max_tokens, seed=seed, **sampling)
    return [output.token_id for output in outputs_of(run(engine), "a")]


# --- which tokens -------------------------------------------------------------------------------------------------


@given(prompts, st.none() | st.integers(-5, 1 << 64))
def test_the_same_prompt_and_seed_give_the_same_tokens(prompt: list[int], seed: int | None) -> None:
    assert complete(prompt, seed=seed) == complete(list(prompt), seed=seed)


def test_another_prompt_or_seed_gives_other_tokens() -> None:
    continuations = [
        complete([1, 2, 3], max_tokens=20),
        complete([1, 2, 4], max_tokens=20),
        complete([3, 2, 1], max_tokens=20),
        complete([1, 2, 3], max_tokens=20, seed=7),
        complete([1, 2, 3], max_tokens=20, seed=8),
    ]
    assert len({tuple(continuation) for continuation in continuations}) == len(continuations)


@given(prompts, st.none() | st.integers(0, 9), st.integers(0, 29))
def test_a_generation_resumed_from_prompt_and_tokens_continues_identically(
    prompt: list[int], seed: int | None, split: int
) -> None:
    whole = complete(prompt, max_tokens=30, seed=seed)
    rest = complete(prompt + whole[:split], max_tokens=30 - split, seed=seed)
    assert whole[:split] + rest == whole


@given(st.lists(prompts, min_size=1, max_size=6), st.booleans())
def test_the_other_sequences_of_a_batch_do_not_change_the_tokens(batch: list[list[int]], prefix_cache: bool) -> None:
    engine = simulator(prefix_cache=prefix_cache, max_num_seqs=3, max_prefill_tokens_per_step=7, kv_block_tokens=4)
    for number, prompt in enumerate(batch):
        submit(engine, str(number), prompt)
    steps = run(engine)
    for number, prompt in enumerate(batch):
        assert [output.token_id for output in outputs_of(steps, str(number))] == complete(prompt)


@given(prompts)
def test_special_tokens_are_never_generated(prompt: list[int]) -> None:
    engine = simulator(vocabulary_tokens=12, first_token=10)
    submit(engine, "a", prompt, max_tokens=30)
    assert {output.token_id for output in outputs_of(run(engine), "a")} == {10, 11}


# --- when a generation ends ---------------------------------------------------------------------------------------


@given(prompts, st.integers(1, 20))
def test_a_generation_ends_at_max_tokens(prompt: list[int], max_tokens: int) -> None:
    engine = simulator()
    submit(engine, "a", prompt, max_tokens=max_tokens)
    finish_reasons = [output.finish_reason for output in outputs_of(run(engine), "a")]
    assert finish_reasons == [None] * (max_tokens - 1) + ["length"]


def finished(prompt: list[int], **sampling: Any) -> tuple[list[int], FinishReason | None]:
    engine = simulator()
    submit(engine, "a", prompt, **sampling)
    outputs = outputs_of(run(engine), "a")
    return [output.token_id for output in outputs], outputs[-1].finish_reason


def test_a_stop_token_ends_a_generation_and_is_delivered() -> None:
    whole = complete([1, 2, 3], max_tokens=10)
    assert whole.index(whole[4]) == 4  # the prompt was picked so
    assert finished([1, 2, 3], max_tokens=10, stop_token_ids=(whole[4],)) == (whole[:5], "stop_token")


def test_a_stop_token_at_max_tokens_is_a_stop_token() -> None:
    whole = complete([1, 2, 3], max_tokens=5)
    assert finished([1, 2, 3], max_tokens=5, stop_token_ids=(whole[4],)) == (whole, "stop_token")


def test_the_first_min_tokens_tokens_end_nothing() -> None:
    """As in vLLM: the token that ends the generation comes after `min_tokens` others."""
    whole = complete([1, 2, 3], max_tokens=10)
    stops = tuple(whole[:6])
    assert finished([1, 2, 3], max_tokens=10, min_tokens=5, stop_token_ids=stops) == (whole[:6], "stop_token")
    assert finished([1, 2, 3], max_tokens=10, min_tokens=0, stop_token_ids=stops) == (whole[:1], "stop_token")


# --- log probabilities --------------------------------------------------------------------------------------------


def positions_of(prompt: list[int], **sampling: Any) -> list[PositionLogprobs]:
    """What one generation tells of its tokens; nothing if nothing was asked for."""
    engine = simulator()
    submit(engine, "a", prompt, **sampling)
    return [output.logprobs for output in outputs_of(run(engine), "a") if output.logprobs is not None]


def prompt_positions_of(prompt: list[int], **sampling: Any) -> list[PositionLogprobs | None]:
    engine = simulator()
    submit(engine, "a", prompt, **sampling)
    first, *others = outputs_of(run(engine), "a")
    assert [output.prompt_logprobs for output in others] == [None] * len(others)
    return first.prompt_logprobs or []


@given(prompts, st.none() | st.integers(0, 5), st.none() | st.integers(0, 5), st.none() | st.integers(0, 9))
def test_asking_for_log_probabilities_changes_no_token(
    prompt: list[int], logprobs: int | None, prompt_logprobs: int | None, seed: int | None
) -> None:
    plain = complete(prompt, seed=seed)
    assert complete(prompt, seed=seed, logprobs=logprobs, prompt_logprobs=prompt_logprobs) == plain
    assert complete(prompt, seed=seed, logprobs=logprobs, logprob_token_ids=(1, 2)) == plain


def test_log_probabilities_are_told_only_where_they_were_asked_for() -> None:
    assert positions_of([1, 2, 3]) == []
    assert positions_of([1, 2, 3], prompt_logprobs=2) == []
    assert prompt_positions_of([1, 2, 3]) == []
    assert prompt_positions_of([1, 2, 3], logprobs=2) == []


@given(prompts, st.integers(0, 99))
def test_the_likeliest_token_is_generated_and_told_first(prompt: list[int], likeliest: int) -> None:
    tokens = complete(prompt)
    positions = positions_of(prompt, logprobs=likeliest)
    assert [position.token_ids[0] for position in positions] == tokens
    for position in positions:
        assert position.ranks == tuple(range(1, max(1, likeliest) + 1))
        assert len(set(position.token_ids)) == len(position.token_ids) == len(position.logprobs)
        assert list(position.logprobs) == sorted(position.logprobs, reverse=True)
        assert max(position.logprobs) < 0


@given(prompts, st.integers(0, 5), st.none() | st.integers(0, 9))
def test_scoring_a_text_tells_what_generating_it_told(prompt: list[int], likeliest: int, seed: int | None) -> None:
    tokens = complete(prompt, seed=seed)
    generated = positions_of(prompt, seed=seed, logprobs=likeliest)
    scored = prompt_positions_of(prompt + tokens, seed=seed, prompt_logprobs=likeliest, max_tokens=1)
    assert scored[len(prompt) :] == generated


@given(prompts, st.integers(0, 5))
def test_the_tokens_of_a_prompt_come_first_and_the_likeliest_after_them(prompt: list[int], likeliest: int) -> None:
    first, *others = prompt_positions_of(prompt, prompt_logprobs=likeliest)
    assert first is None
    assert [position.token_ids[0] for position in others if position] == prompt[1:]
    for position in others:
        assert position is not None
        own = position.ranks[0]
        assert sorted(position.ranks) == sorted({own, *range(1, likeliest + 1)})
        assert list(position.ranks[1:]) == sorted(position.ranks[1:])
        by_rank = sorted(zip(position.ranks, position.logprobs, strict=True))
        assert [logprob for _, logprob in by_rank] == sorted(position.logprobs, reverse=True)


def test_chosen_tokens_are_told_instead_of_the_likeliest() -> None:
    tokens = complete([1, 2, 3], max_tokens=3)
    others = [token for token in range(100) if token not in tokens][:2]
    positions = positions_of([1, 2, 3], max_tokens=3, logprobs=5, logprob_token_ids=(*others, tokens[1]))
    assert [position.token_ids for position in positions] == [
        (tokens[0], *others, tokens[1]),
        (tokens[1], *others),  # not told twice
        (tokens[2], *others, tokens[1]),
    ]
    likely = positions_of([1, 2, 3], max_tokens=3, logprobs=99)
    for position, all_tokens in zip(positions, likely, strict=True):
        known = dict(zip(all_tokens.token_ids, all_tokens.logprobs, strict=True))
        assert list(position.logprobs) == [known[token] for token in position.token_ids]


def test_log_probabilities_keep_to_the_tokens_that_can_be_generated() -> None:
    engine = simulator(vocabulary_tokens=12, first_token=10)
    submit(engine, "a", [10, 11, 10], logprobs=2, prompt_logprobs=2)
    outputs = outputs_of(run(engine), "a")
    positions = [*(output.logprobs for output in outputs), *(outputs[0].prompt_logprobs or [])[1:]]
    assert all(position is not None and set(position.token_ids) == {10, 11} for position in positions)


# --- batching and time --------------------------------------------------------------------------------------------


def test_a_batch_holds_no_more_than_its_limit_and_goes_on_in_order() -> None:
    engine = simulator(max_num_seqs=2)
    for key in "abcd":
        submit(engine, key, [1, 2, 3], max_tokens=2)
    steps = run(engine)
    assert [[output.key for output in step.outputs] for step in steps] == [list("ab")] * 2 + [list("cd")] * 2


def test_load_counts_the_batch_the_queue_and_the_prefill_to_do() -> None:
    engine = simulator(max_num_seqs=1, max_prefill_tokens_per_step=10)
    submit(engine, "a", [1] * 25)
    submit(engine, "b", [2] * 5)
    before, _, within = engine.load(), engine.step(), engine.load()
    assert (before.running, before.waiting, before.waiting_prefill_tokens) == (0, 2, 30)
    assert (within.running, within.waiting, within.waiting_prefill_tokens) == (1, 1, 20)
    assert engine.waiting == 1
    run(engine)
    after = engine.load()
    assert (after.running, after.waiting, after.waiting_prefill_tokens) == (0, 0, 0)


def test_a_long_prompt_does_not_stall_running_decodes_by_more_than_its_chunk() -> None:
    engine = simulator(max_prefill_tokens_per_step=8, prefill_tokens_per_s=1000.0, step_s=0.002)
    submit(engine, "short", [1], max_tokens=100)
    engine.step()
    submit(engine, "long", [2] * 100, max_tokens=1)
    steps = [engine.step() for _ in range(13)]
    assert all(len(outputs_of([step], "short")) == 1 for step in steps)
    assert [step.duration_s for step in steps] == pytest.approx([0.002 + 0.008] * 12 + [0.002 + 0.004])
    assert [len(outputs_of([step], "long")) for step in steps] == [0] * 12 + [1]


def test_the_prefill_of_a_step_is_shared_by_its_sequences() -> None:
    engine = simulator(max_prefill_tokens_per_step=8, prefill_tokens_per_s=1000.0, step_s=0.0)
    for key in "abc":
        submit(engine, key, [ord(key)] * 4, max_tokens=1)
    steps = run(engine)
    assert [[output.key for output in step.outputs] for step in steps] == [["a", "b"], ["c"]]
    assert [step.duration_s for step in steps] == pytest.approx([0.008, 0.004])


def test_a_step_takes_longer_with_every_sequence_and_prefilled_token() -> None:
    engine = simulator(step_s=0.01, step_s_per_sequence=0.001, prefill_tokens_per_s=500.0)
    submit(engine, "a", [1] * 10, max_tokens=3)
    submit(engine, "b", [2] * 5, max_tokens=2)
    assert [step.duration_s for step in run(engine)] == pytest.approx([0.011 + 0.03, 0.011, 0.010])


def test_prefill_can_cost_no_time() -> None:
    engine = simulator(step_s=0.01, prefill_tokens_per_s=None)
    submit(engine, "a", [1] * 1000, max_tokens=1)
    assert [step.duration_s for step in run(engine)] == [0.01]


# --- KV blocks and the prefix cache -------------------------------------------------------------------------------


def cached_tokens(engine: Simulator, prompt: list[int], max_tokens: int = 2) -> int:
    """What one generation, run to its end, found in the prefix cache; told with its first token only."""
    submit(engine, "probe", prompt, max_tokens=max_tokens)
    first, *others = outputs_of(run(engine), "probe")
    assert not any(output.cached_tokens for output in others)
    return first.cached_tokens


def test_prefix_cache_hits_are_counted_in_full_blocks() -> None:
    engine = simulator(kv_block_tokens=4)
    prompt = list(range(10))
    assert cached_tokens(engine, prompt) == 0
    assert cached_tokens(engine, prompt) == 8
    assert cached_tokens(engine, [*prompt[:6], 50, 51]) == 4
    assert cached_tokens(engine, [50, *prompt[1:]]) == 0


def test_the_last_prompt_token_is_never_cached() -> None:
    engine = simulator(kv_block_tokens=4)
    cached_tokens(engine, list(range(8)))
    assert cached_tokens(engine, list(range(8))) == 7


def test_without_a_prefix_cache_nothing_is_cached() -> None:
    engine = simulator(kv_block_tokens=4, prefix_cache=False)
    assert [cached_tokens(engine, list(range(10))) for _ in range(2)] == [0, 0]


def test_scoring_a_prompt_uses_no_cache_and_fills_it_all_the_same() -> None:
    """As in vLLM, which computes all of such a prompt."""
    engine = simulator(kv_block_tokens=4, prefill_tokens_per_s=1000.0, step_s=0.0)
    prompt = list(range(10))
    for _ in range(2):
        submit(engine, "scored", prompt, max_tokens=1, prompt_logprobs=0)
        [step] = run(engine)
        assert step.duration_s == pytest.approx(0.010)
        assert [output.cached_tokens for output in step.outputs] == [0]
    free = engine.load().kv_blocks_free
    assert free == engine.load().kv_blocks_total
    assert cached_tokens(engine, prompt) == 8


def test_scored_prompts_share_their_blocks_while_they_run() -> None:
    engine = simulator(kv_block_tokens=4, kv_blocks=4)
    for key in "ab":  # two blocks of the prompt together, and one for the tokens of each
        submit(engine, key, list(range(8)), max_tokens=4, prompt_logprobs=1)
    engine.step()
    assert (engine.load().running, engine.load().kv_blocks_free) == (2, 0)
    assert engine.abort("a")
    assert engine.load().kv_blocks_free == 1
    run(engine)
    assert engine.load().kv_blocks_free == 4


def test_cached_prompt_tokens_cost_no_prefill() -> None:
    engine = simulator(kv_block_tokens=4, prefill_tokens_per_s=1000.0, step_s=0.0)
    submit(engine, "a", list(range(10)), max_tokens=1)
    submit(engine, "b", list(range(10)), max_tokens=1)
    assert [step.duration_s for step in run(engine)] == pytest.approx([0.010 + 0.002])


def test_the_end_of_the_prefix_unused_for_longest_is_evicted_first() -> None:
    engine = simulator(kv_block_tokens=4, kv_blocks=6)
    old, new, other = list(range(8)), list(range(20, 28)), list(range(40, 48))
    for prompt in (old, new, other):  # each caches two blocks and needs one more for its tokens: in all one too many
        assert cached_tokens(engine, prompt) == 0
    assert cached_tokens(engine, new) == 7
    assert cached_tokens(engine, old) == 4


def test_a_sequence_waits_until_its_kv_blocks_are_free() -> None:
    engine = simulator(kv_block_tokens=4, kv_blocks=4, prefix_cache=False)
    submit(engine, "a", [1] * 8, max_tokens=4)
    submit(engine, "b", [2] * 8, max_tokens=4)
    steps = run(engine)
    assert [step.outputs[0].key for step in steps] == ["a"] * 4 + ["b"] * 4
    assert all(len(step.outputs) == 1 for step in steps)


def test_whether_a_generation_can_ever_run() -> None:
    engine = simulator(kv_block_tokens=4, kv_blocks=4)
    assert engine.fits(8, 8)
    assert not engine.fits(8, 9)


def test_aborting_tells_whether_there_was_such_a_sequence() -> None:
    engine = simulator(max_num_seqs=1)
    submit(engine, "running", [1])
    submit(engine, "waiting", [2])
    engine.step()
    assert [engine.abort(key) for key in ("running", "waiting", "running", "unknown")] == [True, True, False, False]
    assert engine.idle


_BLOCK_TOKENS, _BLOCKS, _MAX_SEQS = 2, 12, 3

submissions = st.tuples(
    st.lists(st.integers(0, 1), min_size=1, max_size=9), st.integers(1, 5), st.none() | st.integers(0, 2)
)
operations = st.lists(st.one_of(submissions, st.integers(0, 5), st.none()), max_size=60)
"""A prompt, max_tokens and prompt_logprobs to submit, the place of a living sequence to abort, or None for a step."""


@settings(max_examples=300 if THOROUGH else 100)
@given(operations, st.booleans(), st.integers(1, 8))
def test_kv_blocks_are_conserved_whatever_happens(
    script: list[tuple[list[int], int, int | None] | int | None], prefix_cache: bool, chunk: int
) -> None:
    engine = simulator(
        kv_block_tokens=_BLOCK_TOKENS,
        kv_blocks=_BLOCKS,
        max_num_seqs=_MAX_SEQS,
        prefix_cache=prefix_cache,
        max_prefill_tokens_per_step=chunk,
    )
    alive: dict[str, tuple[list[int], int, int | None]] = {}
    """In order of submission, which is the order of admission."""
    generated: dict[str, int] = {}

    def check() -> None:
        load = engine.load()
        assert load.kv_blocks_total == _BLOCKS
        assert load.running <= _MAX_SEQS
        assert load.running + load.waiting == len(alive)
        shared: set[tuple[int, ...]] = set()
        private = 0
        for prompt, max_tokens, _ in list(alive.values())[: load.running]:
            full_blocks = len(prompt) // _BLOCK_TOKENS if prefix_cache else 0
            shared |= {tuple(prompt[: (block + 1) * _BLOCK_TOKENS]) for block in range(full_blocks)}
            private += -(-(len(prompt) + max_tokens) // _BLOCK_TOKENS) - full_blocks
        assert load.kv_blocks_free == _BLOCKS - private - len(shared)
        assert load.kv_blocks_free >= 0

    def step() -> None:
        for output in engine.step().outputs:
            generated[output.key] += 1
            prompt, _, prompt_logprobs = alive[output.key]
            if prompt_logprobs is not None:
                assert output.cached_tokens == 0
                assert len(output.prompt_logprobs or []) == (len(prompt) if generated[output.key] == 1 else 0)
            assert (output.finish_reason is not None) == (generated[output.key] == alive[output.key][1])
            if output.finish_reason is not None:
                del alive[output.key]

    for number, operation in enumerate(script):
        if isinstance(operation, tuple):
            alive[str(number)] = operation
            generated[str(number)] = 0
            prompt, max_tokens, prompt_logprobs = operation
            submit(engine, str(number), prompt, max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        elif operation is None:
            step()
        elif operation < len(alive):
            key = list(alive)[operation]
            del alive[key]
            assert engine.abort(key)
        check()
    steps = 0
    while alive:
        step()
        check()
        steps += 1
        assert steps < 1000, "a sequence starves"
    assert engine.idle
    assert engine.load().kv_blocks_free == _BLOCKS
