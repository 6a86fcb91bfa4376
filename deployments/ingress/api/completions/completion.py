"""One completion request from admission to settlement, apart from HTTP.

The methods stand in the order in which they run. Whatever happens after `admit`, `settle` is called exactly once with
what the request used, by response.py.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Final
from uuid import uuid4

import structlog

from deployments.contracts import (
    Account,
    AdmissionRequest,
    Admitted,
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
from deployments.ingress.api.completions.chunks import ChoiceDelta, WrittenUsage
from deployments.ingress.api.completions.logprobs import LogprobsWriter, WrittenLogprobs, prompt_logprobs_fields
from deployments.ingress.api.completions.request import CompletionRequest
from deployments.ingress.constraints.checker import ConstraintChecker
from deployments.ingress.errors import (
    ApiError,
    ClientGone,
    InternalError,
    InvalidRequest,
    OutputNotConforming,
    ServiceUnavailable,
)
from deployments.ingress.inference.generation import Generation, Mailbox, News
from deployments.ingress.inference.text_stream import TextDelta, TextStream
from deployments.ingress.meter_client import MeterClient
from deployments.ingress.routing.catalog import ServedModel

__all__ = ["Completion"]

log = structlog.get_logger()

_MAX_PROMPT_ENTRIES: Final = 2**16
"""Log probabilities of one prompt: what the engine and the ingress pass on as a whole, in 30 to 50 ms."""
_MAX_PROMPT_ENTRIES_OF_ALL: Final = 2**18
"""Of all prompts, for each of the choices generated."""
_ENTRIES_PER_TURN: Final = 2048
"""How many of them are written in one turn of the event loop, at 2 to 4 us each."""

_TURN_S: Final = 0.01
"""What one request takes of the event loop before others get a turn; between two candidates it cannot be broken off."""


@dataclass(slots=True)
class _Candidate:
    """One generation and what becomes of its tokens."""

    generation: Generation
    text: TextStream
    logprobs: LogprobsWriter | None
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None
    """Of its prompt, where asked for, and so the next."""
    echoed: WrittenLogprobs | None = None
    used: int = 0
    """Completion tokens that count."""
    log_probability: float = 0.0
    """Of the tokens that count, together; known where candidates are ranked."""
    told: bool = False
    """It has given a delta."""
    ended: bool = False


class Completion:
    def __init__(
        self,
        request: CompletionRequest,
        model: ServedModel,
        key: KeyInfo,
        meter: MeterClient,
        constraints: ConstraintChecker,
        *,
        dialect: str = "D3",
        caller_request_id: str | None = None,
    ) -> None:
        self.id = f"cmpl-{uuid4().hex}"
        """Ours, not the caller's: it is the primary key of the ledger."""
        self.created = int(time.time())
        self.request = request
        self.model = model
        self._key = key
        self._meter = meter
        self._constraints = constraints
        self._grammar: str | None = None
        """What the output conforms to, where something was asked of it."""
        self._dialect = dialect
        self._caller_request_id = caller_request_id
        self._started_at = time.time()
        self._clock = time.perf_counter()
        self._first_token_s: float | None = None
        self._token_at = 0.0
        """When the last ones came, by `time.perf_counter`."""
        self._mailbox = Mailbox(model.pool.rounds)
        self._left: list[News] = []
        """Taken out of it, for the next turns of the event loop."""
        self._prompts: list[list[int]] = []
        self._admitted = Admitted([])
        self._settled = False
        self._candidates: list[_Candidate] = []
        self._running = 0
        """Candidates that have not ended."""
        self._gone = False

    async def admit(self) -> None:
        """Tokenize, check and reserve. Raises ApiError; nothing is left to be settled then."""
        request = self.request
        self._check_model_can()
        if self._meter.full:
            raise ServiceUnavailable("Usage cannot be recorded at the moment.", retry_after_s=5.0)
        self._grammar = await self._checked_constraint()
        try:
            self._admitted = await self._meter.admit(
                AdmissionRequest(
                    request_id=self.id,
                    key_id=self._key.key_id,
                    model=self.model.entry.name,
                    prompts=self._prompts_to_encode(),
                    max_tokens=max(1, request.tokens_per_choice),
                    choices=request.candidates,
                    options=request.prompt_options,
                    team=self._key.team,
                    dialect=self._dialect,
                    caller_request_id=self._caller_request_id,
                    started_at=self._started_at,
                )
            )
        except ApiError as error:
            if isinstance(error, ServiceUnavailable):  # the meter may have reserved all the same
                self.settle("failed")
            raise
        except BaseException as error:  # likewise
            self.settle("cancelled" if isinstance(error, asyncio.CancelledError) else "failed")
            raise
        self._prompts = self._admitted.token_ids
        try:
            self._check_prompt_logprobs()
        except InvalidRequest:
            self.settle("failed")
            raise

    async def _checked_constraint(self) -> str | None:
        """The constraint as a grammar. Raises InvalidRequest where no output conforms, ServiceUnavailable."""
        request, given = self.request, self.request.constraint()
        if given is None:
            return None
        checked = await self._constraints.check(
            self._key.owner,
            ConstraintCheck(
                str(self.model.entry.folder),
                given.constraint,
                candidates=len(request.prompt) * request.candidates,
                min_tokens=request.min_tokens or 0,
                allowed_token_ids=tuple(request.allowed_token_ids) if request.allowed_token_ids else None,
                banned_token_ids=tuple(
                    sorted(token for token, bias in (request.logit_bias or {}).items() if bias <= -100)
                ),
                bad_words=tuple(request.bad_words or ()),
            ),
        )
        if not checked.grammar:
            param = checked.param or given.param
            raise InvalidRequest(
                f"Invalid value for '{given.param}': {checked.message}", param=param, location=tuple(param.split("."))
            )
        return checked.grammar

    @property
    def rate_limits(self) -> RateLimits | None:
        """Of the caller, after this request was admitted."""
        return self._admitted.rate_limits

    def _account(self) -> Account:
        request, admitted = self.request, self._admitted
        return Account(
            request_id=self.id,
            key_id=self._key.key_id,
            model=self.model.entry.name,
            prompt_tokens=sum(map(len, self._prompts)),
            choices=len(self._prompts) * request.candidates,
            team=self._key.team,
            dialect=self._dialect,
            caller_request_id=self._caller_request_id,
            started_at=self._started_at,
            admitted_at=admitted.admitted_at or None,
            reserved_tokens=admitted.reserved_tokens,
            prompt_price=admitted.prompt_price,
            completion_price=admitted.completion_price,
        )

    def _check_model_can(self) -> None:
        """What depends on the model, and can be told before an engine is asked. Raises InvalidRequest."""
        request, model = self.request, self.model
        if request.suffix is not None and model.entry.infilling is None:
            raise InvalidRequest(
                f"The model '{request.model}' cannot fill in text between a prompt and a suffix. Leave suffix out.",
                param="suffix",
            )
        if request.priority and not model.entry.priority_scheduling:
            raise InvalidRequest(
                f"The model '{request.model}' serves requests in the order of their arrival. Leave priority out.",
                param="priority",
            )
        for param, token_ids in (
            ("stop_token_ids", request.stop_token_ids),
            ("logit_bias", request.logit_bias),
            ("allowed_token_ids", request.allowed_token_ids),
            ("logprob_token_ids", request.logprob_token_ids),
        ):
            for token_id in set(token_ids or ()):
                if model.tokenizer.id_to_token(token_id) is None:
                    raise InvalidRequest(f"Token id {token_id} is out of vocabulary.", param=param)

    def _check_prompt_logprobs(self) -> None:
        """How many of them there are is known once the prompts are tokens. Raises InvalidRequest."""
        request, told = self.request, self.request.prompt_positions
        if told is None:
            return
        param = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
        lengths = list(map(len, self._prompts))
        if max(lengths) * (told + 1) > _MAX_PROMPT_ENTRIES:
            raise InvalidRequest(
                f"A prompt of {max(lengths)} tokens with {told + 1} log probabilities for each has "
                f"{max(lengths) * (told + 1)} of them; expected at most {_MAX_PROMPT_ENTRIES} for one prompt.",
                param=param,
            )
        entries = sum(lengths) * (told + 1) * request.candidates
        if entries > _MAX_PROMPT_ENTRIES_OF_ALL:
            raise InvalidRequest(
                f"{sum(lengths)} tokens of prompts with {told + 1} log probabilities each, for {request.candidates} "
                f"choices of each prompt, have {entries} of them; expected at most {_MAX_PROMPT_ENTRIES_OF_ALL}.",
                param=param,
            )

    def _prompts_to_encode(self) -> list[str | list[int]]:
        request, infilling = self.request, self.model.entry.infilling
        if request.suffix is None or infilling is None:
            return request.prompt
        if not all(isinstance(prompt, str) for prompt in request.prompt):
            raise InvalidRequest("suffix is only allowed with a prompt that is text.", param="suffix")
        return [infilling.prompt(str(prompt), request.suffix) for prompt in request.prompt]

    async def start(self) -> None:
        """Hand every candidate to the pool. Hundreds of them take more than one turn of the event loop."""
        request, account = self.request, self._account()
        meter = self._meter.meter_of(account.key_id, account.team)
        turn_ends = time.perf_counter() + _TURN_S
        for prompt in self._prompts:
            for number in range(request.candidates):
                if time.perf_counter() > turn_ends:
                    await asyncio.sleep(0)
                    turn_ends = time.perf_counter() + _TURN_S
                generation = Generation(
                    account,
                    meter,
                    len(self._candidates),
                    prompt,
                    request.sampling(number, self._grammar),
                    self._mailbox,
                )
                text = TextStream(
                    self.model.tokenizer,
                    prompt,
                    stops=request.stop,
                    include_stop_in_output=bool(request.include_stop_str_in_output),
                    min_tokens=request.min_tokens or 0,
                    skip_special_tokens=request.skip_special_tokens is not False,
                    spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
                )
                writer = None
                if request.logprobs is not None:
                    writer = LogprobsWriter(
                        self.model.token_texts,
                        top=None if request.logprob_token_ids else request.logprobs,
                        as_token_ids=bool(request.return_tokens_as_token_ids),
                    )
                self._candidates.append(_Candidate(generation, text, writer))
        self._running = len(self._candidates)
        self.model.pool.start([candidate.generation for candidate in self._candidates])

    @property
    def finished(self) -> bool:
        return not self._running

    def client_gone(self) -> None:
        """Wakes `deltas`, which raises ClientGone."""
        self._gone = True
        self._mailbox.wake()

    @property
    def awaits_cold_start(self) -> bool:
        """Nothing of it runs: it waits for a pool that was scaled to zero."""
        return self.model.pool.cold and all(each.generation.placement is None for each in self._candidates)

    def wake(self) -> None:
        """Makes `deltas` return, empty if need be, so that its caller can write a keep-alive."""
        self._mailbox.wake()

    async def deltas(self) -> list[ChoiceDelta]:
        """What the candidates, by number, gained since the last call. Raises ClientGone, and ApiError when one has
        failed."""
        if news := self._left:
            self._left = []
            await asyncio.sleep(0)
        else:
            news = await self._mailbox.take()
        if self._gone:
            raise ClientGone
        deltas: list[ChoiceDelta] = []
        ended: list[Output] = []
        timed = False
        turn_ends = time.perf_counter() + _TURN_S
        for place, (number, delta, error) in enumerate(news):
            if place & 15 == 15 and time.perf_counter() > turn_ends:
                self._left = news[place:]
                break
            if error is not None:
                raise error
            candidate = self._candidates[number]
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
                await self._write_prompt(candidate, delta.prompt_logprobs)
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

    async def _check_outputs(self, grammar: str, outputs: list[Output]) -> None:
        """Before the client is told that they have ended: where vLLM's matcher gives up, or no token is left, it ends
        the text without a word. Raises OutputNotConforming, ServiceUnavailable."""
        if self.request.tokens_per_choice == 0 or not self.model.entry.verifies_outputs:
            return
        least = self.request.min_tokens or 0
        if any(each.ended and len(each.token_ids) <= least for each in outputs):
            raise self._not_conforming()  # vLLM ends it before, rather than go on without the form
        check = OutputCheck(
            str(self.model.entry.folder),
            grammar,
            [Output(each.token_ids[:-1], True) if each.ended else each for each in outputs],
        )
        if not all(await self._constraints.conforming(self._key.owner, check)):
            log.warning("output not conforming", completion=self.id)
            raise self._not_conforming()

    def _not_conforming(self) -> OutputNotConforming:
        return OutputNotConforming(next(iter(self.request.constraining), "the constraint"))

    def _unnamed_parameter(self) -> str | None:
        """What an engine has most likely refused where it does not say: plugins of its operator name nothing, and vLLM
        seldom the parameter that it cannot make a grammar of."""
        if self.request.vllm_xargs:
            return "vllm_xargs"
        return next(iter(self.request.constraining), None)

    async def _write_prompt(self, candidate: _Candidate, positions: list[PositionLogprobs | None]) -> None:
        """What the engine tells of the prompt, in as many turns of the event loop as it takes."""
        request, prompt = self.request, candidate.generation.prompt
        size = max(1, _ENTRIES_PER_TURN // (1 + (request.prompt_positions or 0)))
        if not request.stream:  # with an echo too, as in vLLM
            candidate.prompt_logprobs = []
            fields = prompt_logprobs_fields(self.model.token_texts, positions)
            while some := list(islice(fields, size)):
                candidate.prompt_logprobs += some
                await asyncio.sleep(0)
        if request.echo and candidate.logprobs is not None:
            candidate.echoed = WrittenLogprobs()
            for begin in range(0, len(prompt), size):
                end = begin + size
                candidate.echoed.extend(
                    candidate.logprobs.prompt(prompt[begin:end], positions[begin:end], more=end < len(prompt))
                )
                await asyncio.sleep(0)

    def _tokens_came(self) -> None:
        now = time.perf_counter()
        if self._first_token_s is None:
            self._first_token_s = now - self._clock
            self.model.pool.first_token(self._first_token_s)
        else:
            self.model.pool.inter_token(now - self._token_at)
        self._token_at = now

    def _gained(self, number: int, candidate: _Candidate, delta: TokenDelta) -> ChoiceDelta | None:
        """None when there is nothing to show yet."""
        request = self.request
        if request.tokens_per_choice == 0:  # the engine makes one token all the same, for nobody
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
                self.model.pool.abort([candidate.generation])
        if self._is_plain:
            if not text.text and text.finished is None:
                return None
            return ChoiceDelta(number, text.text, text.finished, text.stop_reason)
        return self._detailed(number, candidate, delta, token_ids, text)

    @cached_property
    def _is_plain(self) -> bool:
        """Nobody asked for more than text: most requests, and the least work per token."""
        request = self.request
        return (
            request.logprobs is None
            and request.prompt_logprobs is None
            and not request.echo
            and not request.return_token_ids
            and request.candidates == request.choices
        )

    def _detailed(
        self, number: int, candidate: _Candidate, delta: TokenDelta, token_ids: list[int], text: TextDelta
    ) -> ChoiceDelta | None:
        request = self.request
        prompt = candidate.generation.prompt
        first = not candidate.told
        shown = text.text
        if first and request.echo:
            shown = self._echo(number // request.candidates) + shown
        positions = (delta.logprobs or [])[: len(token_ids)]
        if request.candidates > request.choices:
            candidate.log_probability += sum(position.logprobs[0] for position in positions)
        logprobs = None
        if candidate.logprobs is not None:
            if first and request.echo:
                # Without an engine's word, as of a prompt of one token, nothing is known.
                logprobs = candidate.echoed or candidate.logprobs.prompt(prompt, [None] * len(prompt))
                logprobs.extend(candidate.logprobs.generated(token_ids, positions))
            else:
                logprobs = candidate.logprobs.generated(token_ids, positions)
        if not (shown or text.finished or token_ids):
            return None
        return ChoiceDelta(
            number,
            shown,
            text.finished,
            text.stop_reason,
            logprobs,
            token_ids=token_ids if request.return_token_ids else None,
            prompt_token_ids=prompt if first and request.return_token_ids else None,
            prompt_logprobs=candidate.prompt_logprobs if first else None,
        )

    def best(self) -> list[int]:
        """The candidates that become choices, by prompt: of each its likeliest per token, as at OpenAI."""
        request = self.request
        best: list[int] = []
        for first in range(0, len(self._candidates), request.candidates):
            numbers = range(first, first + request.candidates)
            if request.candidates > request.choices:
                best += sorted(numbers, key=self._likelihood, reverse=True)[: request.choices]
            else:
                best += numbers
        return best

    def _likelihood(self, number: int) -> float:
        candidate = self._candidates[number]
        return candidate.log_probability / candidate.used if candidate.used else -math.inf

    def usage(self) -> WrittenUsage:
        """So far."""
        candidates = self._candidates
        each = self.request.candidates
        return WrittenUsage(
            prompt_tokens=sum(map(len, self._prompts)),
            completion_tokens=sum([candidate.used for candidate in candidates]),
            cached_tokens=sum(
                max(candidate.generation.cached_tokens for candidate in candidates[first : first + each])
                for first in range(0, len(candidates), each)
            ),
        )

    def usage_of(self, number: int) -> WrittenUsage:
        """Of one candidate so far."""
        candidate = self._candidates[number]
        return WrittenUsage(len(candidate.generation.prompt), candidate.used, candidate.generation.cached_tokens)

    def _echo(self, number: int) -> str:
        """The text of prompt `number`: as it was sent, or of the tokens that the model saw instead."""
        prompt = self.request.prompt[number]
        if isinstance(prompt, str) and self.request.truncate_prompt_tokens is None:
            return prompt
        text: str = self.model.tokenizer.decode(self._prompts[number], skip_special_tokens=False)
        return text

    def settle(self, status: SettlementStatus) -> None:
        """Free the engines and record what was used: for a choice cut short, every token that arrived here. Before
        the client is told of the end, since this process may be killed right after it. Safe twice: the first counts."""
        if self._settled:
            return
        self._settled = True
        generations = [candidate.generation for candidate in self._candidates]
        self.model.pool.abort(generations)
        if self.request.tokens_per_choice:
            for candidate in self._candidates:
                if not candidate.ended:
                    candidate.used = len(candidate.generation.tokens)
        usage = self.usage()
        total_s = time.perf_counter() - self._clock
        accepted_at = [generation.accepted_at for generation in generations if generation.accepted_at is not None]
        settlement = Settlement(
            account=self._account(),
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
            "completion",
            completion=self.id,
            status=status,
            model=self.model.entry.name,
            prompt_tokens=settlement.prompt_tokens,
            completion_tokens=settlement.completion_tokens,
            resumes=settlement.resumes,
            first_token_s=self._first_token_s,
            total_s=round(total_s, 4),
        )
        self._meter.settle(settlement, lambda: self.model.pool.release(self.id))
