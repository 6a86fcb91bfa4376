from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deployments.contracts import FinishReason
from deployments.ingress.inference.text_stream import TextDelta, TextOptions, TextStream


@cache
def tokenizer() -> Tokenizer:
    """One token per byte; 256 is a special token, 257 the two letters `ST`, 258 `nd`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<|end|>", "ST", "nd"])}
    letters = Tokenizer(models.BPE(vocabulary, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    letters.add_special_tokens(["<|end|>"])
    return letters


END, ST, ND = 256, 257, 258


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


LINE_FEED = ids("\n")[0]
ENDING_TOKENS: list[tuple[FinishReason, int | None]] = [("stop_token", LINE_FEED), ("end_of_text", None)]


def stream(*stops: str, include: bool = False, min_tokens: int = 0) -> TextStream:
    return TextStream(tokenizer(), ids("prompt"), TextOptions(stops, include, min_tokens))


def test_text_and_tokens_of_a_batch() -> None:
    choice = stream()
    assert choice.push(ids("Hé")[:2]) == TextDelta("H", 2, None)
    assert choice.push(ids("Hé")[2:], "length") == TextDelta("é", 1, "length")


def test_tokens_behind_the_stop_string_do_not_count() -> None:
    choice = stream("STOP")
    assert choice.push([*ids("a "), ST]) == TextDelta("a ", 3, None)
    assert choice.push(ids("OP and more"), "length") == TextDelta("", 2, "stop", "STOP")


def test_a_token_is_counted_whole_when_the_stop_string_ends_inside_it() -> None:
    assert stream("an").push([*ids("ha"), ND, *ids("!")]) == TextDelta("h", 3, "stop", "an")
    assert stream("an", include=True).push([*ids("ha"), ND, *ids("!")]) == TextDelta("han", 3, "stop", "an")


@pytest.mark.parametrize("stops", [(), ("STOP",)])
def test_the_stop_token_counts_but_is_not_text(stops: tuple[str, ...]) -> None:
    assert stream(*stops).push([*ids("ab"), END], "stop_token") == TextDelta("ab", 3, "stop", END)
    assert stream(*stops).push(ids("ab\n"), "stop_token") == TextDelta("ab", 3, "stop", LINE_FEED)
    assert stream(*stops).push(ids("ab\n"), "end_of_text") == TextDelta("ab", 3, "stop", None)


@pytest.mark.parametrize("stops", [(), ("STOP",)])
def test_the_stop_token_is_text_when_stops_are_included(stops: tuple[str, ...]) -> None:
    for finish, reason in ENDING_TOKENS:
        assert stream(*stops, include=True).push(ids("ab\n"), finish) == TextDelta("ab\n", 3, "stop", reason)


@pytest.mark.parametrize(
    ("finish", "finished", "reason"),
    [
        ("length", "length", None),
        ("stop", "stop", None),
        ("stop_token", "stop", END),
        ("end_of_text", "stop", None),
        ("repetition", "stop", "repetition_detected"),
    ],
)
def test_what_was_held_back_comes_with_the_end_and_its_reason(
    finish: FinishReason, finished: Literal["stop", "length"], reason: int | str | None
) -> None:
    choice = stream("STOP")
    assert choice.push([ST]) == TextDelta("", 1, None)
    assert choice.push([END], finish) == TextDelta("ST", 1, finished, reason)
    assert stream().push([ST, END], finish) == TextDelta("ST", 2, finished, reason)


@pytest.mark.parametrize("finish", ["length", "stop", "stop_token", "end_of_text", "repetition"])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_is_the_reason_whatever_ended_the_generation_with_it(finish: FinishReason, include: bool) -> None:
    text = "a!" if include else "a"
    assert stream("?", "!", include=include).push([*ids("a!"), END], finish) == TextDelta(text, 2, "stop", "!")


def test_the_text_of_a_stop_token_is_no_stop_string_unless_it_is_included() -> None:
    assert stream("\n").push(ids("ab\n"), "stop_token") == TextDelta("ab", 3, "stop", LINE_FEED)
    assert stream("\n", include=True).push(ids("ab\n"), "stop_token") == TextDelta("ab\n", 3, "stop", "\n")


def test_the_last_token_of_a_repetition_is_text() -> None:
    delta = stream().push(ids("abab"), "repetition")
    assert delta == TextDelta("abab", 4, "stop", "repetition_detected")


def test_an_end_without_tokens_is_an_end() -> None:
    choice = stream("STOP")
    choice.push([ST])
    assert choice.push([], "length") == TextDelta("ST", 0, "length")


@pytest.mark.parametrize("finish", ["failed", "refused"])
def test_a_failure_does_not_end_the_text(finish: FinishReason) -> None:
    choice = stream("STOP")
    assert choice.push([*ids("a"), ST], finish) == TextDelta("a", 2, None)
    assert choice.push(ids("OP")) == TextDelta("", 2, "stop", "STOP")


def test_stop_strings_count_after_min_tokens_only() -> None:
    choice = stream("b", min_tokens=3)
    assert choice.push(ids("ab")) == TextDelta("ab", 2, None)
    assert choice.push(ids("bab")) == TextDelta("ba", 3, "stop", "b")


token_lists = st.lists(st.sampled_from([*ids("abSTOP€\n"), END, ST, ND]), max_size=30)
stop_lists = st.lists(st.sampled_from(["ab", "b", "STOP", "TO", "nd", "a\n", "€", "P€"]), max_size=3)


def whole(choice: TextStream, batches: Sequence[list[int]], finish: FinishReason) -> TextDelta:
    text, used = "", 0
    for position, batch in enumerate(batches, start=1):
        delta = choice.push(batch, finish if position == len(batches) else None)
        text, used = text + delta.text, used + delta.tokens_used
        if delta.finished:
            return TextDelta(text, used, delta.finished, delta.stop_reason)
        assert delta.stop_reason is None
    raise AssertionError("not finished")


@given(st.data(), token_lists, stop_lists, st.integers(0, 5), st.booleans())
def test_batches_do_not_change_the_choice(
    data: st.DataObject, tokens: list[int], stops: list[str], min_tokens: int, include: bool
) -> None:
    tokens = [*tokens, END]
    finish: FinishReason = data.draw(st.sampled_from(["stop", "stop_token", "end_of_text", "repetition", "length"]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=6)))
    batches = [tokens[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
    batched = whole(stream(*stops, include=include, min_tokens=min_tokens), batches, finish)
    singly = whole(stream(*stops, include=include, min_tokens=min_tokens), [[t] for t in tokens], finish)
    assert batched == singly


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_the_choice_is_that_of_vllm() -> None:
    vllm = pytest.importorskip("vllm")
    engine = pytest.importorskip("vllm.v1.engine.detokenizer")

    @given(token_lists, stop_lists, st.integers(0, 5), st.booleans(), st.booleans())
    def check(tokens: list[int], stops: list[str], min_tokens: int, include: bool, stop_token: bool) -> None:
        tokens = [*tokens, END]
        params = vllm.SamplingParams(
            stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include, max_tokens=100
        )
        request = SimpleNamespace(request_id="r", prompt_token_ids=ids("prompt"), sampling_params=params)
        theirs = engine.FastIncrementalDetokenizer(SimpleNamespace(_tokenizer=tokenizer()), request)
        found = None
        for position, token in enumerate(tokens, start=1):
            found = theirs.update([token], stop_token and position == len(tokens))
            if found:
                break
        text = theirs.get_next_output_text(True, False)
        ours = whole(
            stream(*stops, include=include, min_tokens=min_tokens),
            [tokens],
            "stop_token" if stop_token else "length",
        )
        finished = "stop" if found or stop_token else "length"
        reason = found if found or not stop_token else END
        assert ours == (text, len(theirs.output_token_ids), finished, reason)

    check()
