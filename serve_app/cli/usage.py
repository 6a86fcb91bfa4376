"""`millstream usage …`: what was used, by whom and when, from the ledger; and what of it is not kept any more."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.contracts import UsageQuery
from deployments.resources import BUCKETS_S, Grouping, parse_grouping, usage_card
from deployments.time_parsing import parse_moment
from serve_app.cli.database import ConfigFile, InputError, opened_database, told_in_a_line
from serve_app.cli.keys import find_key
from serve_app.cli.prune import prune
from serve_app.cli.tables import print_table

if TYPE_CHECKING:
    from deployments.meter.keys.key_store import KeyStore

__all__ = ["usage"]

_WITHOUT_RECORD = ("admin", "anonymous")
_SUMS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "total_tokens", "cost")
_HEAD = ("REQUESTS", "PROMPT", "CACHED", "COMPLETION", "TOKENS", "COST")


usage = typer.Typer(invoke_without_command=True)
usage.command()(prune)


@usage.callback()
def report(
    context: typer.Context,
    by: Annotated[
        str, typer.Option(metavar="WHAT", help="Any of model, key, team, day, hour, status, dialect, with commas.")
    ] = "model",
    since: Annotated[
        str, typer.Option(metavar="WHEN", help="7d ago, 2026-11-01 in UTC, or a time in ISO 8601.")
    ] = "30d",
    until: Annotated[str | None, typer.Option(metavar="WHEN", help="The same, exclusive; now by default.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="Only of this key, by id or name; may be repeated.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only of this model; may be repeated.")] = None,
    team: Annotated[list[str] | None, typer.Option(help="Only of this team; may be repeated.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, with a line of names.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    config: ConfigFile = None,
) -> None:
    """Show requests, tokens and cost from the ledger, in whole hours of UTC by when requests arrived."""
    if context.invoked_subcommand is not None:
        _check_no_options(context)
        return
    with opened_database(config) as engine:
        from deployments.meter.keys.key_store import KeyStore
        from deployments.meter.ledger.usage import read_usage

        if as_csv and as_json:
            raise InputError("--csv and --json: expected one of them")
        store = KeyStore(engine)
        try:
            grouping = parse_grouping(by.split(",") if by else ())
        except ValueError as error:
            raise InputError(f"--by: {error}") from None
        now_at = time.time()
        since_at = _moment("--since", since, now_at)
        until_at = now_at if until is None else _moment("--until", until, now_at)
        if since_at >= until_at:
            raise InputError(f"--since: got {since!r}, expected a time before --until")
        query = UsageQuery(
            since=since_at,
            until=until_at,
            width_s=grouping.width_s,
            by=grouping.by,
            key_ids=tuple(each if each in _WITHOUT_RECORD else find_key(store, each).id for each in key)
            if key
            else None,
            teams=tuple(team) if team else None,
            models=tuple(model) if model else None,
        )
        with engine.connect() as connection:
            rows = read_usage(connection, query)
        cards = [usage_card(row, grouping) for row in rows]
        names = _names(store) if "key" in grouping.by and not (as_csv or as_json) else {}
    if as_json:
        typer.echo(json.dumps(cards, indent=2))
    elif as_csv:
        _print_csv(cards, grouping)
    else:
        _print_table(cards, grouping, names)


def _check_no_options(context: typer.Context) -> None:
    """Those of the report mean nothing to another command, whose own have the same names."""
    with told_in_a_line():
        for parameter in context.command.params:
            source = context.get_parameter_source(parameter.name or "")
            if source is not None and source.name == "COMMANDLINE":
                command = context.invoked_subcommand
                raise InputError(f"{parameter.opts[0]}: before `{command}` it is of the report, expected behind it")


def _moment(option: str, text: str, now_at: float) -> float:
    try:
        return parse_moment(text, now_at, "past")
    except ValueError as error:
        raise InputError(f"{option}: got {text!r}, {error}") from None


def _names(store: KeyStore) -> dict[str, str]:
    return {record.id: record.name for record in store.list_keys(include_revoked=True)}


def _groups(grouping: Grouping) -> list[str]:
    return [*(() if grouping.width_s is None else ("begins_at",)), *grouping.by]


def _print_csv(cards: list[dict[str, Any]], grouping: Grouping) -> None:
    groups = _groups(grouping)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*groups, *_SUMS])
    for card in cards:
        writer.writerow([*(_group_text(card, group) for group in groups), *(card[name] for name in _SUMS)])


def _print_table(cards: list[dict[str, Any]], grouping: Grouping, names: Mapping[str, str]) -> None:
    groups = _groups(grouping)
    bucket = next((name for name, width_s in BUCKETS_S.items() if width_s == grouping.width_s), "")
    head = [*((bucket if group == "begins_at" else group).upper() for group in groups), *_HEAD]
    rows = []
    for card in cards:
        cells = [_group_text(card, group) or "-" for group in groups]
        if "key" in grouping.by and (name := names.get(card["key"])) is not None:
            cells[groups.index("key")] = f"{card['key']} ({name})"
        rows.append([*cells, *_amounts(card)])
    total = {name: sum(card[name] for card in cards) for name in _SUMS}
    foot = [*("total", *[""] * (len(groups) - 1))[: len(groups)], *_amounts(total)]
    print_table(head, rows, numbers=_HEAD, foot=foot)


def _amounts(card: Mapping[str, Any]) -> list[str]:
    return [*(f"{card[name]:,}" for name in _SUMS[:-1]), f"{card['cost']:,.4f}"]


def _group_text(card: Mapping[str, Any], group: str) -> str:
    if group != "begins_at":
        return card[group] or ""
    return datetime.fromtimestamp(card["begins_at"], UTC).strftime("%Y-%m-%d %H:%M")
