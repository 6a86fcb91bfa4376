from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.ingress.inference.stop_strings import Scan, StopStrings

few_letters = st.text(alphabet="ab", max_size=6)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4)


def filtered(strings: StopStrings, texts: Sequence[str], unarmed: int = 0) -> tuple[str, str | None]:
    """The whole text for `texts` that come one after the other, and the stop string that ended it."""
    sent = ""
    for position, text in enumerate(texts):
        scan = strings.push(text, armed=position >= unarmed)
        sent += scan.text
        if scan.found is not None:
            return sent, scan.found
    return sent + strings.flush(), None


def expected(stops: Sequence[str], texts: Sequence[str], unarmed: int, *, include: bool) -> tuple[str, str | None]:
    """The same by definition: the first end of a stop string behind the unarmed texts, then list order."""
    text = "".join(texts)
    for end in range(len("".join(texts[:unarmed])) + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


@given(stop_lists, st.lists(few_letters, max_size=12), st.integers(0, 4), st.booleans())
def test_the_text_ends_at_the_stop_string_that_completes_first(
    stops: list[str], texts: list[str], unarmed: int, include: bool
) -> None:
    strings = StopStrings(stops, include_in_output=include)
    assert filtered(strings, texts, unarmed) == expected(stops, texts, unarmed, include=include)


@given(stop_lists, st.lists(few_letters, max_size=12))
def test_only_the_beginning_of_a_stop_string_is_held_back(stops: list[str], texts: list[str]) -> None:
    strings = StopStrings(stops)
    pushed, sent = "", ""
    for text in texts:
        scan = strings.push(text, armed=False)
        pushed += text
        sent += scan.text
        beginnings = [stop[:n] for stop in stops for n in range(1, len(stop))]
        held = max((len(begin) for begin in beginnings if pushed.endswith(begin)), default=0)
        assert sent == pushed[: len(pushed) - held]


@given(stop_lists, st.lists(few_letters, max_size=12))
def test_nothing_is_held_back_when_the_stop_string_is_included(stops: list[str], texts: list[str]) -> None:
    strings = StopStrings(stops, include_in_output=True)
    for text in texts:
        scan = strings.push(text)
        if scan.found is not None:
            break
        assert scan.text == text


def test_a_false_start_is_sent_as_soon_as_it_is_one() -> None:
    strings = StopStrings(["\n\nHuman:"])
    assert strings.push("Hi\n") == Scan("Hi", None)
    assert strings.push("\nHum") == Scan("", None)
    assert strings.push("our") == Scan("\n\nHumour", None)


def test_a_stop_string_over_several_texts_is_found() -> None:
    strings = StopStrings(["END"])
    assert strings.push("one E") == Scan("one ", None)
    assert strings.push("N") == Scan("", None)
    assert strings.push("D two END") == Scan("", "END")


def test_an_included_stop_string_ends_the_text() -> None:
    strings = StopStrings(["END"], include_in_output=True)
    assert strings.push("one E") == Scan("one E", None)
    assert strings.push("ND two") == Scan("ND", "END")


def test_of_stop_strings_that_end_together_the_first_listed_counts() -> None:
    assert StopStrings(["c", "bc"]).push("abc") == Scan("ab", "c")
    assert StopStrings(["bc", "c"]).push("abc") == Scan("a", "bc")


def test_a_stop_string_that_ended_unarmed_is_not_found_later() -> None:
    strings = StopStrings(["b", "abc"])
    assert strings.push("ab", armed=False) == Scan("", None)
    assert strings.push("x") == Scan("abx", None)


def test_a_stop_string_that_began_unarmed_is_found() -> None:
    strings = StopStrings(["abc"])
    assert strings.push("ab", armed=False) == Scan("", None)
    assert strings.push("c") == Scan("", "abc")


def test_what_was_held_back_comes_at_the_end() -> None:
    strings = StopStrings(["END"])
    assert strings.push("the EN") == Scan("the ", None)
    assert strings.flush() == "EN"
    assert strings.flush() == ""


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_the_text_is_that_of_vllm() -> None:
    engine = pytest.importorskip("vllm.v1.engine.detokenizer")

    @given(stop_lists, st.lists(few_letters, max_size=12), st.integers(0, 4), st.booleans())
    def check(stops: list[str], texts: list[str], unarmed: int, include: bool) -> None:
        text, theirs = "", None
        for position, new in enumerate(texts):
            text += new
            if position >= unarmed:
                theirs = engine.check_stop_strings(text, len(new), stops, include)
            if theirs is not None:
                break
        stop, end = theirs or (None, -1)
        ours = filtered(StopStrings(stops, include_in_output=include), texts, unarmed)
        assert ours == (text if end == -1 else text[:end], stop)

    check()
