"""Administration as a meter carries it out: commands in (contracts.AdministrationCommand), one answer out.

Mistakes of the caller are part of the answer, since they are for a human to read; only a database that fails is an
exception, and worth another try.
"""

from __future__ import annotations

import structlog

from deployments.contracts import (
    AdministrationAnswer,
    AdministrationCommand,
    AdministrationError,
    CreateKey,
    GetKey,
    ListKeys,
    ListTeams,
    RemoveTeam,
    RevokeKey,
    RotateKey,
    SetTeam,
    UpdateKey,
)
from deployments.meter.errors import InvalidValue, KeyNotFound, KeyRevoked, TeamNotFound
from deployments.meter.keys.key_store import KeyStore

__all__ = ["administer"]

log = structlog.get_logger()


def administer(store: KeyStore, command: AdministrationCommand) -> AdministrationAnswer:
    """Blocking. Raises LedgerUnavailable."""
    try:
        answer = _carry_out(store, command)
    except InvalidValue as error:
        return AdministrationAnswer(error=AdministrationError("invalid", str(error), error.field))
    except (KeyNotFound, TeamNotFound) as error:
        return AdministrationAnswer(error=AdministrationError("not_found", str(error)))
    except KeyRevoked as error:
        return AdministrationAnswer(error=AdministrationError("conflict", str(error)))
    if not isinstance(command, GetKey | ListKeys | ListTeams):
        log.info(
            "administered",
            command=type(command).__name__,
            keys=[key.id for key in answer.keys],
            teams=[team.name for team in answer.teams],
        )
    return answer


def _carry_out(store: KeyStore, command: AdministrationCommand) -> AdministrationAnswer:
    match command:
        case CreateKey(draft=draft):
            record, secret = store.create(draft)
            return AdministrationAnswer(keys=(record,), secret=secret)
        case RotateKey(key_id=key_id):
            record, secret = store.rotate(key_id)
            return AdministrationAnswer(keys=(record,), secret=secret)
        case UpdateKey(key_id=key_id, changes=changes):
            return AdministrationAnswer(keys=(store.update(key_id, changes),))
        case RevokeKey(key_id=key_id):
            return AdministrationAnswer(keys=(store.revoke(key_id),))
        case GetKey(key_id=key_id):
            return AdministrationAnswer(keys=(store.get(key_id),))
        case ListKeys(team=team, include_revoked=include_revoked):
            return AdministrationAnswer(keys=tuple(store.list_keys(team=team, include_revoked=include_revoked)))
        case SetTeam(name=name, limits=limits):
            return AdministrationAnswer(teams=(store.set_team(name, limits),))
        case ListTeams():
            return AdministrationAnswer(teams=tuple(store.list_teams()))
        case RemoveTeam(name=name):
            return AdministrationAnswer(teams=(store.remove_team(name),))
