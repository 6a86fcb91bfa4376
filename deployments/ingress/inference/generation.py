"""One candidate of one prompt on its way through the replicas, and the mailbox its request reads.

A generation outlives the replica it runs on: it keeps every token that arrived, so that it can go on elsewhere from
prompt + tokens. A token counts when it arrives here, once, whichever replica made it.
"""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple, Protocol

import msgspec

from deployments.contracts import Account, PositionLogprobs, Sampling, Sibling, Submission, TokenDelta
from deployments.ingress.errors import ApiError
from deployments.ingress.inference.write_scheduler import WriteScheduler

__all__ = ["DeltaQueue", "Generation", "GenerationEvent", "GenerationStream", "Placement"]


class GenerationEvent(NamedTuple):
    """What a generation gained, or the error with which it ended."""

    candidate: int
    delta: TokenDelta | None
    error: ApiError | None = None


class GenerationStream(Protocol):
    """The step stream of a replica, as what runs there knows it."""

    replica_id: str

    def abort(self, numbers: list[int]) -> None: ...

    def release(self, request_id: str) -> None: ...


class Placement(NamedTuple):
    """Where a generation runs."""

    stream: GenerationStream
    number: int
    """Its name on the stream."""


class DeltaQueue:
    """Where all generations of one request deliver; its reader wakes once a round for everything that came before.

    Bounded by the tokens the request may generate.
    """

    def __init__(self, writes: WriteScheduler) -> None:
        self._writes = writes
        self._news: list[GenerationEvent] = []
        self._arrived = asyncio.Event()

    def put(self, news: GenerationEvent) -> None:
        if not self._news:
            self._writes.join(self._arrived.set)
        self._news.append(news)

    def wake(self) -> None:
        """Make `take` return now, with nothing if nothing has arrived."""
        self._arrived.set()

    async def take(self) -> list[GenerationEvent]:
        """Everything since the last call in order of arrival; empty only around a `wake`."""
        await self._arrived.wait()
        self._arrived.clear()
        news, self._news = self._news, []
        return news


class Generation:
    """The state that survives a replica. Those of one request have the same sampling, but for its seed."""

    def __init__(
        self, account: Account, meter: str, candidate: int, prompt: list[int], sampling: Sampling, mailbox: DeltaQueue
    ) -> None:
        """`meter` is Serve's name of the meter that accounts for it."""
        self.account = account
        self.meter = meter
        self.candidate = candidate
        """Its number in the request, over all prompts."""
        self.prompt = prompt
        self.sampling = sampling
        self.tokens: list[int] = []
        """Generated so far, over all replicas."""
        self.cached_tokens = 0
        """Prompt tokens that the first replica found in its prefix cache."""
        self.resumes = 0
        self.ended = False
        self.accepted_at: float | None = None
        """When the first replica took it on, by `time.perf_counter`."""
        self.placement: Placement | None = None
        self.refused_by: set[GenerationStream] = set()
        """Replicas whose queues had no room for it."""
        self._deltas = mailbox
        self._tokens_placed = 0
        self._prompt_logprobs: list[PositionLogprobs | None] = []
        """Parts of them, before the first delta with tokens."""

    @property
    def proven(self) -> bool:
        """The replica that it is on has given a token of it: its first step there is over."""
        return len(self.tokens) > self._tokens_placed

    @property
    def resumable(self) -> bool:
        """Another replica can go on without contradicting what is there already. A grammar would begin anew inside
        the answer."""
        return not self.tokens or self.sampling.grammar is None

    def placed(self, placement: Placement) -> None:
        """It is about to be submitted there."""
        self.placement = placement
        self._tokens_placed = len(self.tokens)

    def submission(self, number: int, siblings: tuple[Sibling, ...] = ()) -> Submission:
        """To go on from where the tokens end, as generation `number` of a step stream, together with `siblings`:
        further choices of its prompt that have no tokens yet either."""
        sampling = self.sampling
        if self.tokens:
            # Exact in distribution and for greedy text; seeds, penalties and grammars depend on state that is lost.
            sampling = msgspec.structs.replace(
                sampling,
                max_tokens=sampling.max_tokens - len(self.tokens),
                min_tokens=max(0, sampling.min_tokens - len(self.tokens)),
                prompt_logprobs=None,  # told already, with the first token
            )
        return Submission(
            generation=number,
            token_ids=self.prompt + self.tokens,
            sampling=sampling,
            account=self.account,
            meter=self.meter,
            choice=self.candidate,
            resumed=self.resumes > 0,
            resumed_tokens=len(self.tokens),
            siblings=siblings,
        )

    @property
    def request_id(self) -> str:
        return self.account.request_id

    def accepted(self) -> None:
        """A replica has taken it on."""
        if self.accepted_at is None:
            self.accepted_at = time.perf_counter()

    def deliver(self, delta: TokenDelta) -> None:
        if delta.prompt_logprobs and not delta.token_ids and delta.finish_reason is None:
            self._prompt_logprobs += delta.prompt_logprobs
            return
        if self._prompt_logprobs:
            whole = self._prompt_logprobs + (delta.prompt_logprobs or [])
            delta, self._prompt_logprobs = msgspec.structs.replace(delta, prompt_logprobs=whole), []
        if not self.tokens and not self.resumes:
            self.cached_tokens = delta.cached_tokens
        if delta.token_ids:
            self.tokens += delta.token_ids
        if delta.finish_reason is not None:
            self.ended = True
        self._deltas.put(GenerationEvent(self.candidate, delta))

    def refused(self, stream: GenerationStream) -> None:
        """The replica has no room; the generation is about to be placed on another."""
        self.placement = None
        self.refused_by.add(stream)

    def lost(self) -> None:
        """The replica is gone; the generation is about to be placed on another."""
        self.placement = None
        self.refused_by.clear()
        self._prompt_logprobs = []
        self.resumes += 1

    def fail(self, error: ApiError) -> None:
        if not self.ended:
            self.ended = True
            self._deltas.put(GenerationEvent(self.candidate, None, error))
