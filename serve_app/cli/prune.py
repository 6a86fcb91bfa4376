"""`millstream usage prune`: rows of the ledger that nobody needs any more are removed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.time_parsing import parse_moment
from serve_app.cli.database import ConfigFile, InputError, opened_database
from serve_app.cli.tables import date_text

if TYPE_CHECKING:
    from deployments.meter.ledger.retention import Pruned

__all__ = ["prune"]

_SILENCE_S = 10.0
"""A line of progress so often."""
_DAY_S = 86_400


def prune(
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Of requests that arrived longer ago, such as 400d.")
    ] = None,
    before: Annotated[
        str | None, typer.Option(metavar="WHEN", help="Of requests that arrived before 2026-01-01, in UTC.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: ConfigFile = None,
) -> None:
    """Remove old usage from the ledger for good: rows of requests, and what they are in sums and reports.

    With both options it must be older than either. What quotas of the month and late settlements need stays. The
    cluster may run.
    """
    with opened_database(config) as engine:
        from deployments.meter.ledger.retention import SETTLED_AFTER_S, kept_from, prunable
        from deployments.meter.ledger.retention import prune as prune_rows

        now = time.time()
        asked = _asked(older_than, before, now)
        until = min(asked, kept_from(now))
        if until < asked:
            typer.echo(
                f"All from {date_text(until)} UTC on is kept: quotas of the month are read from it, and what was "
                f"recorded within {SETTLED_AFTER_S / _DAY_S:g} days tells a settlement that comes again.",
                err=True,
            )
        if dry_run:
            typer.echo(f"Would remove {_told(_total(prunable(engine, until, now), 'counted'), until)}.")
            return
        if not yes:
            would = _total(prunable(engine, until, now), "counted")
            if would.requests:
                question = f"Remove {_told(would, until)}, for good? (--yes does not ask)"
                typer.confirm(question, abort=True, err=True)
        typer.echo(f"Removed {_told(_total(prune_rows(engine, until, now), 'removed'), until)}.")


def _asked(older_than: str | None, before: str | None, now: float) -> float:
    """Raises InputError."""
    moments = []
    for option, text in (("--older-than", older_than), ("--before", before)):
        if text is None:
            continue
        try:
            moments.append(parse_moment(text, now, "past"))
        except ValueError as error:
            raise InputError(f"{option}: got {text!r}, {error}") from None
        if moments[-1] > now:
            raise InputError(f"{option}: got {text!r}, expected a time that has passed")
    if not moments:
        raise InputError("nothing to remove: give --older-than, such as 400d, or --before, such as 2026-01-01")
    return min(moments)


def _total(portions: Iterable[Pruned], done: str) -> Pruned:
    from deployments.meter.ledger.retention import Pruned

    total, said = Pruned(0, 0), time.monotonic()
    for portion in portions:
        total = Pruned(*map(sum, zip(total, portion, strict=True)))
        if time.monotonic() > said + _SILENCE_S:
            typer.echo(f"{total.requests:,} requests {done} …", err=True)
            said = time.monotonic()
    return total


def _told(total: Pruned, until: float) -> str:
    requests = f"{total.requests:,} request{'' if total.requests == 1 else 's'}"
    return f"{requests} with {total.tokens:,} tokens, from before {date_text(until)} UTC"
