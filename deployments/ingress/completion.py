"""One completion request from admission to settlement, apart from HTTP.

The methods stand in the order in which they run. Whatever happens after `admit`, `settle` is called exactly once with
what the request used, by completion_response.py.
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal, NamedTuple
from uuid import uuid4

import structlog

from deployments.contracts import AdmissionRequest, KeyInfo, Settlement, SettlementStatus
from deployments.ingress.catalog import ServedModel
from deployments.ingress.completion_request import CompletionRequest
from deployments.ingress.errors import InternalError, InvalidRequest
from deployments.ingress.generation import Generation, Mailbox
from deployments.ingress.meter_client import MeterClient
from deployments.ingress.text_stream import TextStream
from deployments.ingress.wire import Usage

__all__ = ["ChoiceDelta", "ClientGone", "Completion"]

log = structlog.get_logger()


class ClientGone(Exception):
    """The client has closed the connection: there is nobody to answer."""


class ChoiceDelta(NamedTuple):
    choice: int
    text: str
    finish_reason: Literal["stop", "length"] | None


class Completion:
    def __init__(self, request: CompletionRequest, model: ServedModel, key: KeyInfo, meter: MeterClient) -> None:
        self.id = f"cmpl-{uuid4().hex}"
        """Ours, not the caller's: it is the primary key of the ledger."""
        self.created = int(time.time())
        self.request = request
        self.model = model
        self._key = key
        self._meter = meter
        self._started_at = time.time()
        self._clock = time.perf_counter()
        self._first_token_s: float | None = None
        self._mailbox = Mailbox()
        self._prompts: list[list[int]] = []
        self._generations: list[Generation] = []
        self._texts: list[TextStream] = []
        self._used: list[int] = []
        """Completion tokens that count, by choice."""
        self._ended: list[bool] = []
        self._gone = False

    async def admit(self) -> None:
        """Tokenize, check and reserve. Raises ApiError; nothing has to be settled then."""
        request = self.request
        for token_id in request.stop_token_ids or ():
            if self.model.tokenizer.id_to_token(token_id) is None:
                raise InvalidRequest(f"Token id {token_id} is out of vocabulary.", param="stop_token_ids")
        try:
            admitted = await self._meter.admit(
                AdmissionRequest(
                    request_id=self.id,
                    key_id=self._key.key_id,
                    model=request.model,
                    prompts=request.prompt,
                    max_tokens=request.max_completion_tokens,
                    choices=request.choices,
                )
            )
        except asyncio.CancelledError:  # the client is gone, and the meter may have reserved for it
            self.settle("cancelled")
            raise
        self._prompts = admitted.token_ids

    def start(self) -> None:
        """Hand every choice to the pool."""
        request = self.request
        for prompt in self._prompts:
            for number in range(request.choices):
                choice = len(self._generations)
                self._generations.append(Generation(self.id, choice, prompt, request.sampling(number), self._mailbox))
                self._texts.append(
                    TextStream(
                        self.model.tokenizer,
                        prompt,
                        stops=request.stop,
                        include_stop_in_output=bool(request.include_stop_str_in_output),
                        min_tokens=request.min_tokens or 0,
                        skip_special_tokens=request.skip_special_tokens is not False,
                    )
                )
        self._used = [0] * len(self._generations)
        self._ended = [False] * len(self._generations)
        self.model.pool.start(self._generations)

    @property
    def finished(self) -> bool:
        return all(self._ended)

    def client_gone(self) -> None:
        """Wakes `deltas`, which raises ClientGone."""
        self._gone = True
        self._mailbox.wake()

    def wake(self) -> None:
        """Makes `deltas` return, empty if need be, so that its caller can write a keep-alive."""
        self._mailbox.wake()

    async def deltas(self) -> list[ChoiceDelta]:
        """What the choices gained since the last call. Raises ClientGone, and ApiError when a choice has failed."""
        news = await self._mailbox.take()
        if self._gone:
            raise ClientGone
        deltas: list[ChoiceDelta] = []
        for choice, token_ids, finish_reason, error in news:
            if error is not None:
                raise error
            if finish_reason == "failed":
                raise InternalError
            if self._ended[choice]:
                continue  # tokens behind a stop string, on their way when the engine was told to stop
            if token_ids and self._first_token_s is None:
                self._first_token_s = time.perf_counter() - self._clock
            delta = self._texts[choice].push(token_ids, finish_reason)
            self._used[choice] += delta.tokens_used
            if delta.finished is not None:
                self._ended[choice] = True
                if finish_reason is None:  # a stop string: the engine knows nothing of it
                    self.model.pool.abort([self._generations[choice]])
            if delta.text or delta.finished is not None:
                deltas.append(ChoiceDelta(choice, delta.text, delta.finished))
        return deltas

    def usage(self) -> Usage:
        """So far."""
        return Usage(
            prompt_tokens=sum(map(len, self._prompts)),
            completion_tokens=sum(self._used),
            cached_tokens=sum(
                max(generation.cached_tokens for generation in self._generations[first : first + self.request.choices])
                for first in range(0, len(self._generations), self.request.choices)
            ),
        )

    def echo(self, choice: int) -> str:
        """The prompt of `choice` as text."""
        number = choice // self.request.choices
        prompt = self.request.prompt[number]
        if isinstance(prompt, str):
            return prompt
        text: str = self.model.tokenizer.decode(
            prompt, skip_special_tokens=self.request.skip_special_tokens is not False
        )
        return text

    def settle(self, status: SettlementStatus) -> None:
        """Free the engines and record what was used: for a choice cut short, every token that arrived here."""
        self.model.pool.abort(self._generations)
        for choice, generation in enumerate(self._generations):
            if not self._ended[choice]:
                self._used[choice] = len(generation.tokens)
        usage = self.usage()
        total_s = time.perf_counter() - self._clock
        resumes = sum(generation.resumes for generation in self._generations)
        self._meter.settle(
            Settlement(
                request_id=self.id,
                key_id=self._key.key_id,
                model=self.request.model,
                status=status,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
                choices=len(self._generations),
                resumes=resumes,
                started_at=self._started_at,
                first_token_s=self._first_token_s,
                total_s=total_s,
            )
        )
        log.info(
            "completion",
            completion=self.id,
            status=status,
            model=self.request.model,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            resumes=resumes,
            first_token_s=self._first_token_s,
            total_s=round(total_s, 4),
        )
