"""The decision on one request: whose it is, whether they may, how many tokens it is, and whether there is room.

Coupled with deployments/ingress/meter_client.py through contracts.AdmissionRequest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from deployments.contracts import Account, AdmissionRequest, Admitted, Limits, owner_of
from deployments.meter.admission.model_catalog import MeteredModel, ModelCatalog
from deployments.meter.admission.prompts import encode_prompts
from deployments.meter.errors import NotAdmitted
from deployments.meter.keys.key_directory import KeyDirectory, KeyState
from deployments.meter.limits.limit_registry import LimitRegistry
from deployments.meter.limits.limits import LimitState, Refusal, check, rate_limits
from deployments.meter.limits.reservations import Reservation, Reservations, demand_of

__all__ = ["Admission"]

_NO_LIMITS: Final = Limits()
_MOST_TOKENS: Final = 8
"""Per character of a text, and special tokens of each: no tokenizer should make more."""
_MAX_UNDECIDED: Final = 1024
"""Admissions of one owner that wait at a time, for the database or a thread, and the characters and token ids of them
together: memory that it may take, far less than makes a meter stop reading
(deployments/meter/remote/meter_connection.py)."""
_MAX_UNDECIDED_SIZE: Final = 64 * 2**20


class _Undecided(NamedTuple):
    """What one owner has."""

    requests: int
    size: int


class Admission:
    """For use on one event loop. `clock` gives Unix time in seconds and never goes back."""

    def __init__(
        self,
        keys: KeyDirectory,
        catalog: ModelCatalog,
        registry: LimitRegistry,
        reservations: Reservations,
        clock: Callable[[], float],
    ) -> None:
        self._keys = keys
        self._catalog = catalog
        self._registry = registry
        self._reservations = reservations
        self._clock = clock
        self._undecided: dict[str, _Undecided] = {}

    async def decide(self, request: AdmissionRequest) -> Admitted:
        """Reserves what it admits. Cheap refusals come first, and one that waits holds up no other. Raises NotAdmitted,
        and another MeterError where it cannot be decided now."""
        self._reservations.cancel(request.request_id)  # asked before, and the answer was lost
        owner, size = owner_of(request.key_id, request.team), sum(map(len, request.prompts))
        has = self._undecided.get(owner, _Undecided(0, 0))
        if has.requests >= _MAX_UNDECIDED or (has.requests and has.size + size > _MAX_UNDECIDED_SIZE):
            raise _too_many_at_once(request)
        self._undecided[owner] = _Undecided(has.requests + 1, has.size + size)
        try:
            return await self._decide(request)
        finally:
            has = self._undecided.pop(owner)
            if has.requests > 1:
                self._undecided[owner] = _Undecided(has.requests - 1, has.size - size)

    async def _decide(self, request: AdmissionRequest) -> Admitted:
        key = await self._keys.find(request.key_id)
        if key is None:
            raise NotAdmitted("invalid_api_key", "This API key was revoked or has expired.")
        entry = self._catalog.find(request.model)
        if entry is None:
            raise NotAdmitted("model_not_found", f"The model `{request.model}` does not exist.", param="model")
        model = entry.model
        if not model.usable_with(key.record.models):
            raise NotAdmitted("model_not_allowed", f"This API key may not use the model `{model.name}`.", param="model")
        now, states = await self._states(key)
        refusal = _foreseeable(request, model, states, now)
        if refusal is not None:
            raise _refused(refusal, states, now)
        token_ids = await encode_prompts(entry, request)
        return self._reserve(request, model, token_ids, *await self._states(key))

    def _reserve(
        self,
        request: AdmissionRequest,
        model: MeteredModel,
        token_ids: list[list[int]],
        now: float,
        states: tuple[LimitState, ...],
    ) -> Admitted:
        """Not a coroutine: nothing may happen between the check and the reservation."""
        if self._reservations.is_settled(request.request_id):
            # Nobody waits for this answer, and nobody would settle the reservation.
            raise NotAdmitted("rate_limit_exceeded", "The request was given up before it could be admitted.")
        self._reservations.cancel(request.request_id)  # of an attempt that was tokenizing at the same time
        self._reservations.ensure_room()
        account = _account(request, model, sum(map(len, token_ids)), now)
        demand = demand_of(account)
        refusal = check(states, now, demand)
        if refusal is not None:
            raise _refused(refusal, states, now)
        charges = tuple([state.take(now, demand) for state in states])
        self._reservations.reserve(Reservation(account, request.ingress_id, charges), now)
        return Admitted(
            token_ids,
            admitted_at=now,
            reserved_tokens=account.reserved_tokens,
            prompt_price=model.prompt_price,
            completion_price=model.completion_price,
            rate_limits=rate_limits(states, now),
        )

    async def _states(self, key: KeyState) -> tuple[float, tuple[LimitState, ...]]:
        """Now, and the limits of a key and its team as they are now, with all that was used."""
        record = key.record
        while True:
            now, states = self._clock(), self._registry.states(record.id, record.team)
            for state, limits in zip(states, (record.limits, key.team_limits or _NO_LIMITS), strict=False):
                if state.limits is not limits:
                    state.limits = limits
            if not any(state.unloaded(now) for state in states):
                return now, states
            await self._registry.load(record.id, record.team)


def _account(request: AdmissionRequest, model: MeteredModel, prompt_tokens: int, now: float) -> Account:
    return request.account(
        prompt_tokens,
        admitted_at=now,
        reserved_tokens=prompt_tokens + request.all_choices * request.max_tokens,
        prompt_price=model.prompt_price,
        completion_price=model.completion_price,
    )


def _foreseeable(
    request: AdmissionRequest, model: MeteredModel, states: Sequence[LimitState], now: float
) -> Refusal | None:
    """The refusal of a request that is refused whatever its prompts are. None where they must be known, and be it to
    tell for how long."""
    if not any(state.is_crowded(now) for state in states):
        return None
    fewest = len(request.prompts)
    most = sum([_MOST_TOKENS * len(prompt) + _MOST_TOKENS for prompt in request.prompts])
    refusal, of_most = (
        check(states, now, demand_of(_account(request, model, tokens, now))) for tokens in (fewest, most)
    )
    if refusal is None or of_most is None or refusal.retry_after_s != of_most.retry_after_s:
        return None
    return refusal


def _too_many_at_once(request: AdmissionRequest) -> NotAdmitted:
    whose = "this key" if request.team is None else f"the team {request.team}"
    return NotAdmitted(
        "rate_limit_exceeded",
        f"Too many requests of {whose} wait to be admitted: at most {_MAX_UNDECIDED} at a time, with at most "
        f"{_MAX_UNDECIDED_SIZE} characters and token ids together.",
        retry_after_s=1.0,
    )


def _refused(refusal: Refusal, states: Sequence[LimitState], now: float) -> NotAdmitted:
    return NotAdmitted(
        refusal.code,
        refusal.message,
        retry_after_s=refusal.retry_after_s,
        rate_limits=rate_limits(states, now),
    )
