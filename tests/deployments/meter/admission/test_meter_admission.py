from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from deployments.contracts import AdmissionRefused, AdmissionRequest, Admitted, PromptOptions, pack, unpack
from deployments.meter.admission.model_catalog import MeteredModel
from deployments.meter.admission.prompts import MAX_PROMPT_TOKENS
from deployments.meter.admission.tokenizer import INLINE_SIZE
from deployments.meter.errors import (
    LedgerBusy,
    LedgerUnavailable,
    MeterBusy,
    MeterClosed,
    MeterError,
    TokenizerUnavailable,
    TokenOutOfVocabulary,
)
from deployments.meter.meter import Meter
from deployments.meter.worker_threads import WorkerThreads
from tests.deployments.meter.running_meter import answer_of, running_meter, settlement
from tests.deployments.meter.tiny_tokenizer import BEGIN_ID, save_tiny_tokenizer

CONTEXT = 64


@pytest.fixture
async def meter(tmp_path: Path) -> AsyncIterator[Meter]:
    async with running_meter(tmp_path) as meter:
        folder = save_tiny_tokenizer(tmp_path / "tiny")
        meter.set_models(
            [
                MeteredModel("tiny", folder, max_model_len=CONTEXT),
                MeteredModel("roomy", folder, max_model_len=10_000_000),
            ]
        )
        yield meter


def ask(
    *prompts: str | list[int],
    model: str = "tiny",
    max_tokens: int = 4,
    choices: int = 1,
    request_id: str = "cmpl-1",
    **options: Any,
) -> AdmissionRequest:
    """`options` are PromptOptions."""
    return AdmissionRequest(
        request_id=request_id,
        key_id="admin",
        model=model,
        prompts=list(prompts),
        max_tokens=max_tokens,
        choices=choices,
        options=PromptOptions(**options),
    )


async def admitted(meter: Meter, request: AdmissionRequest) -> list[list[int]]:
    answer = await answer_of(meter, request)
    assert isinstance(answer, Admitted), answer
    return answer.token_ids


async def unavailable(meter: Meter, request: AdmissionRequest) -> str:
    """Why it cannot be decided now."""
    answer = await answer_of(meter, request)
    assert isinstance(answer, AdmissionRefused), answer
    assert answer.code == "unavailable"
    return answer.message


async def refused(meter: Meter, request: AdmissionRequest) -> AdmissionRefused:
    answer = await answer_of(meter, request)
    assert isinstance(answer, AdmissionRefused), answer
    assert meter.counters().open_reservations == 0
    return answer


# --- tokenizing -------------------------------------------------------------------------------------------


async def test_texts_and_token_ids_are_admitted_in_order(meter: Meter, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tmp_path / "tiny" / "tokenizer.json"))
    first, second, third = await admitted(meter, ask("the mill", [1, 2, 3], "grüße \x00 🌊"))
    assert tokenizer.decode(first) == "the mill"
    assert second == [1, 2, 3]
    assert tokenizer.decode(third) == "grüße \x00 🌊"


@pytest.mark.parametrize("size", [INLINE_SIZE, INLINE_SIZE + 1])
async def test_short_and_long_texts_are_encoded_as_the_tokenizer_does(meter: Meter, tmp_path: Path, size: int) -> None:
    tokenizer = Tokenizer.from_file(str(tmp_path / "tiny" / "tokenizer.json"))
    text = ("the mill turns, 7 times. " * size)[:size]
    assert await admitted(meter, ask(text, model="roomy")) == [tokenizer.encode(text).ids]


async def test_special_tokens_are_added_to_texts_only(meter: Meter, tmp_path: Path) -> None:
    meter.set_models([MeteredModel("tiny", save_tiny_tokenizer(tmp_path / "begin", begin=True), CONTEXT)])
    text, ids = await admitted(meter, ask("mill", [5, 6]))
    assert text[0] == BEGIN_ID
    assert text.count(BEGIN_ID) == 1
    assert ids == [5, 6]
    assert await admitted(meter, ask("")) == [[BEGIN_ID]]


async def test_truncation_and_padding_in_the_file_are_ignored(meter: Meter, tmp_path: Path) -> None:
    meter.set_models([MeteredModel("tiny", save_tiny_tokenizer(tmp_path / "cut", truncate_at=5), CONTEXT)])
    short, long = await admitted(meter, ask("mill", "zyxwvuts"))
    assert len(short) < 5 < len(long)


