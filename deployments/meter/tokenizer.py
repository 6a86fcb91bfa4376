"""The tokenizer of one model: prompts in, token ids out, without holding up the event loop that all ingresses share.

Measured with tokenizers 0.23 and SmolLM2 (49,152 tokens), a text of 100,000 tokens:
- `encode` keeps the GIL for its whole 200 ms. `encode_batch_fast` releases it, takes 120 ms because it tracks
  no offsets, and holds the GIL for 2 ms only, while `.ids` becomes a list.
- `encode_batch_fast` of one text stays in the calling thread. Several texts at once go through one thread pool of
  the whole process, where a short text would wait for long ones; so each is encoded by a call of its own.
- Building a tokenizer holds the GIL for 135 ms, from which no thread saves us: once per model.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from deployments.meter.errors import TokenizerUnavailable, TokenOutOfVocabulary
from deployments.meter.worker_threads import WorkerThreads

__all__ = ["INLINE_SIZE", "PromptTokenizer"]

INLINE_SIZE: Final = 2048
"""Characters and token ids of a request that are encoded on the event loop itself: well under a millisecond
on most machines. More goes to a thread, whose hop costs about 0.15 ms and lets another core do the work."""


class PromptTokenizer:
    """Encodes prompts as `folder/tokenizer.json` says, special tokens added by default as in vLLM's completions server.

    The file is read at the first use and kept; a changed file needs a new PromptTokenizer. A failed reading
    is not kept: the next use tries again.
    """

    def __init__(self, folder: Path, threads: WorkerThreads) -> None:
        self.folder = folder
        self._threads = threads
        self._loading = asyncio.Lock()
        self._loaded: _LoadedTokenizer | None = None

    async def encode(self, prompts: list[str | list[int]], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each prompt; a prompt that is token ids already is checked and returned as it is.

        Raises TokenOutOfVocabulary, TokenizerUnavailable, and MeterBusy when too many long prompts wait.
        """
        loaded = self._loaded or await self._load()
        if sum(map(len, prompts)) <= INLINE_SIZE:
            return loaded.encode(prompts, add_special_tokens)
        return await self._threads.run(partial(loaded.encode, prompts, add_special_tokens))

    async def _load(self) -> _LoadedTokenizer:
        async with self._loading:
            if self._loaded is None:
                self._loaded = await self._threads.run(partial(_LoadedTokenizer, self.folder))
            return self._loaded


class _LoadedTokenizer:
    """The synchronous part, which runs in any thread."""

    def __init__(self, folder: Path) -> None:
        try:
            # Not from_file: reading the disk, unlike parsing, need not hold the GIL.
            self._tokenizer = Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
        except Exception as error:  # the library raises plain Exception on a file that it does not understand
            raise TokenizerUnavailable(folder, str(error)) from error
        # Left in the file by training; transformers, and so vLLM, sets both per call.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Added tokens may lie beyond a gap after the base vocabulary, where counting falls short of the last
        # id.
        last_added: int = max(self._tokenizer.get_added_tokens_decoder(), default=-1)
        self._vocabulary_size = max(self._tokenizer.get_vocab_size(with_added_tokens=True), last_added + 1)

    def encode(self, prompts: list[str | list[int]], add_special_tokens: bool) -> list[list[int]]:
        return [self._encode_one(prompt, add_special_tokens) for prompt in prompts]

    def _encode_one(self, prompt: str | list[int], add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer.encode_batch_fast([prompt], add_special_tokens=add_special_tokens)[0].ids
            return ids
        if prompt:
            for extreme in (min(prompt), max(prompt)):
                if not 0 <= extreme < self._vocabulary_size:
                    raise TokenOutOfVocabulary(extreme, self._vocabulary_size)
        return prompt
