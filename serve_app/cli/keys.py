"""`millstream keys …`: who may use the cluster, and how much."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.contracts import KeyChanges, KeyDraft, KeyRecord, Limits
from deployments.resources import key_card
from deployments.time_parsing import parse_moment
from serve_app.cli.database import ConfigFile, InputError, key_store
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

if TYPE_CHECKING:
    from deployments.meter.keys.key_store import KeyStore, KeyWithSecret

__all__ = ["find_key", "keys", "limits_text"]

keys = typer.Typer(
    help="Make, change and revoke the keys of callers. Works with the cluster running or not.", no_args_is_help=True
)

KeyArgument = Annotated[str, typer.Argument(metavar="ID", help="Id of the key, or its name if no other has it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Models = Annotated[
    list[str] | None,
    typer.Option("--models", metavar="A,B", help="Models it may use, with commas or repeated; `all` for any."),
]
Team = Annotated[str | None, typer.Option(help="Team whose limits hold for it, too; an empty text for none.")]
Owner = Annotated[str | None, typer.Option(help="Whom to ask about it; an empty text for nobody.")]
LabelOptions = Annotated[list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="May be repeated.")]
Expires = Annotated[
    str | None, typer.Option(metavar="WHEN", help="30d from now, 2027-01-31 in UTC, a time in ISO 8601, or `never`.")
]


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="For people to know it by.")],
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrency: Concurrency = None,
    tokens_per_day: TokensPerDay = None,
    tokens_per_month: TokensPerMonth = None,
    money_per_day: MoneyPerDay = None,
    money_per_month: MoneyPerMonth = None,
    models: Models = None,
    team: Team = None,
    owner: Owner = None,
    label: LabelOptions = None,
    expires: Expires = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Make a key and print it, this once: only its SHA-256 is kept. Without limits it may use everything."""
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
        values = _values(models, team, owner, label, expires)
        _show_issued(store.create(KeyDraft(name=name, limits=Limits(**limits), **values)), as_json)


