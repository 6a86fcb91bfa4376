"""The options `--requests-per-minute` to `--money-per-month`, which keys and teams share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from serve_app.cli.database import InputError

__all__ = [
    "Concurrency",
    "MoneyPerDay",
    "MoneyPerMonth",
    "RequestsPerMinute",
    "TokensPerDay",
    "TokensPerMinute",
    "TokensPerMonth",
    "parse_limits",
]

_PANEL = "Limits (a number, or `none` to lift one)"

RequestsPerMinute = Annotated[
    str | None,
    typer.Option(
        "--requests-per-minute", metavar="N", help="Requests admitted in any 60 seconds.", rich_help_panel=_PANEL
    ),
]
TokensPerMinute = Annotated[
    str | None,
    typer.Option(
        "--tokens-per-minute",
        metavar="N",
        help="Tokens, prompt + completion, of the requests admitted in any 60 seconds.",
        rich_help_panel=_PANEL,
    ),
]
Concurrency = Annotated[
    str | None, typer.Option("--concurrency", metavar="N", help="Requests at a time.", rich_help_panel=_PANEL)
]
TokensPerDay = Annotated[
    str | None, typer.Option("--tokens-per-day", metavar="N", help="Tokens of a day in UTC.", rich_help_panel=_PANEL)
]
TokensPerMonth = Annotated[
    str | None,
    typer.Option("--tokens-per-month", metavar="N", help="Tokens of a month in UTC.", rich_help_panel=_PANEL),
]
MoneyPerDay = Annotated[
    str | None,
    typer.Option(
        "--money-per-day",
        metavar="X",
        help="Cost of a day in UTC, in the currency of the models' prices.",
        rich_help_panel=_PANEL,
    ),
]
MoneyPerMonth = Annotated[
    str | None,
    typer.Option("--money-per-month", metavar="X", help="Cost of a month in UTC.", rich_help_panel=_PANEL),
]


def parse_limits(**given: str | None) -> dict[str, Any]:
    """Numbers by field of contracts.Limits, those that are given; None lifts one. Raises InputError."""
    limits: dict[str, Any] = {}
    for name, text in given.items():
        if text is None:
            continue
        money = name.startswith("money")
        try:
            limits[name] = None if text == "none" else float(text) if money else int(text)
        except ValueError:
            option = f"--{name.replace('_', '-')}"
            expected = "a number" if money else "an integer"
            raise InputError(f"{option}: got {text!r}, expected {expected} or none") from None
    return limits
