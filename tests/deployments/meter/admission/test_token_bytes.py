"""How much text a token can stand for: never more than is said, and nothing is said where it is not known."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from deployments.meter.admission.token_bytes import _SHRINKS_AT_MOST, TokenBytes, token_bytes
from tests.deployments.meter.tiny_tokenizer import save_tiny_tokenizer


def of(tokenizer: Tokenizer) -> TokenBytes | None:
    return token_bytes(tokenizer.to_str().encode())


@pytest.fixture
def tiny(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(save_tiny_tokenizer(tmp_path) / "tokenizer.json"))


def fallback(**changes: object) -> Tokenizer:
    """As Llama 2 has it."""
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokens = ["▁", "m", "i", "l", "mi", "ll", "mill", "▁mill"]
    vocabulary = bytes_ | {token: 256 + number for number, token in enumerate(tokens)}
    merges = [("m", "i"), ("l", "l"), ("mi", "ll"), ("▁", "mill")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, **changes))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


_TEXTS = st.lists(st.sampled_from(["mill", " mill", " the", "e\u0301", "🌊", "\x00", " ", "K", "ΐ"]), max_size=60).map(
    "".join
)


@given(st.text(max_size=60) | _TEXTS)
def test_a_text_makes_no_fewer_tokens_than_its_bytes_say(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "tiny"
    if not folder.exists():
        save_tiny_tokenizer(folder)
    for tokenizer in (Tokenizer.from_file(str(folder / "tokenizer.json")), fallback()):
        for normalizer in (None, normalizers.NFC(), normalizers.NFD()):
            if normalizer is not None:
                tokenizer.normalizer = normalizer
            most = of(tokenizer)
            assert most is not None
            assert len(tokenizer.encode(text).ids) >= most.fewest_tokens(text)


def test_the_longest_token_decides(tiny: Tokenizer) -> None:
    longest = max(len(token) for token in tiny.get_vocab())
    assert of(tiny) == TokenBytes(longest)
    tiny.add_tokens(["a token of thirty-two characters"])
    assert of(tiny) == TokenBytes(32)


@given(st.text("mil\x04\x13\U00040000 é", max_size=60))
def test_bytes_that_the_vocabulary_does_not_have_count_for_nothing(text: str) -> None:
    letters = [character for character in pre_tokenizers.ByteLevel.alphabet() if character not in "ĄēñĊ"]
    vocabulary = {token: number for number, token in enumerate([*sorted(letters), "mi", "ll", "mill"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("m", "i"), ("l", "l"), ("mi", "ll")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizer.encode("\x04" * 100).ids == []
    known = of(tokenizer)
    assert known == TokenBytes(4, b"\x04\x0a\x13\xf1")
    assert len(tokenizer.encode(text).ids) >= known.fewest_tokens(text)
    tokenizer.normalizer = normalizers.NFC()
    assert of(tokenizer) is None


def test_a_normalizer_that_composes_is_allowed_for(tiny: Tokenizer) -> None:
    plain = of(tiny)
    assert plain is not None
    tiny.normalizer = normalizers.NFC()
    assert of(tiny) == TokenBytes(9 * plain.most)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_no_character_shrinks_more_than_is_allowed_for(form: str) -> None:
    for code in range(sys.maxunicode + 1):
        if not 0xD800 <= code < 0xE000:
            character = chr(code)
            assert len(character.encode()) <= 3 * len(unicodedata.normalize("NFC", character).encode())
            full = len(unicodedata.normalize("NFD", character).encode())
            assert len(character.encode()) <= _SHRINKS_AT_MOST["NFD"] * full
            assert 3 * full <= _SHRINKS_AT_MOST["NFC"] * len(character.encode())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Strip()),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Replace(Regex(" +"), " ")),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Replace("   ", " ")),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.BertNormalizer()),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda tokenizer: setattr(
            tokenizer,
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]),
        ),
        lambda tokenizer: tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)]),
    ],
)
def test_nothing_is_said_of_a_tokenizer_that_may_drop_text(tiny: Tokenizer, spoil: object) -> None:
    assert callable(spoil)
    spoil(tiny)
    assert of(tiny) is None


def test_nothing_is_said_of_models_that_have_one_token_for_anything_unknown() -> None:
    assert of(Tokenizer(models.WordLevel({"mill": 0, "?": 1}, unk_token="?"))) is None
    assert of(Tokenizer(models.Unigram([("mill", 0.0)]))) is None
    assert of(Tokenizer(models.BPE({"m": 0}, []))) is None
    assert token_bytes(b"no json") is None
    assert token_bytes(b'{"model": 5}') is None