@keys.command("list")
def list_keys(
    team: Annotated[str | None, typer.Option(help="Only the keys of this team.")] = None,
    every: Annotated[bool, typer.Option("--all", help="With those that are revoked.")] = False,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """List the keys, the oldest first."""
    with key_store(config) as store:
        records = store.list_keys(team=team, include_revoked=every)
    if as_json:
        typer.echo(json.dumps([key_card(record) for record in records], indent=2))
        return
    if not records:
        typer.echo("There are no keys. Make one with: millstream keys create NAME", err=True)
        return
    print_table(
        ("ID", "NAME", "KEY", "TEAM", "OWNER", "MODELS", "LIMITS", "CREATED", "STATUS"),
        [
            (
                record.id,
                record.name,
                f"{record.prefix}…",
                record.team or "-",
                record.owner or "-",
                _models_text(record),
                limits_text(record.limits),
                date_text(record.created_at),
                _status(record),
            )
            for record in records
        ],
    )


@keys.command()
def show(key: KeyArgument, as_json: Json = False, config: ConfigFile = None) -> None:
    """Show one key, revoked ones too."""
    with key_store(config) as store:
        _show(find_key(store, key), as_json)


@keys.command()
def update(
    key: KeyArgument,
    name: Annotated[str | None, typer.Option(help="Another name.")] = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrency: Concurrency = None,
    tokens_per_day: TokensPerDay = None,
    tokens_per_month: TokensPerMonth = None,
    money_per_day: MoneyPerDay = None,
    money_per_month: MoneyPerMonth = None,
    models: Models = None,
    team: Team = None,
    owner: Owner = None,
    label: LabelOptions = None,
    expires: Expires = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Change what is given and leave the rest as it is; labels are replaced all together. Acts within 5 seconds."""
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
        values = _values(models, team, owner, label, expires)
        if name is not None:
            values["name"] = name
        if limits:
            values["limits"] = limits
        if not values:
            raise InputError("nothing to change: give at least one option")
        _show(store.update(find_key(store, key).id, KeyChanges(**values)), as_json)


@keys.command()
def revoke(key: KeyArgument, as_json: Json = False, config: ConfigFile = None) -> None:
    """Refuse a key from now on, for good. Acts within 5 seconds."""
    with key_store(config) as store:
        record = store.revoke(find_key(store, key).id)
    if as_json:
        _show(record, as_json)
    else:
        typer.echo(f"Revoked {record.id} ({record.name}).")


@keys.command()
def rotate(key: KeyArgument, as_json: Json = False, config: ConfigFile = None) -> None:
    """Give a key another secret and print it, this once. The old one is refused within 5 seconds."""
    with key_store(config) as store:
        _show_issued(store.rotate(find_key(store, key).id), as_json)


def find_key(store: KeyStore, text: str) -> KeyRecord:
    """By its id, or by its name: of a live key before those that are revoked. Raises InputError."""
    records = store.list_keys(include_revoked=True)
    if found := [record for record in records if record.id == text]:
        return found[0]
    named = [record for record in records if record.name == text]
    found = [record for record in named if record.revoked_at is None] or named
    if not found:
        raise InputError(f"there is no key {text!r}; `millstream keys list --all` lists those there are")
    if len(found) > 1:
        raise InputError(f"several keys are named {text!r}, give an id: {', '.join(record.id for record in found)}")
    return found[0]


def limits_text(limits: Limits) -> str:
    """In a line."""
    amounts = (
        (limits.requests_per_minute, "requests/min"),
        (limits.tokens_per_minute, "tokens/min"),
        (limits.concurrency, "at a time"),
        (limits.tokens_per_day, "tokens/day"),
        (limits.tokens_per_month, "tokens/month"),
        (limits.money_per_day, "money/day"),
        (limits.money_per_month, "money/month"),
    )
    return ", ".join(f"{amount:,} {unit}" for amount, unit in amounts if amount is not None) or "none"


def _values(
    models: list[str] | None, team: str | None, owner: str | None, label: list[str] | None, expires: str | None
) -> dict[str, Any]:
    """Fields of KeyDraft and KeyChanges, those that are given. Raises InputError."""
    values: dict[str, Any] = {}
    if models:
        names = tuple(dict.fromkeys(name for text in models for name in text.split(",")))
        values["models"] = None if names == ("all",) else names
    if team is not None:
        values["team"] = team or None
    if owner is not None:
        values["owner"] = owner or None
    if label:
        labels = dict(text.partition("=")[::2] for text in label)
        if wrong := [text for text in label if "=" not in text]:
            raise InputError(f"--label: got {wrong[0]!r}, expected NAME=VALUE")
        values["labels"] = labels
    if expires is not None:
        try:
            values["expires_at"] = None if expires == "never" else parse_moment(expires, time.time(), "future")
        except ValueError as error:
            raise InputError(f"--expires: got {expires!r}, {error}, or never") from None
    return values


def _show_issued(issued: KeyWithSecret, as_json: bool) -> None:
    record, secret = issued
    if as_json:
        typer.echo(json.dumps(key_card(record, secret), indent=2))
        return
    typer.echo(f"{record.id} ({record.name}), limits: {limits_text(record.limits)}\n\n{secret}\n")
    typer.echo("Store it now: it is kept nowhere and not shown again.", err=True)


def _show(record: KeyRecord, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(key_card(record), indent=2))
        return
    for name, text in (
        ("id", record.id),
        ("name", record.name),
        ("key", f"{record.prefix}…"),
        ("status", _status(record)),
        ("team", record.team or "-"),
        ("owner", record.owner or "-"),
        ("models", _models_text(record)),
        ("limits", limits_text(record.limits)),
        ("labels", ", ".join(f"{name}={value}" for name, value in record.labels.items()) or "-"),
        ("created", f"{date_text(record.created_at)} UTC"),
        ("expires", date_text(record.expires_at, missing="never")),
    ):
        typer.echo(f"{name:<8} {text}")


def _models_text(record: KeyRecord) -> str:
    return "all" if record.models is None else ", ".join(record.models)


def _status(record: KeyRecord) -> str:
    if record.revoked_at is not None:
        return f"revoked {date_text(record.revoked_at)}"
    if record.expires_at is None:
        return "valid"
    return f"{'valid until' if record.expires_at > time.time() else 'expired'} {date_text(record.expires_at)}"
