from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.decoders import DecodeStream

from deployments.ingress.inference.detokenizer import Detokenizer
from tests.deployments.ingress.byte_level import byte_alphabet, byte_level_tokenizer

EMOJI = "👩‍🚀"
EURO = "€".encode()


@cache
def byte_level() -> Tokenizer:
    """One token per byte, some of several (two of them with parts of characters), one special token."""
    visible = byte_alphabet()
    several = [b"he", b" w", "日".encode(), EURO[:2], EURO[2:] + EURO[:2]]
    names = ["".join(visible[byte] for byte in data) for data in several]
    vocabulary = ["<|end|>", *visible.values(), *names]
    return byte_level_tokenizer({token: i for i, token in enumerate(vocabulary)}, [("h", "e"), ("Ġ", "w")])


@cache
def byte_fallback() -> Tokenizer:
    """Llama's kind: `▁` for a space, `<0xE2>` for bytes out of vocabulary, a leading space stripped."""
    words = ["▁", "▁hello", "hello", "▁world", "a", "b", "€", "!"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    model = models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    words = ["<s>", "▁", "▁hello", "▁world", "lo", "!", "日"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


@cache
def spaced() -> Tokenizer:
    """Puts a space between any two tokens; of its added tokens one is special and one is not."""
    words = {"<unk>": 0, "hello": 1, "world": 2, "!": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|a|>"])
    tokenizer.add_tokens(["<b>"])
    return tokenizer


def ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    names = byte_alphabet() if tokenizer is byte_level() else {byte: f"<0x{byte:02X}>" for byte in range(256)}
    return ids(tokenizer, *[names[byte] for byte in data])


def deltas(tokenizer: Tokenizer, tokens: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.push([token]) for token in tokens]


def text_of(tokenizer: Tokenizer, tokens: Sequence[int], prompt: Sequence[int] = ()) -> str:
    return "".join(deltas(tokenizer, tokens, prompt))


def vllm_text(
    tokenizer: Tokenizer, tokens: Sequence[int], prompt: Sequence[int], *, skip: bool = True, spaces: bool = True
) -> str:
    """vLLM 0.32's FastIncrementalDetokenizer in short."""
    stream = DecodeStream(ids=list(prompt), skip_special_tokens=skip)
    added = {} if skip or spaces else tokenizer.get_added_tokens_decoder()
    last_added = False
    text = ""
    for token in tokens:
        try:
            piece = stream.step(tokenizer, token) or ""
        except Exception:  # "Invalid prefix encountered"
            stream = DecodeStream(skip_special_tokens=skip)
            piece = stream.step(tokenizer, token) or ""
        text += added[token].content if last_added and token in added else piece
        last_added = token in added
    return text


def token_lists(tokenizer: Tokenizer, max_size: int = 40) -> st.SearchStrategy[list[int]]:
    """Any ids, and runs of bytes, which valid and nearly valid characters come from."""
    multibyte = st.sampled_from(["é", "€", "日", "👍", EMOJI]).map(lambda c: byte_ids(tokenizer, c.encode()))
    broken = st.sampled_from([b"\xff", b"\xe2\x82", b"\x80", b"\xf0\x9f\x98"]).map(
        lambda data: byte_ids(tokenizer, data)
    )
    any_token = st.integers(0, tokenizer.get_vocab_size() - 1).map(lambda token: [token])
    pieces = st.lists(multibyte | broken | any_token, max_size=max_size // 4)
    return pieces.map(lambda lists: [token for tokens in lists for token in tokens][:max_size])


@given(st.data(), st.sampled_from([byte_level(), byte_fallback()]))
def test_the_text_is_that_of_vllm(data: st.DataObject, tokenizer: Tokenizer) -> None:
    end_of_prompt = data.draw(st.sampled_from(["hello", "!", "a"]))
    prompt = [*data.draw(token_lists(tokenizer)), *tokenizer.encode(end_of_prompt).ids]
    tokens = data.draw(token_lists(tokenizer, max_size=31))
    skip = data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    assert detokenizer.push(tokens) == vllm_text(tokenizer, tokens, prompt, skip=skip)


@given(st.data(), st.sampled_from([byte_level(), byte_fallback()]))
def test_batches_do_not_change_the_text(data: st.DataObject, tokenizer: Tokenizer) -> None:
    prompt = data.draw(token_lists(tokenizer))
    tokens = data.draw(token_lists(tokenizer, max_size=100))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=8)))
    detokenizer = Detokenizer(tokenizer, prompt)
    batches = [tokens[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
    assert "".join(map(detokenizer.push, batches)) == text_of(tokenizer, tokens, prompt)


@given(st.text(max_size=40).filter(lambda text: "\ufffd" not in text), st.sampled_from(["", "hello"]))
def test_any_text_comes_back_in_whole_characters(text: str, prompt: str) -> None:
    tokenizer = byte_level()
    tokens = byte_ids(tokenizer, text.encode())
    pushed = deltas(tokenizer, tokens, tokenizer.encode(prompt).ids)
    assert "".join(pushed) == text
    assert "\ufffd" not in "".join(pushed)
    ends = {len(text[:n].encode()) for n in range(1, len(text) + 1)}
    assert [delta != "" for delta in pushed] == [n in ends for n in range(1, len(tokens) + 1)]


@given(st.text(alphabet="ab! é€日👍", max_size=40))
def test_any_text_comes_back_from_a_byte_fallback_tokenizer(text: str) -> None:
    tokenizer = byte_fallback()
    assert text_of(tokenizer, tokenizer.encode(text).ids, ids(tokenizer, "<s>")) == text


@pytest.mark.parametrize("tokenizer", [byte_fallback(), metaspace()])
def test_the_space_between_prompt_and_completion_is_kept(tokenizer: Tokenizer) -> None:
    tokens = ids(tokenizer, "▁world", "▁hello")
    assert text_of(tokenizer, tokens, ids(tokenizer, "<s>", "▁hello")) == " world hello"
    assert text_of(tokenizer, tokens, ids(tokenizer, "▁hello", *["<s>"] * 100)) == " world hello"
    assert text_of(tokenizer, tokens, ids(tokenizer, "<s>")) == "world hello"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = byte_level()
    tokens = [*tokenizer.encode("he").ids, *ids(tokenizer, "<|end|>"), *tokenizer.encode("!").ids]
    assert Detokenizer(tokenizer, []).push(tokens) == "he!"
    assert Detokenizer(tokenizer, [], skip_special_tokens=False).push(tokens) == "he<|end|>!"


def test_spaces_between_added_tokens_are_left_out_where_asked() -> None:
    tokenizer = spaced()
    tokens = ids(tokenizer, "hello", "<|a|>", "<b>", "<|a|>", "world", "<b>")

    def text(**options: bool) -> str:
        return Detokenizer(tokenizer, ids(tokenizer, "!"), **options).push(tokens)

    assert text(skip_special_tokens=False) == " hello <|a|> <b> <|a|> world <b>"
    assert text(skip_special_tokens=False, spaces_between_special_tokens=False) == " hello <|a|><b><|a|> world <b>"
    skipped = " hello <b> world <b>"
    assert text(spaces_between_special_tokens=False) == text(spaces_between_special_tokens=True) == skipped


def test_an_added_token_at_the_end_of_the_prompt_does_not_take_the_space_of_the_first_one_generated() -> None:
    """As in vLLM, which does not look back."""
    tokenizer = spaced()
    tokens = ids(tokenizer, "<b>", "<b>")
    options = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    assert Detokenizer(tokenizer, ids(tokenizer, "!", "<|a|>"), **options).push(tokens) == " <b><b>"


@given(st.data(), st.sampled_from([spaced(), metaspace(), byte_level(), byte_fallback()]), st.booleans(), st.booleans())
def test_spaces_between_special_tokens_are_those_of_vllm(
    data: st.DataObject, tokenizer: Tokenizer, skip: bool, spaces: bool
) -> None:
    added = st.sampled_from(sorted(tokenizer.get_added_tokens_decoder()))
    tokens = data.draw(st.lists(added | st.integers(0, tokenizer.get_vocab_size() - 1), max_size=31))
    cut = data.draw(st.integers(0, len(tokens)))
    prompt = tokenizer.encode("!").ids
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip, spaces_between_special_tokens=spaces)
    text = detokenizer.push(tokens[:cut]) + detokenizer.push(tokens[cut:])
    assert text == vllm_text(tokenizer, tokens, prompt, skip=skip, spaces=spaces)


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()])
def test_an_incomplete_character_at_the_end_is_not_text(tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode("a").ids, *byte_ids(tokenizer, EURO[:2])]
    assert text_of(tokenizer, tokens, tokenizer.encode("!").ids).strip() == "a"


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()])
@pytest.mark.parametrize("prompt_ending", ["🚀".encode()[:2], b"\xff", "\ufffd".encode()])
def test_a_prompt_that_ends_in_no_character_is_not_repeated(tokenizer: Tokenizer, prompt_ending: bytes) -> None:
    prompt = [*tokenizer.encode("hello").ids, *byte_ids(tokenizer, prompt_ending)]
    assert text_of(tokenizer, ids(tokenizer, "a", "b"), prompt) == "ab"


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()])
def test_a_character_begun_in_the_prompt_is_completed(tokenizer: Tokenizer) -> None:
    rocket = byte_ids(tokenizer, "🚀".encode())
    prompt = tokenizer.encode("hello").ids
    assert text_of(tokenizer, [*rocket[2:], *ids(tokenizer, "b")], [*prompt, *rocket[:2]]) == "🚀b"


