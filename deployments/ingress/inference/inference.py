"""One request for generated text from admission to settlement, whichever endpoint it came to and apart from HTTP.

The methods stand in the order in which they run. Whatever happens after `admit`, `settle` is called exactly once with
what the request used. How choices look is the endpoint's: it derives from `Inference` and writes them.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

import structlog

from deployments.contracts import (
    Account,
    AdmissionRequest,
    ConstraintCheck,
    KeyInfo,
    Output,
    OutputCheck,
    PositionLogprobs,
    RateLimits,
    Settlement,
    SettlementStatus,
    TokenDelta,
)
from deployments.ingress.constraints.checker import ConstraintChecker
from deployments.ingress.errors import (
    ApiError,
    ClientGone,
    InternalError,
    InvalidRequest,
    OutputNotConforming,
    ServiceUnavailable,
)
from deployments.ingress.inference.generation import DeltaQueue, Generation, GenerationEvent
from deployments.ingress.inference.model import RequestedModel
from deployments.ingress.inference.request import InferenceRequest
from deployments.ingress.inference.text_stream import TextDelta, TextStream
from deployments.ingress.meter_client import MeterClient

__all__ = ["Candidate", "Inference", "TokenUsage"]

log = structlog.get_logger()

D = TypeVar("D")
"""What an endpoint writes of the tokens that one choice gained."""

_TURN_S: Final = 0.01
"""What one request takes of the event loop before others get a turn; between two candidates it cannot be broken off."""


class TokenUsage(NamedTuple):
    """Tokens of one request: of the prompts, each once, and over all choices generated."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(slots=True)
class Candidate:
    """One generation and what becomes of its tokens."""

    generation: Generation
    text: TextStream
    used: int = 0
    """Completion tokens that count."""
    told: bool = False
    """It has given a delta."""
    ended: bool = False


