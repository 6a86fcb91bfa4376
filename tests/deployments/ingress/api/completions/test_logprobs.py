"""Log probabilities: texts of tokens that add up to the text, offsets into it, and what is told of each position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deployments.contracts import PositionLogprobs
from deployments.ingress.api.completions.logprobs import LogprobsWriter, WrittenLogprobs, prompt_logprobs_fields
from deployments.ingress.inference.detokenizer import Detokenizer
from deployments.ingress.inference.token_texts import TokenTexts
from tests.deployments.ingress.byte_level import byte_alphabet, byte_level_tokenizer

FAMILY = "👩‍👩‍👧"
MIXED = f"Zwölf Boxkämpfer: 日本語のテキスト, {FAMILY} 🇩🇪 “naïve” — 한국어 привет €5\n\tdef f(x): return x"


@cache
def byte_level() -> Tokenizer:
    """One token per byte and some of several: words, parts of a character, a character with a part of the next."""
    visible = byte_alphabet()
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *visible.values()])}
    merges: list[tuple[str, str]] = []
    for data in (b"he", b" w", "é".encode(), "€".encode()[:2], "日本".encode()[:4]):
        name = "".join(visible[byte] for byte in data)
        for length in range(2, len(name) + 1):
            vocabulary[name[:length]] = len(vocabulary)
            merges.append((name[: length - 1], name[length - 1]))
    return byte_level_tokenizer(vocabulary, merges)


def byte_ids(data: bytes) -> list[int]:
    visible = byte_alphabet()
    vocabulary = byte_level().get_vocab()
    return [vocabulary[visible[byte]] for byte in data]


@cache
def metaspace(marker: str = "▁", *, in_sequence: bool = False, strips: bool = True) -> Tokenizer:
    """SentencePiece's kind: a marker for a space, and mostly a decoder that strips those that a text begins with."""
    words = ["<s>", "▁", "▁hello", "▁▁world", "lo", "!", "日"]
    vocabulary = {word.replace("▁", marker): number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    stage = pre_tokenizers.Metaspace(replacement=marker)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), stage]) if in_sequence else stage
    tokenizer.decoder = (
        decoders.Metaspace(replacement=marker)
        if strips
        else decoders.Sequence([decoders.Replace(marker, " "), decoders.Fuse()])
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def position(token_id: int, *others: int) -> PositionLogprobs:
    """Of made-up probabilities."""
    told = (token_id, *others)
    return PositionLogprobs(
        told, tuple([-0.5 * (place + 1) for place in range(len(told))]), tuple(range(1, len(told) + 1))
    )


def writer(tokenizer: Tokenizer, *, top: int | None = 0, as_token_ids: bool = False) -> LogprobsWriter:
    return LogprobsWriter(TokenTexts(tokenizer), top=top, as_token_ids=as_token_ids)


def written(tokenizer: Tokenizer, token_ids: Sequence[int]) -> WrittenLogprobs:
    return writer(tokenizer).generated(token_ids, [position(token_id) for token_id in token_ids])


def assert_adds_up(logprobs: WrittenLogprobs, text: str) -> None:
    assert "".join(logprobs.tokens) == text
    assert len(logprobs.text_offset) == len(logprobs.tokens)
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert text[offset : offset + len(token)] == token


# --- texts of tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", ["é", "日", "👍"])
def test_the_token_that_completes_a_character_gets_all_of_it(character: str) -> None:
    data = character.encode()
    logprobs = written(byte_level(), byte_ids(b"a" + data + b"b"))
    assert logprobs.tokens == ["a", *[""] * (len(data) - 1), character, "b"]
    assert logprobs.text_offset == [0, *[1] * len(data), 2]


def test_a_token_that_ends_within_a_character_gives_what_it_completes_to_the_one_that_completes_it() -> None:
    tokenizer = byte_level()
    token_ids = tokenizer.encode("x日本w").ids
    assert tokenizer.decode(token_ids[1:2]) == "日\ufffd"
    assert written(tokenizer, token_ids).tokens == ["x", "", "", "日本", "w"]


def test_characters_that_stand_together_as_one_are_told_one_by_one() -> None:
    tokens = written(byte_level(), byte_ids(FAMILY.encode())).tokens
    assert [token for token in tokens if token] == list(FAMILY)


def test_special_tokens_have_a_text() -> None:
    tokenizer = byte_level()
    assert written(tokenizer, [*byte_ids(b"a"), tokenizer.get_vocab()["<|end|>"]]).tokens == ["a", "<|end|>"]


def test_a_character_that_is_never_completed_has_no_text() -> None:
    assert written(byte_level(), byte_ids("a👍".encode()[:-1])).tokens == ["a", "", "", ""]
    assert written(byte_level(), byte_ids(b"\xff" * 6 + b"a")).tokens == [""] * 6 + ["a"]


def test_each_of_the_likeliest_tokens_reads_like_the_continuation_it_would_be() -> None:
    first, second, euro = byte_ids("€".encode())
    other = byte_ids("₭".encode())[-1]
    letter = byte_ids(b"a")[0]
    logprobs = writer(byte_level(), top=3).generated(
        [first, second, euro],
        [position(first, letter), position(second), position(euro, other, letter, first)],
    )
    assert logprobs.tokens == ["", "", "€"]
    assert [list(top or {}) for top in logprobs.top_logprobs] == [["", "a"], [""], ["€", "₭", "a", ""]]


@given(st.text(max_size=30).filter(lambda text: "\ufffd" not in text))
@example("")
@example(MIXED)
@example("日本日本")
@example("€€é" * 5)
def test_texts_add_up_to_the_text_and_offsets_point_into_it(text: str) -> None:
    tokenizer = byte_level()
    token_ids = tokenizer.encode(text).ids
    logprobs = written(tokenizer, token_ids)
    assert_adds_up(logprobs, text)
    assert Detokenizer(tokenizer, byte_ids(b"a")).push(token_ids) == text


def test_texts_add_up_for_smollm2(smollm2_tokenizer: Tokenizer) -> None:
    assert_adds_up(written(smollm2_tokenizer, smollm2_tokenizer.encode(MIXED).ids), MIXED)
    common = st.sampled_from("ab \n’“—é€日本語中文字한국어приветعربي👍🚀👩\u200d🇩🇪")

    @given(st.text(common, max_size=30) | st.text(max_size=20))
    def check(text: str) -> None:
        token_ids = smollm2_tokenizer.encode(text).ids
        seen = smollm2_tokenizer.decode(token_ids)  # it has no tokens for some bytes, of the rarest characters
        if "\ufffd" not in seen:
            assert_adds_up(written(smollm2_tokenizer, token_ids), seen)

    check()


@pytest.mark.parametrize(
    "tokenizer",
    [metaspace(), metaspace("_"), metaspace(in_sequence=True), metaspace(strips=False)],
    ids=["alone", "marker", "sequence", "unstripped"],
)
def test_words_keep_the_space_that_they_begin_with(tokenizer: Tokenizer) -> None:
    hello, world = 2, 3
    token_ids = [hello, world, 4, 5, 1, hello]
    logprobs = written(tokenizer, token_ids)
    assert logprobs.tokens == [" hello", "  world", "lo", "!", " ", " hello"]
    assert_adds_up(logprobs, Detokenizer(tokenizer, [hello]).push(token_ids))


def test_an_echo_does_not_begin_with_the_space_of_its_first_word() -> None:
    """As in vLLM, and in the text."""
    tokenizer = metaspace()
    token_ids = [2, 2, 5]
    logprobs = writer(tokenizer).prompt(token_ids, [None, position(2), position(5)])
    assert logprobs.tokens == ["hello", " hello", "!"]
    assert_adds_up(logprobs, tokenizer.decode(token_ids))


def test_texts_of_tokens_do_not_depend_on_what_was_asked_before() -> None:
    texts, tokenizer = TokenTexts(byte_level()), byte_level()
    first, second, third = byte_ids("日".encode())
    for _ in range(2):
        assert texts.alone(first) == "\ufffd"
        assert texts.after([], third) == ""
        assert texts.after([first, second], third) == "日"
        assert texts.after([*tokenizer.encode("a").ids, first, second], third) == "日"
        assert texts.after(byte_ids(b"a"), first) == ""


# --- what is told of a position ------------------------------------------------------------------------------------

A, B, C, D = byte_ids(b"abcd")


def told(position: PositionLogprobs, **options: Any) -> tuple[str, float | None, dict[str, float] | None]:
    logprobs = writer(byte_level(), **options).generated(position.token_ids[:1], [position])
    return logprobs.tokens[0], logprobs.token_logprobs[0], logprobs.top_logprobs[0]


LIKELY = PositionLogprobs((A, B, C, D), (-0.5, -1.0, -1.5, -2.0), (1, 2, 3, 4))
UNLIKELY = PositionLogprobs((D, A, B, C), (-9.0, -0.5, -1.0, -1.5), (20, 1, 2, 3))


def test_no_more_is_told_than_was_asked_for() -> None:
    """The chosen one and so many others, as in vLLM: an echo may get more from the engine, for prompt_logprobs."""
    assert told(LIKELY, top=0) == ("a", -0.5, {"a": -0.5})
    assert told(LIKELY, top=2) == ("a", -0.5, {"a": -0.5, "b": -1.0, "c": -1.5})
    assert told(LIKELY, top=5) == ("a", -0.5, {"a": -0.5, "b": -1.0, "c": -1.5, "d": -2.0})


def test_a_chosen_token_that_is_not_among_the_likeliest_is_told_with_them() -> None:
    assert told(UNLIKELY, top=0) == ("d", -9.0, {"d": -9.0})
    assert told(UNLIKELY, top=1) == ("d", -9.0, {"d": -9.0, "a": -0.5})
    assert told(UNLIKELY, top=3) == ("d", -9.0, {"d": -9.0, "a": -0.5, "b": -1.0, "c": -1.5})


def test_without_a_limit_all_that_the_engine_tells_is_told() -> None:
    """For logprob_token_ids, which may be many more than `logprobs`."""
    many = position(A, B, C, D, *byte_ids(bytes(range(0x30, 0x3A))))
    assert len(told(many, top=None)[2] or {}) == 14


def test_tokens_that_read_alike_are_all_told() -> None:
    """The chosen one by the name that `tokens` has for it, the others by their bytes, as OpenAI did."""
    first, second, third = byte_ids("日".encode())
    others = byte_ids(b"\xe7\x8c")
    assert told(position(first, A, *others), top=3) == (
        "",
        -0.5,
        {"": -0.5, "a": -1.0, "bytes:\\xe7": -1.5, "bytes:\\x8c": -2.0},
    )
    assert told(position(A, *others), top=2)[2] == {"a": -0.5, "bytes:\\xe7": -1.0, "bytes:\\x8c": -1.5}
    assert told(position(A, others[0]), top=2)[2] == {"a": -0.5, "": -1.0}  # as in vLLM, where nothing is lost
    completed = writer(byte_level(), top=2).generated(
        [first, second, third], [position(first), position(second), position(third, first, second)]
    )
    assert completed.top_logprobs[2] == {"日": -0.5, "": -1.0, "旗": -1.5}  # what they would have made of it


def test_what_has_a_name_of_bytes_already_is_told_by_its_id() -> None:
    tokenizer = byte_level_tokenizer({**byte_level().get_vocab(), "bytes:\\x8c": 400}, [])
    others = byte_ids(b"\xe7\x8c")
    named = LogprobsWriter(TokenTexts(tokenizer), top=4, as_token_ids=False).generated([A], [position(A, *others, 400)])
    assert named.top_logprobs == [{"a": -0.5, "bytes:\\xe7": -1.0, f"token_id:{others[1]}": -1.5, "bytes:\\x8c": -2.0}]


def test_bytes_of_sentencepiece_are_told_too() -> None:
    tokenizer = Tokenizer(models.BPE({"▁a": 0, "<0xE2>": 1, "<0x80>": 2, "<0x20>": 3, "▁日": 4}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = TokenTexts(tokenizer)
    names = [texts.as_bytes(token_id) for token_id in range(5)]
    assert names == ["bytes: a", "bytes:\\xe2", "bytes:\\x80", "bytes: ", "bytes: \\xe6\\x97\\xa5"]


@given(st.lists(st.integers(0, 255), min_size=2, max_size=20, unique=True))
def test_no_entry_is_ever_lost(byte_values: list[int]) -> None:
    token_ids = byte_ids(bytes(byte_values))
    token, logprob, top = told(position(*token_ids), top=len(token_ids))
    assert top is not None
    assert len(top) == len(token_ids)
    assert top[token] == logprob
    assert sorted(top.values(), reverse=True) == [-0.5 * (place + 1) for place in range(len(token_ids))]


@pytest.mark.parametrize("lowest", [-math.inf, -10_000.0, -1e300])
def test_no_log_probability_is_lower_than_json_can_say(lowest: float) -> None:
    impossible = PositionLogprobs((A, B), (lowest, -9998.5), (200, 1))
    assert told(impossible, top=1) == ("a", -9999.0, {"a": -9999.0, "b": -9998.5})
    assert list(prompt_logprobs_fields(TokenTexts(byte_level()), [impossible])) == [
        {
            str(A): {"logprob": -9999.0, "rank": 200, "decoded_token": "a"},
            str(B): {"logprob": -9998.5, "rank": 1, "decoded_token": "b"},
        }
    ]


def test_tokens_can_be_named_by_their_ids() -> None:
    first, second = byte_ids("é".encode())
    names = [f"token_id:{token_id}" for token_id in (A, first, second)]
    logprobs = writer(byte_level(), top=1, as_token_ids=True).generated(
        [A, first, second], [position(A, B), position(first), position(second)]
    )
    assert logprobs.tokens == names
    assert logprobs.top_logprobs == [{names[0]: -0.5, f"token_id:{B}": -1.0}, {names[1]: -0.5}, {names[2]: -0.5}]
    assert logprobs.text_offset == [0, len(names[0]), len(names[0]) + len(names[1])]


def test_a_position_must_come_with_its_token() -> None:
    with pytest.raises(ValueError, match="zip"):
        writer(byte_level()).generated([A, B], [position(A)])


# --- echo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_token_ids", [False, True])
def test_of_the_first_token_of_an_echo_nothing_is_known(as_token_ids: bool) -> None:
    echo = writer(byte_level(), top=1, as_token_ids=as_token_ids)
    logprobs = echo.prompt([A, B], [None, position(B, C)])
    logprobs.extend(echo.generated([C], [position(C)]))
    a, b, c = [f"token_id:{token_id}" for token_id in (A, B, C)] if as_token_ids else "abc"
    assert logprobs == WrittenLogprobs(
        text_offset=[0, len(a), len(a + b)],
        token_logprobs=[None, -0.5, -0.5],
        tokens=[a, b, c],
        top_logprobs=[None, {b: -0.5, c: -1.0}, {c: -0.5}],
    )


@given(st.text(max_size=20), st.text(max_size=20))
@example("x日本", "日本€")
def test_an_echo_adds_up_with_what_follows(prompt: str, completion: str) -> None:
    prompt, completion = "p" + prompt.replace("\ufffd", ""), completion.replace("\ufffd", "")
    tokenizer = byte_level()
    echo = writer(tokenizer)
    prompt_ids, token_ids = tokenizer.encode(prompt).ids, tokenizer.encode(completion).ids
    logprobs = echo.prompt(prompt_ids, [None, *map(position, prompt_ids[1:])])
    logprobs.extend(echo.generated(token_ids, list(map(position, token_ids))))
    assert_adds_up(logprobs, prompt + completion)


def test_what_is_generated_does_not_complete_a_character_of_the_prompt() -> None:
    """As in vLLM, which does not look back into the prompt."""
    echo = writer(byte_level())
    first, second = byte_ids("é".encode())
    logprobs = echo.prompt([A, first], [None, position(first)])
    logprobs.extend(echo.generated([second, B], [position(second), position(B)]))
    assert logprobs.tokens == ["a", "", "", "b"]


def test_a_character_that_begins_an_echo_in_parts_is_told_as_in_vllm() -> None:
    first, second = byte_ids("é".encode())
    logprobs = writer(byte_level()).prompt([first, second, A], [None, position(second), position(A)])
    assert logprobs.tokens == ["\ufffd", "", "a"]


# --- in pieces -----------------------------------------------------------------------------------------------------


@st.composite
def positions(draw: st.DrawFn, tokenizer: Tokenizer, max_size: int = 12) -> list[PositionLogprobs]:
    """Any tokens, among them bytes that make no character, with likelier ones beside them."""
    token = st.integers(0, tokenizer.get_vocab_size() - 1)
    pieces = token.map(lambda token_id: [token_id])
    if tokenizer is byte_level():
        pieces |= st.sampled_from(["é", "€", "日本", "👍"]).map(lambda text: byte_ids(text.encode()))
    token_ids = [token_id for piece in draw(st.lists(pieces, max_size=max_size)) for token_id in piece]
    logprob = st.floats(-20_000, 0) | st.just(-math.inf)
    told: list[PositionLogprobs] = []
    for token_id in token_ids:
        others = [other for other in draw(st.lists(token, max_size=3, unique=True)) if other != token_id]
        logprobs = draw(st.lists(logprob, min_size=1 + len(others), max_size=1 + len(others)))
        told.append(PositionLogprobs((token_id, *others), tuple(logprobs), tuple(range(1, 2 + len(others)))))
    return told


def chosen(told: Sequence[PositionLogprobs]) -> list[int]:
    return [position.token_ids[0] for position in told]


@given(
    positions(byte_level()),
    positions(byte_level()),
    st.lists(st.integers(0, 24), max_size=5),
    st.none() | st.integers(0, 3),
    st.booleans(),
)
def test_pieces_make_the_same_as_the_whole(
    prompt: list[PositionLogprobs],
    generated: list[PositionLogprobs],
    cuts: list[int],
    top: int | None,
    as_token_ids: bool,
) -> None:
    prompt_ids, token_ids = [A, *chosen(prompt)], chosen(generated)

    def in_pieces(cuts: Sequence[int]) -> WrittenLogprobs:
        one = writer(byte_level(), top=top, as_token_ids=as_token_ids)
        logprobs = one.prompt(prompt_ids, [None, *prompt])
        ends = [*sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
        for begin, end in zip([0, *ends], ends, strict=False):
            logprobs.extend(one.generated(token_ids[begin:end], generated[begin:end]))
        return logprobs

    whole = in_pieces([])
    assert in_pieces(cuts) == whole
    assert in_pieces(range(len(token_ids))) == whole
    assert {len(whole.tokens), len(whole.text_offset), len(whole.token_logprobs), len(whole.top_logprobs)} == {
        len(prompt_ids) + len(token_ids)
    }


def test_a_writer_of_one_choice_knows_nothing_of_another() -> None:
    texts = TokenTexts(byte_level())
    first, second = byte_ids("é".encode())
    one, other = (LogprobsWriter(texts, top=0, as_token_ids=False) for _ in range(2))
    one.generated([A, first], [position(A), position(first)])
    assert other.generated([second], [position(second)]).tokens == [""]
    assert one.generated([second], [position(second)]) == WrittenLogprobs([1], [-0.5], ["é"], [{"é": -0.5}])


# --- prompt_logprobs -----------------------------------------------------------------------------------------------


def test_prompt_logprobs_are_told_by_token_id() -> None:
    first, second = byte_ids("é".encode())
    fields = prompt_logprobs_fields(
        TokenTexts(byte_level()),
        [None, UNLIKELY, position(first), PositionLogprobs((second, A), (-3.0, -0.25), (7, 1))],
    )
    assert list(fields) == [
        None,
        {
            str(D): {"logprob": -9.0, "rank": 20, "decoded_token": "d"},
            str(A): {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
            str(B): {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
            str(C): {"logprob": -1.5, "rank": 3, "decoded_token": "c"},
        },
        {str(first): {"logprob": -0.5, "rank": 1, "decoded_token": ""}},
        {
            str(second): {"logprob": -3.0, "rank": 7, "decoded_token": "é"},
            str(A): {"logprob": -0.25, "rank": 1, "decoded_token": "a"},
        },
    ]


# --- vLLM itself ---------------------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_all_is_told_as_by_vllm_itself(smollm2_tokenizer: Tokenizer) -> None:
    np = pytest.importorskip("numpy")
    processing = pytest.importorskip("vllm.v1.engine.logprobs")
    serving = pytest.importorskip("vllm.entrypoints.openai.completion.serving").OpenAIServingCompletion
    transformers = pytest.importorskip("transformers")
    server = SimpleNamespace(return_tokens_as_token_ids=False, _get_decoded_token=serving._get_decoded_token)

    def theirs(
        tokenizer: Any,
        first: int,
        prompt: list[PositionLogprobs],
        generated: list[PositionLogprobs],
        top: int,
        as_token_ids: bool,
    ) -> tuple[Any, list[PositionLogprobs | None], list[PositionLogprobs]]:
        """vLLM's answer, and the positions as its engine delivers them."""
        processor = processing.LogprobsProcessor(tokenizer, [], [None], 0.0, 3, 3)
        for told in prompt:
            rows = (np.array([told.token_ids]), np.array([told.logprobs]), np.array(told.ranks[:1]))
            processor._update_prompt_logprobs(rows)
        for told in generated:
            row = ([np.array(told.ranks[0])], [np.array(told.logprobs)], [np.array(told.token_ids)])
            processor._update_sample_logprobs((row[2], row[1], row[0], None))
        answer = serving._create_completion_logprobs(
            server,
            [first, *chosen(prompt), *chosen(generated)],
            [*processor.prompt_logprobs, *processor.logprobs],
            top,
            tokenizer,
            return_as_token_id=as_token_ids,
        )

        def delivered(likely: Any) -> PositionLogprobs:
            told = likely.values()
            return PositionLogprobs(
                tuple(likely), tuple([each.logprob for each in told]), tuple([each.rank for each in told])
            )

        return (
            answer,
            [likely and delivered(likely) for likely in processor.prompt_logprobs],
            [delivered(likely) for likely in processor.logprobs],
        )

    tokenizers = [byte_level(), metaspace(), metaspace(strips=False), smollm2_tokenizer]
    wrapped = [
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
        for tokenizer in tokenizers
    ]

    @given(st.data(), st.integers(0, 3), st.integers(0, 3), st.booleans())
    def check(data: st.DataObject, number: int, top: int, as_token_ids: bool) -> None:
        tokenizer = tokenizers[number]
        prompt, generated = data.draw(positions(tokenizer)), data.draw(positions(tokenizer))
        first = data.draw(st.integers(0, tokenizer.get_vocab_size() - 1))
        answer, of_prompt, of_generated = theirs(wrapped[number], first, prompt, generated, top, as_token_ids)
        ours = writer(tokenizer, top=top, as_token_ids=as_token_ids)
        logprobs = ours.prompt([first, *chosen(prompt)], of_prompt)
        logprobs.extend(ours.generated(chosen(generated), of_generated))
        assert logprobs.tokens == answer.tokens
        assert logprobs.token_logprobs == answer.token_logprobs
        every = [*of_prompt, *of_generated]
        for our, their, position in zip(logprobs.top_logprobs, answer.top_logprobs, every, strict=True):
            if our is None or their is None or len(our) == len(their):
                assert our == their
                continue
            assert position is not None  # vLLM lost those that read like the last of them
            assert list(our.values()) == [max(logprob, -9999.0) for logprob in position.logprobs[: top + 1]]
            assert {name for name in our if not name.startswith(("bytes:", "token_id:"))} <= their.keys()
        assert logprobs.text_offset == answer.text_offset

    check()
