"""The tokenizer of one model: prompts in, token ids out, without holding up the event loop that all ingresses share.

Measured with tokenizers 0.23 and SmolLM2 (49,152 tokens), a text of 100,000 tokens:
- `encode` keeps the GIL for its whole 200 ms. `encode_batch_fast` releases it, takes 120 ms because it tracks
  no offsets, and holds the GIL for 2 ms only, while `.ids` becomes a list. Of a text of 8 MiB that list takes 50 to
  100 ms; so it is made only of what fits, or is to be cut and not too long: the length is known without it.
- `encode_batch_fast` of one text stays in the calling thread. Several texts at once go through one thread pool of
  the whole process, where a short text would wait for long ones; so each is encoded by a call of its own.
- Building a tokenizer holds the GIL for 135 ms, from which no thread saves us: once per model.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Final, Literal, NamedTuple

from tokenizers import Tokenizer

from deployments.meter.admission.token_bytes import token_bytes
from deployments.meter.admission.tokenizer_lanes import TokenizerLanes
from deployments.meter.errors import PromptTooLong, TextTooLong, TokenizerUnavailable, TokenOutOfVocabulary

__all__ = ["INLINE_SIZE", "PromptTokenizer", "Truncation"]

INLINE_SIZE: Final = 2048
"""Characters and token ids of a request that are encoded on the event loop itself: well under a millisecond
on most machines. More goes to a thread, whose hop costs about 0.15 ms and lets another core do the work."""
_LIST_SIZE: Final = 2**19
"""Tokens of a text that become a list at most, to be cut: about 25 ms with the GIL. `Encoding.truncate` takes five
times as long, and holds it too."""


class Truncation(NamedTuple):
    keep: int
    """Tokens, >= 1."""
    side: Literal["left", "right"]
    """`left` keeps the last."""

    def cut(self, token_ids: list[int]) -> list[int]:
        return token_ids[: self.keep] if self.side == "right" else token_ids[-self.keep :]


class PromptTokenizer:
    """Encodes prompts as `folder/tokenizer.json` says, special tokens added by default as in vLLM's completions server.

    The file is read at the first use and kept; a changed file needs a new PromptTokenizer. A failed reading
    is not kept: the next use tries again.
    """

    def __init__(self, folder: Path, lanes: TokenizerLanes) -> None:
        self.folder = folder
        self._lanes = lanes
        self._loading = asyncio.Lock()
        self._loaded: _LoadedTokenizer | None = None

    async def encode(
        self,
        prompts: list[str | list[int]],
        *,
        add_special_tokens: bool = True,
        truncation: Truncation | None = None,
        at_most: int | None = None,
        owner: str = "",
    ) -> list[list[int]]:
        """Token ids of each prompt; a prompt that is token ids already is checked and cut as well.

        at_most: tokens of each text after truncation, unless that is None.
        owner: whose request it is; threads are shared fairly between owners.

        Raises PromptTooLong, TextTooLong, TokenOutOfVocabulary, TokenizerUnavailable, and MeterBusy (OwnerBusy among
        them) when too many long prompts wait.
        """
        loaded = self._loaded or await self._load()
        size = sum(map(len, prompts))
        if size <= INLINE_SIZE:
            return loaded.encode(prompts, add_special_tokens, truncation, at_most)
        if at_most is not None and truncation is None:
            loaded.check_lengths(prompts, at_most)
        encode = partial(loaded.encode, prompts, add_special_tokens, truncation, at_most)
        return await self._lanes.encode(encode, owner=owner, size=size)

    async def _load(self) -> _LoadedTokenizer:
        async with self._loading:
            if self._loaded is None:
                self._loaded = await self._lanes.load(partial(_LoadedTokenizer, self.folder))
            return self._loaded


class _LoadedTokenizer:
    """The synchronous part, which runs in any thread."""

    def __init__(self, folder: Path) -> None:
        try:
            # Not from_file: reading the disk, unlike parsing, need not hold the GIL.
            file = (folder / "tokenizer.json").read_bytes()
            self._tokenizer = Tokenizer.from_buffer(file)
        except Exception as error:  # the library raises plain Exception on a file that it does not understand
            raise TokenizerUnavailable(folder, str(error)) from error
        # Left in the file by training; transformers, and so vLLM, sets both per call.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Added tokens may lie beyond a gap after the base vocabulary, where counting falls short of the last
        # id.
        last_added: int = max(self._tokenizer.get_added_tokens_decoder(), default=-1)
        self._vocabulary_size = max(self._tokenizer.get_vocab_size(with_added_tokens=True), last_added + 1)
        self._token_bytes = token_bytes(file)

    def check_lengths(self, prompts: list[str | list[int]], at_most: int) -> None:
        """Raises PromptTooLong for a text that makes more tokens, whatever they are."""
        if self._token_bytes is None:
            return
        for prompt in prompts:
            # At most four bytes of UTF-8 are one character.
            if isinstance(prompt, str) and 4 * len(prompt) > at_most * self._token_bytes.most:
                fewest = self._token_bytes.fewest_tokens(prompt)
                if fewest > at_most:
                    raise PromptTooLong(fewest, False)

    def encode(
        self,
        prompts: list[str | list[int]],
        add_special_tokens: bool,
        truncation: Truncation | None,
        at_most: int | None,
    ) -> list[list[int]]:
        return [self._encode_one(prompt, add_special_tokens, truncation, at_most) for prompt in prompts]

    def _encode_one(
        self, prompt: str | list[int], add_special_tokens: bool, truncation: Truncation | None, at_most: int | None
    ) -> list[int]:
        if isinstance(prompt, str):
            encoding = self._tokenizer.encode_batch_fast([prompt], add_special_tokens=add_special_tokens)[0]
            if truncation is not None:
                if len(encoding) > _LIST_SIZE:
                    raise TextTooLong(len(encoding), _LIST_SIZE)
                return truncation.cut(encoding.ids)
            if at_most is not None and len(encoding) > at_most:
                raise PromptTooLong(len(encoding), True)
            ids: list[int] = encoding.ids
            return ids
        if truncation is not None:
            prompt = truncation.cut(prompt)
        if prompt:
            for extreme in (min(prompt), max(prompt)):
                if not 0 <= extreme < self._vocabulary_size:
                    raise TokenOutOfVocabulary(extreme, self._vocabulary_size)
        return prompt
