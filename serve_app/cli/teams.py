"""`millstream teams …`: limits that hold for all keys of a team together."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from deployments.contracts import Limits
from deployments.resources import team_card
from serve_app.cli.database import ConfigFile, key_store
from serve_app.cli.keys import limits_text
from serve_app.cli.limit_options import (
    Concurrency,
    MoneyPerDay,
    MoneyPerMonth,
    RequestsPerMinute,
    TokensPerDay,
    TokensPerMinute,
    TokensPerMonth,
    parse_limits,
)
from serve_app.cli.tables import date_text, print_table

__all__ = ["teams"]

teams = typer.Typer(
    help="Set limits that hold for all keys of a team together. Works with the cluster running or not.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(help="Name of the team, as its keys have it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@teams.command("set")
def set_team(
    name: Name,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrency: Concurrency = None,
    tokens_per_day: TokensPerDay = None,
    tokens_per_month: TokensPerMonth = None,
    money_per_day: MoneyPerDay = None,
    money_per_month: MoneyPerMonth = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Set all limits of a team: those that are not given are lifted. Acts within 5 seconds."""
    with key_store(config) as store:
        limits = parse_limits(
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrency=concurrency,
            tokens_per_day=tokens_per_day,
            tokens_per_month=tokens_per_month,
            money_per_day=money_per_day,
            money_per_month=money_per_month,
        )
        team = store.set_team(name, Limits(**limits))
    typer.echo(json.dumps(team_card(team), indent=2) if as_json else f"{team.name}: {limits_text(team.limits)}")


@teams.command("list")
def list_teams(as_json: Json = False, config: ConfigFile = None) -> None:
    """List the teams that have limits."""
    with key_store(config) as store:
        records = store.list_teams()
    if as_json:
        typer.echo(json.dumps([team_card(record) for record in records], indent=2))
    elif not records:
        typer.echo("No team has limits. Set some with: millstream teams set NAME", err=True)
    else:
        rows = [(record.name, limits_text(record.limits), date_text(record.created_at)) for record in records]
        print_table(("NAME", "LIMITS", "CREATED"), rows)


@teams.command()
def remove(name: Name, config: ConfigFile = None) -> None:
    """Lift all limits of a team. Its keys stay in it, and keep their own."""
    with key_store(config) as store:
        store.remove_team(name)
    typer.echo(f"{name} has no limits any more.")
