"""What admitted requests may still use: open reservations, and who is to tell what becomes of them.

A reservation lasts until its request is settled, however long that takes, as long as the ingress that asked for it
lives, which it proves by renewing its lease. An ingress that is gone settles nothing; then engine replicas do, and what
even they do not know of is `lost`.

What was settled is remembered for a minute: a better witness may correct it, and an admission that its ingress has
given up long ago must not reserve anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from deployments.contracts import WITNESS_RANKS, Account, Settlement, Witness
from deployments.meter.errors import MeterBusy
from deployments.meter.limits.limits import NOTHING, LimitCharge, LimitDemand
from deployments.meter.limits.reservation_journal import ReservationJournal

__all__ = ["Reservation", "Reservations", "demand_of"]

_REMEMBERED_S: Final = 60.0
_LEASE_S: Final = 12.0
"""Without a sign of life, after which an ingress that engine replicas have settled for is taken for dead: more than two
of the renewals of deployments/ingress/meter_client.py."""


class Reservation(NamedTuple):
    """One admitted request, and how it counts in the limits of its key and team."""

    account: Account
    ingress_id: str
    charges: tuple[LimitCharge, ...]


class _Settled(NamedTuple):
    at: float
    witness: Witness
    tokens: int
    reservation: Reservation | None
    """None for one that was never seen here."""


class Reservations:
    """Open reservations by request id, at most `capacity`. All times are Unix seconds."""

    def __init__(self, journal: ReservationJournal, *, capacity: int = 100_000, lost_after_s: float = 60.0) -> None:
        self._journal = journal
        self._capacity = capacity
        self._lost_after_s = lost_after_s
        self._open: dict[str, Reservation] = {}
        self._settled: dict[str, _Settled] = {}
        self._claimed: dict[str, int] = {}
        """Of open ones, the tokens that engine replicas have settled while their ingress may still live."""
        self._renewed: dict[str, float] = {}
        """When each ingress was last heard of."""
        self._looked_at: float | None = None

    def __len__(self) -> int:
        return len(self._open)

    # --- admission ---------------------------------------------------------------------------------------------------

    def ensure_room(self) -> None:
        """Raises MeterBusy when full."""
        if len(self._open) >= self._capacity:
            raise MeterBusy("open reservations", self._capacity)

    def is_settled(self, request_id: str) -> bool:
        """Whether it has ended within the last minute, before it was admitted perhaps."""
        return request_id in self._settled

    def cancel(self, request_id: str) -> None:
        """As if it had never been admitted: its ingress asks again, because it got no answer."""
        reservation = self._open.get(request_id)
        if reservation is not None:
            self._drop(request_id)
            self._close(reservation, NOTHING, admitted=False)

    def reserve(self, reservation: Reservation, now: float) -> None:
        """Open one for a request that has none."""
        self.restore(reservation, now)
        self._journal.reserved(reservation.account, reservation.ingress_id)

    def restore(self, reservation: Reservation, now: float) -> None:
        """Open one that the journal has. Its ingress is heard of now, or has from now on to be heard of."""
        self._open[reservation.account.request_id] = reservation
        self._renewed[reservation.ingress_id] = now

    # --- settlement --------------------------------------------------------------------------------------------------

    def settle(self, settlement: Settlement, now: float) -> bool:
        """The ledger has `settlement`: ends the reservation. Whether all that it may have changed there is counted in
        the quotas; if not, they are to be loaded again. Late and repeated ones are harmless."""
        self._forget(now)
        account, witness, admitted = settlement.account, settlement.witness, settlement.status != "refused"
        tokens = settlement.prompt_tokens + settlement.completion_tokens
        reservation = self._open.get(account.request_id)
        if reservation is not None and witness == "engine" and self._may_live(reservation, now):
            # An ingress that only lost a connection goes on elsewhere, and may use all that it reserved.
            claimed = self._claimed.get(account.request_id, settlement.prompt_tokens)
            self._claimed[account.request_id] = claimed + settlement.completion_tokens  # as below
            return False
        if reservation is not None:
            self._drop(account.request_id)
            self._settled[account.request_id] = _Settled(now, witness, tokens, reservation)
            cost = _cost(account, settlement.prompt_tokens, settlement.completion_tokens)
            self._close(reservation, LimitDemand(tokens, cost), admitted=admitted)
            return True
        known = self._settled.get(account.request_id)
        if known is None:
            self._settled[account.request_id] = _Settled(now, witness, tokens, None)
            return account.admitted_at is None and not tokens  # given up before it was admitted: nothing was used
        rank, new_rank = WITNESS_RANKS[known.witness], WITNESS_RANKS[witness]
        if new_rank < rank or (new_rank == rank and witness != "engine"):
            return True
        if new_rank == rank:  # each knows some of the choices: as if they knew none in common
            tokens = known.tokens + settlement.completion_tokens
        self._settled[account.request_id] = known._replace(witness=witness, tokens=tokens)
        if known.reservation is not None:
            for charge in known.reservation.charges:
                charge.correct(tokens, admitted=admitted)
            self._journal.closed(account.request_id, tokens, admitted=admitted)
        return False

    def abandoned(self, now: float) -> list[Reservation]:
        """End those that engine replicas have settled and whose ingress has not been heard of since. Quotas are to be
        loaded again."""
        closed = []
        for request_id, tokens in list(self._claimed.items()):
            reservation = self._open[request_id]
            if not self._may_live(reservation, now):
                self._drop(request_id)
                self._settled[request_id] = _Settled(now, "engine", tokens, reservation)
                self._close(reservation, LimitDemand(tokens, 0.0), admitted=True)
                closed.append(reservation)
        return closed

    def _may_live(self, reservation: Reservation, now: float) -> bool:
        return now < self._renewed.get(reservation.ingress_id, now) + _LEASE_S

    def _drop(self, request_id: str) -> None:
        """It is open no more."""
        del self._open[request_id]
        self._claimed.pop(request_id, None)

    def close_recorded(self, request_ids: Iterable[str]) -> list[Reservation]:
        """End those that the ledger has rows of already, which counts what they have used: within the minute as much as
        they could. Quotas are to be loaded again."""
        closed = [self._open[request_id] for request_id in request_ids if request_id in self._open]
        for reservation in closed:
            self._drop(reservation.account.request_id)
            self._close(reservation, LimitDemand(reservation.account.reserved_tokens, 0.0), admitted=True)
        return closed

    def _close(self, reservation: Reservation, used: LimitDemand, *, admitted: bool) -> None:
        account = reservation.account
        for charge in reservation.charges:
            charge.close(used, account.started_at, admitted=admitted)
        self._journal.closed(account.request_id, used.tokens, admitted=admitted)

    def _forget(self, now: float) -> None:
        """Those that were settled long ago; a dict keeps the order of insertion, and so that of their times."""
        while self._settled:
            oldest = next(iter(self._settled))
            if now < self._settled[oldest].at + _REMEMBERED_S:
                return
            del self._settled[oldest]

    # --- leases ------------------------------------------------------------------------------------------------------

    def renew(self, ingress_id: str, now: float) -> None:
        """That ingress lives."""
        self._renewed[ingress_id] = now

    def lost(self, now: float) -> list[Reservation]:
        """Those whose ingress was not heard of for `lost_after_s`. To be asked more often than that."""
        looked_at, self._looked_at = self._looked_at, now
        if looked_at is not None and now - looked_at >= self._lost_after_s / 2:
            self._renewed = dict.fromkeys(self._renewed, now)  # it was this process that was away
        gone = {ingress for ingress, at in self._renewed.items() if at + self._lost_after_s <= now}
        if not gone:
            return []
        lost = [reservation for reservation in self._open.values() if reservation.ingress_id in gone]
        for ingress in gone - {reservation.ingress_id for reservation in lost}:
            del self._renewed[ingress]
        return lost

    # --- the journal -------------------------------------------------------------------------------------------------

    def flush(self, now: float) -> None:
        """Journal what was changed, before anybody is told of it."""
        self._journal.flush()
        if self._journal.is_full(now):
            still_open = list(self._open.values())
            self._journal.rotate(now, ((each.account, each.ingress_id) for each in still_open))


def demand_of(account: Account) -> LimitDemand:
    """The most that a request can use, as it was reserved."""
    completion_tokens = account.reserved_tokens - account.prompt_tokens
    return LimitDemand(account.reserved_tokens, _cost(account, account.prompt_tokens, completion_tokens))


def _cost(account: Account, prompt_tokens: int, completion_tokens: int) -> float:
    """In the currency of the prices, as the ledger has it."""
    return (prompt_tokens * account.prompt_price + completion_tokens * account.completion_price) / 1e6