class Inference(ABC, Generic[D]):
    def __init__(
        self,
        request_id: str,
        asked: InferenceRequest,
        model: RequestedModel,
        key: KeyInfo,
        meter: MeterClient,
        constraints: ConstraintChecker,
        *,
        dialect: str,
        caller_request_id: str | None = None,
    ) -> None:
        """`request_id`: ours, not the caller's. It is the primary key of the ledger."""
        self.id = request_id
        self.candidates: list[Candidate] = []
        """Of all prompts, in their order; empty before `start`."""
        self.prompts: list[list[int]] = []
        """As token ids, once admitted."""
        self.rate_limits: RateLimits | None = None
        """Of the caller, after this request was admitted."""
        self._asked = asked
        self._model = model
        self._key = key
        self._meter = meter
        self._constraints = constraints
        self._grammar: str | None = None
        """What the output conforms to, where something was asked of it."""
        self._clock = time.perf_counter()
        self._admission = AdmissionRequest(
            request_id=request_id,
            key_id=key.key_id,
            model=model.entry.name,
            prompts=asked.prompts,
            max_tokens=asked.sampling.max_tokens,
            choices=asked.candidates,
            options=asked.prompt_options,
            team=key.team,
            dialect=dialect,
            caller_request_id=caller_request_id,
            started_at=time.time(),
        )
        self._account: Account = self._admission.account()
        self._first_token_s: float | None = None
        self._token_at = 0.0
        """When the last ones came, by `time.perf_counter`."""
        self._deltas = DeltaQueue(model.pool.writes)
        self._left: list[GenerationEvent] = []
        """Taken out of it, for the next turns of the event loop."""
        self._is_cheap = asked.sampling.logprobs is None and asked.sampling.logprob_token_ids is None
        """No log probabilities: so little work per delta that the clock is looked at now and then only."""
        self._settled = False
        self._running = 0
        """Candidates that have not ended."""
        self._gone = False

    @abstractmethod
    def _write(
        self, number: int, candidate: Candidate, delta: TokenDelta, token_ids: list[int], text: TextDelta
    ) -> D | None:
        """What candidate `number` gained: those of the delta's tokens that count, and their text. None when there is
        nothing to show yet."""

    @abstractmethod
    async def _write_prompt(self, number: int, candidate: Candidate, positions: list[PositionLogprobs | None]) -> None:
        """What the engine tells of the prompt, before the candidate's first delta is written."""

    async def admit(self) -> None:
        """Tokenize, check and reserve. Raises ApiError; nothing is left to be settled then."""
        self._asked.check(self._model)
        if self._meter.full:
            raise ServiceUnavailable("Usage cannot be recorded at the moment.", retry_after_s=5.0)
        self._grammar = await self._checked_constraint()
        try:
            admitted = await self._meter.admit(self._admission)
        except ApiError as error:
            if isinstance(error, ServiceUnavailable):  # the meter may have reserved all the same
                self.settle("failed")
            raise
        except BaseException as error:  # likewise
            self.settle("cancelled" if isinstance(error, asyncio.CancelledError) else "failed")
            raise
        self.prompts = admitted.token_ids
        self.rate_limits = admitted.rate_limits
        self._account = self._admission.account(
            sum(map(len, self.prompts)),
            admitted_at=admitted.admitted_at or None,
            reserved_tokens=admitted.reserved_tokens,
            prompt_price=admitted.prompt_price,
            completion_price=admitted.completion_price,
        )
        try:
            self._asked.check_prompts(self.prompts)
        except InvalidRequest:
            self.settle("failed")
            raise

    async def _checked_constraint(self) -> str | None:
        """The constraint as a grammar. Raises InvalidRequest where no output conforms, ServiceUnavailable."""
        given, sampling = self._asked.constraint, self._asked.sampling
        if given is None:
            return None
        checked = await self._constraints.check(
            self._key.owner,
            ConstraintCheck(
                str(self._model.entry.folder),
                given.constraint,
                candidates=len(self._asked.prompts) * self._asked.candidates,
                min_tokens=sampling.min_tokens,
                allowed_token_ids=sampling.allowed_token_ids,
                banned_token_ids=tuple(
                    sorted(token for token, bias in (sampling.logit_bias or {}).items() if bias <= -100)
                ),
                bad_words=sampling.bad_words,
            ),
        )
        if not checked.grammar:
            param = checked.param or given.param
            raise InvalidRequest(
                f"Invalid value for '{given.param}': {checked.message}", param=param, location=tuple(param.split("."))
            )
        return checked.grammar

    async def start(self) -> None:
        """Hand every candidate to the pool. Hundreds of them take more than one turn of the event loop."""
        asked, account = self._asked, self._account
        meter = self._meter.meter_of(account.key_id, account.team)
        turn_ends = time.perf_counter() + _TURN_S
        for prompt in self.prompts:
            for number in range(asked.candidates):
                if time.perf_counter() > turn_ends:
                    await asyncio.sleep(0)
                    turn_ends = time.perf_counter() + _TURN_S
                sampling = asked.of_candidate(number, self._grammar)
                place = len(self.candidates)
                generation = Generation(account, meter, place, prompt, sampling, self._deltas)
                text = TextStream(self._model.tokenizer, prompt, asked.text)
                self.candidates.append(Candidate(generation, text))
        self._running = len(self.candidates)
        self._model.pool.start([candidate.generation for candidate in self.candidates])

    @property
    def finished(self) -> bool:
        return not self._running

    def client_gone(self) -> None:
        """Wakes `deltas`, which raises ClientGone."""
        self._gone = True
        self._deltas.wake()

    @property
    def awaits_cold_start(self) -> bool:
        """Nothing of it runs: it waits for a pool that was scaled to zero."""
        return self._model.pool.cold and all(each.generation.placement is None for each in self.candidates)

    def wake(self) -> None:
        """Makes `deltas` return, empty if need be, so that its caller can write a keep-alive."""
        self._deltas.wake()

    async def deltas(self) -> list[D]:
        """What the candidates, by number, gained since the last call. Raises ClientGone, and ApiError when one has
        failed."""
        if news := self._left:
            self._left = []
            await asyncio.sleep(0)
        else:
            news = await self._deltas.take()
        if self._gone:
            raise ClientGone
        deltas: list[D] = []
        ended: list[Output] = []
        timed = False
        turn_ends = time.perf_counter() + _TURN_S
        between = 15 if self._is_cheap else 0
        for place, (number, delta, error) in enumerate(news):
            if place and place & between == between and time.perf_counter() > turn_ends:
                self._left = news[place:]
                break
            if error is not None:
                raise error
            candidate = self.candidates[number]
            if delta is None or candidate.ended or not (delta.token_ids or delta.finish_reason):
                continue  # nothing, or tokens behind a stop string, on their way when the engine was told to stop
            if delta.finish_reason == "refused":
                raise InvalidRequest(delta.message, param=delta.param or self._unnamed_parameter())
            if delta.finish_reason == "failed":
                if self._grammar is not None and not delta.message:  # a token was sampled that the grammar forbids
                    raise self._not_conforming()
                raise InternalError
            if delta.token_ids and not timed:
                timed = True  # once for all that came since the last call: it would cost too much for each token
                self._tokens_came()
            if delta.prompt_logprobs:
                await self._write_prompt(number, candidate, delta.prompt_logprobs)
            gained = self._gained(number, candidate, delta)
            if gained is not None:
                candidate.told = True
                deltas.append(gained)
            if candidate.ended and self._grammar is not None:
                ended.append(Output(candidate.generation.tokens, delta.finish_reason == "end_of_text"))
            if delta.prompt_logprobs:  # writing it as JSON takes long enough for one turn
                self._left = news[place + 1 :]
                break
        if ended and self._grammar is not None:
            await self._check_outputs(self._grammar, ended)
        return deltas

    def _tokens_came(self) -> None:
        now = time.perf_counter()
        if self._first_token_s is None:
            self._first_token_s = now - self._clock
            self._model.pool.first_token(self._first_token_s)
        else:
            self._model.pool.inter_token(now - self._token_at)
        self._token_at = now

    def _gained(self, number: int, candidate: Candidate, delta: TokenDelta) -> D | None:
        if self._asked.max_tokens == 0:
            token_ids: list[int] = []
            text = TextDelta("", 0, "length")
        else:
            token_ids = delta.token_ids
            text = candidate.text.push(token_ids, delta.finish_reason)
            if text.tokens_used < len(token_ids):
                token_ids = token_ids[: text.tokens_used]
        candidate.used += text.tokens_used
        if text.finished is not None:
            candidate.ended = True
            self._running -= 1
            if delta.finish_reason is None:  # a stop string, say: the engine knows nothing of it
                self._model.pool.abort([candidate.generation])
        return self._write(number, candidate, delta, token_ids, text)

    async def _check_outputs(self, grammar: str, outputs: list[Output]) -> None:
        """Before the client is told that they have ended: where vLLM's matcher gives up, or no token is left, it ends
        the text without a word. Raises OutputNotConforming, ServiceUnavailable."""
        if self._asked.max_tokens == 0 or not self._model.entry.verifies_outputs:
            return
        least = self._asked.sampling.min_tokens
        if any(each.ended and len(each.token_ids) <= least for each in outputs):
            raise self._not_conforming()  # vLLM ends it before, rather than go on without the form
        check = OutputCheck(
            str(self._model.entry.folder),
            grammar,
            [Output(each.token_ids[:-1], True) if each.ended else each for each in outputs],
        )
        if not all(await self._constraints.conforming(self._key.owner, check)):
            log.warning("output not conforming", request=self.id)
            raise self._not_conforming()

    def _not_conforming(self) -> OutputNotConforming:
        return OutputNotConforming(self._asked.constraining or "the constraint")

    def _unnamed_parameter(self) -> str | None:
        """What an engine has most likely refused where it does not say: plugins of its operator name nothing, and vLLM
        seldom the parameter that it cannot make a grammar of."""
        return "vllm_xargs" if self._asked.sampling.extra_args else self._asked.constraining

    def usage(self) -> TokenUsage:
        """So far."""
        candidates, each = self.candidates, self._asked.candidates
        return TokenUsage(
            prompt_tokens=self._account.prompt_tokens,
            completion_tokens=sum([candidate.used for candidate in candidates]),
            cached_tokens=sum(
                max(candidate.generation.cached_tokens for candidate in candidates[first : first + each])
                for first in range(0, len(candidates), each)
            ),
        )

    def usage_of(self, number: int) -> TokenUsage:
        """Of one candidate so far."""
        candidate = self.candidates[number]
        return TokenUsage(len(candidate.generation.prompt), candidate.used, candidate.generation.cached_tokens)

    def settle(self, status: SettlementStatus) -> None:
        """Free the engines and record what was used: for a choice cut short, every token that arrived here. Before
        the client is told of the end, since this process may be killed right after it. Safe twice: the first counts."""
        if self._settled:
            return
        self._settled = True
        generations = [candidate.generation for candidate in self.candidates]
        self._model.pool.abort(generations)
        if self._asked.max_tokens:
            for candidate in self.candidates:
                if not candidate.ended:
                    candidate.used = len(candidate.generation.tokens)
        usage = self.usage()
        total_s = time.perf_counter() - self._clock
        accepted_at = [generation.accepted_at for generation in generations if generation.accepted_at is not None]
        settlement = Settlement(
            account=self._account,
            status=status,
            # What no engine has taken on costs nothing, nor what failed before its first token.
            prompt_tokens=usage.prompt_tokens if accepted_at and (usage.completion_tokens or status != "failed") else 0,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            resumes=sum(generation.resumes for generation in generations),
            first_token_s=self._first_token_s,
            total_s=total_s,
            queue_s=max(accepted_at) - self._clock if accepted_at else None,
        )
        log.info(
            "request settled",
            request=self.id,
            status=status,
            model=self._model.entry.name,
            prompt_tokens=settlement.prompt_tokens,
            completion_tokens=settlement.completion_tokens,
            resumes=settlement.resumes,
            first_token_s=self._first_token_s,
            total_s=round(total_s, 4),
        )
        self._meter.settle(settlement, lambda: self._model.pool.release(self.id))