def test_a_long_run_of_bytes_before_the_completion_is_read_from_its_start() -> None:
    tokenizer = byte_fallback()
    prompt = [*ids(tokenizer, "hello"), *byte_ids(tokenizer, ("日" * 20).encode())]
    assert text_of(tokenizer, byte_ids(tokenizer, "日".encode()), prompt) == "日"


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()])
def test_invalid_bytes_are_not_held_back_for_ever(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("hello").ids
    invalid = byte_ids(tokenizer, b"\xff" * 1000)
    pushed = deltas(tokenizer, [*invalid, *ids(tokenizer, "a")], prompt)
    assert "".join(pushed) == "\ufffd" * 1000 + "a"
    assert all("".join(pushed[i : i + 32]) for i in range(0, 1000, 32))


def test_invalid_bytes_after_a_character_of_bytes_are_not_held_back_for_ever() -> None:
    tokenizer = byte_fallback()
    tokens = byte_ids(tokenizer, EURO + b"\xff" * 100)
    text = text_of(tokenizer, tokens, ids(tokenizer, "a"))
    assert text == "€" + "\ufffd" * (len(text) - 1)
    assert 100 - 32 < len(text) <= 100


@given(st.integers(0, 40), st.sampled_from(["é", "€", "👍"]))
@example(29, "👍")
def test_a_character_after_invalid_bytes_is_whole(invalid: int, character: str) -> None:
    tokenizer = byte_level()
    tokens = byte_ids(tokenizer, b"\xff" * invalid + character.encode())
    assert text_of(tokenizer, tokens, tokenizer.encode("hello").ids) == "\ufffd" * invalid + character


def test_tokens_that_straddle_characters_do_not_stall_the_stream() -> None:
    tokenizer = byte_level()
    euro = "".join(byte_alphabet()[byte] for byte in EURO)
    first, straddling, last = ids(tokenizer, euro[:2], euro[2] + euro[:2], euro[2])
    assert text_of(tokenizer, [first, *[straddling] * 20, last]) == "€" * 21
    assert len(text_of(tokenizer, [first, *[straddling] * 200])) > 200 - 32


def test_skipped_tokens_without_end_keep_the_space_that_follows() -> None:
    tokenizer = byte_fallback()
    tokens = ids(tokenizer, *["</s>"] * 100, "▁world")
    assert text_of(tokenizer, tokens, ids(tokenizer, "<s>", "▁hello")) == " world"


def test_a_long_prompt_is_not_read_whole() -> None:
    tokenizer = byte_level()
    tail = tokenizer.encode("a" * 8).ids

    class Prompt(list[int]):
        def __iter__(self) -> object:  # type: ignore[override]
            raise AssertionError

    assert text_of(tokenizer, tail, Prompt(tail * 10_000)) == "a" * 8


def test_smollm2_gives_vllms_text(smollm2_tokenizer: Tokenizer) -> None:
    text = f"Zwölf Boxkämpfer, 日本語のテキスト, {EMOJI} 🇩🇪 and naïve café\n\tdef f(x): return x"
    tokens = smollm2_tokenizer.encode(text).ids
    prompt = smollm2_tokenizer.encode("<|im_start|>user\nHello").ids
    assert text_of(smollm2_tokenizer, tokens, prompt) == vllm_text(smollm2_tokenizer, tokens, prompt) == text

    @given(st.lists(st.integers(0, smollm2_tokenizer.get_vocab_size() - 1), max_size=100), st.booleans())
    def check(tokens: list[int], skip: bool) -> None:
        detokenizer = Detokenizer(smollm2_tokenizer, prompt, skip_special_tokens=skip)
        assert detokenizer.push(tokens) == vllm_text(smollm2_tokenizer, tokens, prompt, skip=skip)

    check()


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_smollm2_gives_the_text_of_vllm_itself(smollm2_tokenizer: Tokenizer) -> None:
    vllm = pytest.importorskip("vllm")
    engine = pytest.importorskip("vllm.v1.engine.detokenizer")

    @given(st.data(), st.sampled_from([smollm2_tokenizer, spaced()]), st.booleans(), st.booleans())
    def check(data: st.DataObject, tokenizer: Tokenizer, skip: bool, spaces: bool) -> None:
        tokens = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=100))
        prompt = tokenizer.encode("hello world!").ids
        params = vllm.SamplingParams(skip_special_tokens=skip, spaces_between_special_tokens=spaces)
        request = SimpleNamespace(request_id="r", prompt_token_ids=prompt, sampling_params=params)
        theirs = engine.FastIncrementalDetokenizer(SimpleNamespace(_tokenizer=tokenizer), request)
        theirs.update(tokens, False)
        ours = Detokenizer(tokenizer, prompt, skip_special_tokens=skip, spaces_between_special_tokens=spaces)
        assert ours.push(tokens) == theirs.get_next_output_text(True, False)

    check()
