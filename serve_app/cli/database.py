"""The database that the command line works on, with the cluster running or not, and how mistakes are told.

Imports SQLAlchemy only where a database is opened, so that the other commands start without.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.meter.errors import MeterError
from serve_app.config import millstream_home
from serve_app.config_reading import ConfigError, load_cluster_config
from serve_app.running_cluster import ClusterNotFound, database_of_cluster

if TYPE_CHECKING:
    import sqlalchemy as sa

    from deployments.meter.keys.key_store import KeyStore

__all__ = ["ConfigFile", "InputError", "database_url", "key_store", "opened_database", "told_in_a_line"]

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Use the database of this cluster.yaml, instead of that of the pod's cluster or the one started last.",
    ),
]


class InputError(Exception):
    """What was asked for on the command line cannot be done; the text says what and why."""


def database_url(config: Path | None) -> str:
    """`meter.database` of `config`; else of the cluster that commands speak of. Raises ConfigError, ClusterNotFound."""
    home = millstream_home(os.environ)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return database_of_cluster(home, os.environ) if config is None else load_cluster_config(config).meter.database


@contextmanager
def opened_database(config: Path | None) -> Iterator[sa.Engine]:
    """An engine, its tables up to date. What goes wrong with it is told in one line and ends the command with 1."""
    with told_in_a_line():
        import sqlalchemy as sa

        from deployments.meter.ledger.database import open_database, reason
        from deployments.meter.ledger.migrations import migrate

        try:
            engine = open_database(database_url(config))
        except (sa.exc.ArgumentError, ValueError) as error:
            raise InputError(str(error)) from None
        try:
            migrate(engine)
            yield engine
        except sa.exc.SQLAlchemyError as error:
            raise InputError(f"{engine.url.render_as_string(hide_password=True)}: {reason(error)}") from error
        finally:
            engine.dispose()


@contextmanager
def key_store(config: Path | None) -> Iterator[KeyStore]:
    from deployments.meter.keys.key_store import KeyStore

    with opened_database(config) as engine:
        yield KeyStore(engine)


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """Ends the command with status 1 and a line on standard error instead of a traceback."""
    try:
        yield
    except ConfigError as error:
        typer.echo(error, err=True)  # a line per problem
        raise typer.Exit(1) from None
    except (ClusterNotFound, InputError, MeterError, OSError) as error:
        typer.echo(" ".join(str(error).split()), err=True)
        raise typer.Exit(1) from None