async def test_an_added_token_beyond_a_gap_is_in_the_vocabulary(meter: Meter, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"mill": 0, "<far>": 400}, unk_token="mill"))
    tokenizer.add_special_tokens(["<far>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    meter.set_models([MeteredModel("tiny", tmp_path, CONTEXT)])
    assert await admitted(meter, ask([0, 400])) == [[0, 400]]
    refusal = await answer_of(meter, ask([401]))
    assert isinstance(refusal, AdmissionRefused)
    assert "0 <= id < 401" in refusal.message


async def test_a_long_prompt_neither_holds_the_event_loop_nor_delays_short_ones(meter: Meter) -> None:
    await admitted(meter, ask("loads the tokenizer"))
    lags = []
    for _ in range(3):
        started = time.perf_counter()
        long = asyncio.create_task(admitted(meter, ask("zyxwvuts " * 60_000, model="roomy")))
        worst_lag_s, last, finished_before = 0.0, started, 0
        while not long.done():
            await admitted(meter, ask("a short prompt"))
            finished_before += 1
            await asyncio.sleep(0)
            now = time.perf_counter()
            worst_lag_s, last = max(worst_lag_s, now - last), now
        [ids] = await long
        assert len(ids) > 400_000
        assert finished_before > 50
        lags.append(worst_lag_s / (last - started))
    # A tokenizer that kept the GIL would show a lag of the whole duration, each time; other processes cause some too.
    assert min(lags) < 0.5


# --- prompt options ---------------------------------------------------------------------------------------


async def test_without_options_prompts_are_taken_as_vllm_takes_them(meter: Meter, tmp_path: Path) -> None:
    meter.set_models([MeteredModel("tiny", save_tiny_tokenizer(tmp_path / "begin", begin=True), CONTEXT)])
    request = ask("mill", [5, 6])
    assert unpack(pack(request), AdmissionRequest).options == PromptOptions(True, None, "left")
    assert [ids[0] for ids in await admitted(meter, request)] == [BEGIN_ID, 5]


async def test_special_tokens_are_left_out_where_asked(meter: Meter, tmp_path: Path) -> None:
    meter.set_models([MeteredModel("tiny", save_tiny_tokenizer(tmp_path / "begin", begin=True), CONTEXT)])
    assert (await refused(meter, ask("", add_special_tokens=False))).code == "empty_prompt"
    [with_begin] = await admitted(meter, ask("mill"))
    assert await admitted(meter, ask("mill", [5], add_special_tokens=False)) == [with_begin[1:], [5]]


@pytest.mark.parametrize(
    ("side", "keep", "kept"),
    [
        ("right", 3, [1, 2, 3]),
        ("left", 3, [5, 6, 7]),
        ("right", 1, [1]),
        ("left", 1, [7]),
        ("right", 7, [1, 2, 3, 4, 5, 6, 7]),
        ("left", 8, [1, 2, 3, 4, 5, 6, 7]),
        ("left", 2**31 - 1, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
async def test_longer_prompts_are_cut_where_asked(meter: Meter, side: str, keep: int, kept: list[int]) -> None:
    request = ask([1, 2, 3, 4, 5, 6, 7], "zyxwvut", truncate_prompt_tokens=keep, truncation_side=side)
    ids, text = await admitted(meter, request)
    assert ids == kept
    [whole] = await admitted(meter, ask("zyxwvut"))
    assert text == [whole[place - 1] for place in kept]


async def test_prompts_are_cut_on_the_left_unless_told_otherwise(meter: Meter) -> None:
    assert await admitted(meter, ask([1, 2, 3], truncate_prompt_tokens=2)) == [[2, 3]]


async def test_special_tokens_count_among_those_that_are_kept(meter: Meter, tmp_path: Path) -> None:
    meter.set_models([MeteredModel("tiny", save_tiny_tokenizer(tmp_path / "begin", begin=True), CONTEXT)])
    [whole] = await admitted(meter, ask("zyx"))
    assert await admitted(meter, ask("zyx", truncate_prompt_tokens=2, truncation_side="right")) == [
        [BEGIN_ID, whole[1]]
    ]
    assert await admitted(meter, ask("zyx", truncate_prompt_tokens=2, truncation_side="left")) == [whole[-2:]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("max_tokens", "room"), [(4, CONTEXT - 4), (CONTEXT - 1, 1)])
async def test_as_much_is_kept_as_the_context_has_room_for(meter: Meter, side: str, max_tokens: int, room: int) -> None:
    ids, text = list(range(1, 100)), "zyxw" * 50
    options: dict[str, Any] = {"max_tokens": max_tokens, "truncate_prompt_tokens": -1, "truncation_side": side}
    [whole] = await admitted(meter, ask(text, model="roomy"))
    assert len(whole) > CONTEXT
    expected = [ids[:room], whole[:room]] if side == "right" else [ids[-room:], whole[-room:]]
    assert await admitted(meter, ask(ids, text, **options)) == expected
    assert await admitted(meter, ask([1], "z", **options)) == [[1], whole[:1]]


@pytest.mark.parametrize("prompt", [[7] * 200, "z" * 200, [7], "z"])
@pytest.mark.parametrize("max_tokens", [CONTEXT, CONTEXT + 1, 10_000])
async def test_a_completion_that_leaves_the_prompt_no_room_is_refused_whatever_is_cut(
    meter: Meter, prompt: str | list[int], max_tokens: int
) -> None:
    refusal = await refused(meter, ask(prompt, max_tokens=max_tokens, truncate_prompt_tokens=-1))
    assert (refusal.code, refusal.param) == ("context_length_exceeded", "prompt")
    assert f"requested {max_tokens + 1} tokens (1 in the prompt; {max_tokens} for the" in refusal.message


@pytest.mark.parametrize("prompt", ["z" * 200, [7] * 200])
async def test_the_context_is_checked_after_the_cut(meter: Meter, prompt: str | list[int]) -> None:
    assert (await refused(meter, ask(prompt))).code == "context_length_exceeded"
    fits, too_long = CONTEXT - 4, CONTEXT - 3
    refusal = await refused(meter, ask(prompt, truncate_prompt_tokens=too_long))
    assert refusal.code == "context_length_exceeded"
    assert f"requested {CONTEXT + 1} tokens ({too_long} in the prompt; 4 for the completion)" in refusal.message
    assert [len(ids) for ids in await admitted(meter, ask(prompt, truncate_prompt_tokens=fits))] == [fits]


async def test_what_is_reserved_is_what_is_left_of_the_prompts(meter: Meter) -> None:
    request = ask([1] * 50, "z" * 50, [1], max_tokens=6, choices=2, truncate_prompt_tokens=5)
    answer = await answer_of(meter, request)
    assert isinstance(answer, Admitted)
    assert answer.reserved_tokens == (5 + 5 + 1) + 3 * 2 * 6


@pytest.mark.parametrize("prompt", [[1, 10_000, 2], [10_000, 1, 2], [1, 2, 10_000]])
async def test_tokens_that_are_cut_off_are_not_looked_at(meter: Meter, prompt: list[int]) -> None:
    for side, kept in (("right", prompt[:1]), ("left", prompt[-1:])):
        answer = await answer_of(meter, ask(prompt, truncate_prompt_tokens=1, truncation_side=side))
        if kept == [10_000]:
            assert isinstance(answer, AdmissionRefused)
            assert (answer.code, answer.param) == ("token_out_of_vocabulary", "prompt")
        else:
            assert isinstance(answer, Admitted)
            assert answer.token_ids == [kept]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text("zyx é", max_size=70) | st.lists(st.integers(1, 200), max_size=70), min_size=1, max_size=4),
    st.none() | st.just(-1) | st.integers(1, 70),
    st.sampled_from(["left", "right"]),
    st.integers(1, 70),
)
async def test_what_is_admitted_is_never_empty_fits_and_is_an_end_of_the_prompt(
    meter: Meter, prompts: list[str | list[int]], keep: int | None, side: str, max_tokens: int
) -> None:
    answer = await answer_of(
        meter, ask(*prompts, max_tokens=max_tokens, truncate_prompt_tokens=keep, truncation_side=side)
    )
    wholes = [prompt if isinstance(prompt, list) else (await whole_of(meter, prompt)) for prompt in prompts]
    limit = CONTEXT - max_tokens if keep == -1 else keep
    lengths = [len(whole) if limit is None else min(len(whole), max(1, limit)) for whole in wholes]
    if not all(lengths):
        assert isinstance(answer, AdmissionRefused)
        assert answer.code in ("empty_prompt", "context_length_exceeded")
    elif max(lengths) + max_tokens > CONTEXT:
        assert isinstance(answer, AdmissionRefused)
        assert answer.code == "context_length_exceeded"
    else:
        assert isinstance(answer, Admitted)
        cut = zip(wholes, lengths, strict=True)
        assert answer.token_ids == [
            whole[:length] if side == "right" else whole[len(whole) - length :] for whole, length in cut
        ]


async def whole_of(meter: Meter, prompt: str) -> list[int]:
    if not prompt:
        return []
    [ids] = await admitted(meter, ask(prompt, model="roomy"))
    return ids


# --- refusals ---------------------------------------------------------------------------------------------


async def test_an_unknown_model_is_refused(meter: Meter) -> None:
    refusal = await refused(meter, ask("the mill", model="nowhere"))
    assert (refusal.code, refusal.param) == ("model_not_found", "model")
    assert "`nowhere`" in refusal.message


@pytest.mark.parametrize(
    ("prompts", "which"),
    [
        (("",), "The prompt"),
        (([],), "The prompt"),
        (("the mill", ""), "Prompt 1"),
        (("the mill", "", [7], []), "Prompt 1"),
        (([], "the mill"), "Prompt 0"),
    ],
)
async def test_a_prompt_without_tokens_is_refused_by_its_place(
    meter: Meter, prompts: tuple[str | list[int], ...], which: str
) -> None:
    refusal = await refused(meter, ask(*prompts))
    assert (refusal.code, refusal.param) == ("empty_prompt", "prompt")
    assert refusal.message == f"{which} is empty; expected at least one token in each prompt."


@pytest.mark.parametrize("wrong", [-1, 10_000, 2**40])
async def test_a_token_id_out_of_the_vocabulary_is_refused_and_named(meter: Meter, wrong: int) -> None:
    refusal = await refused(meter, ask("the mill", [1, wrong, 2]))
    assert (refusal.code, refusal.param) == ("token_out_of_vocabulary", "prompt")
    assert f"Token id {wrong} " in refusal.message


@pytest.mark.parametrize("prompt", ["z" * 60, [7] * 60])
async def test_prompt_and_completion_may_fill_the_context_but_not_exceed_it(
    meter: Meter, prompt: str | list[int]
) -> None:
    assert [len(ids) for ids in await admitted(meter, ask(prompt, max_tokens=4, request_id="fits"))] == [60]
    await meter.settle([settlement("fits")])
    refusal = await refused(meter, ask("the mill", prompt, max_tokens=5))
    assert refusal == AdmissionRefused(
        "context_length_exceeded",
        "This model's maximum context length is 64 tokens. However, you requested 65 tokens "
        "(60 in the prompt; 5 for the completion). Please reduce the prompt or max_tokens.",
        param="prompt",
    )


@pytest.mark.parametrize("prompt", ["zzz", [7, 7, 7]])
async def test_a_completion_longer_than_the_context_is_refused_with_the_prompts_true_length(
    meter: Meter, prompt: str | list[int]
) -> None:
    refusal = await refused(meter, ask(prompt, max_tokens=10_000))
    assert "requested 10003 tokens (3 in the prompt; 10000 for the completion)" in refusal.message


# --- the catalog ----------------------------------------------------------------------------------------


async def test_the_catalogue_is_replaced_at_run_time(meter: Meter, tmp_path: Path) -> None:
    await admitted(meter, ask("the mill", request_id="before"))
    other = MeteredModel("other", save_tiny_tokenizer(tmp_path / "other", begin=True), CONTEXT)
    longer = MeteredModel("tiny", tmp_path / "tiny", max_model_len=2 * CONTEXT)

    meter.set_models([longer, other])
    unlisted = await answer_of(meter, ask("the mill", model="roomy"))
    assert isinstance(unlisted, AdmissionRefused)
    assert (await admitted(meter, ask("mill", model="other")))[0][0] == BEGIN_ID
    await admitted(meter, ask("z" * 100))

    meter.set_models([])
    gone = await answer_of(meter, ask("the mill"))
    assert isinstance(gone, AdmissionRefused)
    await meter.settle([settlement("before")])  # a request outlives its model


async def test_a_request_that_began_under_the_old_catalogue_ends_under_it(meter: Meter) -> None:
    running = asyncio.create_task(admitted(meter, ask("the mill " * 1000, model="roomy")))
    for _ in range(2):  # into the task of its batch, and there into its own
        await asyncio.sleep(0)
    meter.set_models([])
    assert len(await running) == 1


async def test_an_unreadable_tokenizer_fails_its_own_model_until_it_is_repaired(meter: Meter, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    models = [MeteredModel("tiny", tmp_path / "tiny", CONTEXT), MeteredModel("broken", folder, CONTEXT)]
    meter.set_models(models)
    assert "broken" in await unavailable(meter, ask("the mill", model="broken"))
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    assert "broken" in await unavailable(meter, ask("the mill", model="broken"))
    await admitted(meter, ask("the mill"))

    save_tiny_tokenizer(folder)
    await asyncio.gather(*(admitted(meter, ask("the mill", model="broken")) for _ in range(5)))


# --- reservations and settling ----------------------------------------------------------------------------


async def test_a_reservation_lasts_from_admission_to_settlement(meter: Meter) -> None:
    await admitted(meter, ask("the mill", request_id="one"))
    await admitted(meter, ask("the mill", request_id="two"))
    await admitted(meter, ask("the mill", request_id="two"))  # asked again after a lost answer
    assert meter.counters().open_reservations == 2
    await meter.settle([settlement("one"), settlement("from-before-a-restart")])
    assert meter.counters().open_reservations == 1
    await meter.settle([settlement("one"), settlement("two")])
    assert meter.counters().open_reservations == 0


async def test_an_admission_that_its_ingress_has_given_up_reserves_nothing(meter: Meter) -> None:
    await meter.settle([settlement("late", status="failed")])
    refusal = await refused(meter, ask("the mill", request_id="late"))
    assert "given up" in refusal.message


async def test_a_full_table_of_reservations_refuses_until_one_is_settled(tmp_path: Path) -> None:
    async with running_meter(tmp_path, max_reservations=1) as meter:
        meter.set_models([MeteredModel("tiny", save_tiny_tokenizer(tmp_path), CONTEXT)])
        await admitted(meter, ask("the mill", request_id="one"))
        assert "open reservations" in await unavailable(meter, ask("the mill", request_id="two"))
        await meter.settle([settlement("one")])
        await admitted(meter, ask("the mill", request_id="two"))


async def test_what_cannot_be_decided_holds_up_nothing_else_of_its_batch(meter: Meter, tmp_path: Path) -> None:
    models = [MeteredModel("tiny", tmp_path / "tiny", 10_000), MeteredModel("broken", tmp_path / "none", CONTEXT)]
    meter.set_models(models)
    broken, long = await asyncio.gather(
        answer_of(meter, ask("the mill", model="broken")), answer_of(meter, ask("long " * 1000, request_id="long"))
    )
    assert isinstance(broken, AdmissionRefused)
    assert broken.code == "unavailable"
    assert isinstance(long, Admitted)
    assert meter.counters().open_reservations == 1


# --- the threads ------------------------------------------------------------------------------------------


async def test_what_waits_for_a_thread_is_bounded_and_leaves_when_cancelled() -> None:
    threads = WorkerThreads("test", threads=1, max_waiting=1)
    release = threading.Event()
    ran: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: ran.append(name) if release.wait(10) else None

    running = asyncio.create_task(threads.run(call("running")))
    waiting = asyncio.create_task(threads.run(call("waiting")))
    await asyncio.sleep(0)
    with pytest.raises(MeterBusy):
        await threads.run(call("refused"))
    waiting.cancel()
    await asyncio.wait({waiting})
    # A running call cannot be stopped: its thread is taken until it ends, whoever still waits for it.
    running.cancel()
    await asyncio.wait({running})
    last = asyncio.create_task(threads.run(call("last")))
    await asyncio.sleep(0)
    with pytest.raises(MeterBusy):
        await threads.run(call("refused"))
    release.set()
    await last
    assert ran == ["running", "last"]
    threads.close()
    threads.close()
    with pytest.raises(MeterClosed):
        await threads.run(call("late"))


@pytest.mark.parametrize(
    "error",
    [
        MeterBusy("queue", 3),
        LedgerBusy("queue", 3),
        LedgerUnavailable("disk I/O error"),
        MeterClosed("meter"),
        TokenizerUnavailable(Path("/models/m"), "no such file"),
        TokenOutOfVocabulary(5, 4),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_a_process_boundary_whole(error: MeterError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


# --- what multiplies ------------------------------------------------------------------------------------------------


async def test_prompt_tokens_are_bounded_over_all_choices_that_are_generated_from_them(meter: Meter) -> None:
    ids = [3] * 8000
    refusal = await refused(meter, ask(*[ids] * 8, model="roomy", choices=128))
    assert (refusal.code, refusal.param) == ("too_many_prompt_tokens", "n")
    assert f"make 8192000 prompt tokens; at most {MAX_PROMPT_TOKENS}" in refusal.message
    assert len(await admitted(meter, ask(ids, model="roomy", choices=128, request_id="cmpl-2"))) == 1


async def test_the_bound_on_prompt_tokens_holds_for_texts_too(meter: Meter) -> None:
    text = "the mill turns, 7 times. " * 2000
    refusal = await refused(meter, ask(text, model="roomy", choices=128))
    assert (refusal.code, refusal.param) == ("too_many_prompt_tokens", "n")
    one = await refused(meter, ask([3] * (MAX_PROMPT_TOKENS + 1), model="roomy", request_id="cmpl-2"))
    assert (one.code, one.param) == ("too_many_prompt_tokens", "prompt")
