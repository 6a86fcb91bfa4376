"""How the tables of deployments/meter/ledger/schema.py came about, step by step, and how a database gets there.

Alembic takes the steps. It is imported only where there are any: a meter and a command line that find the database as
they need it start without.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from deployments.meter.errors import MeterError
from deployments.meter.ledger.database import writing

__all__ = ["HEAD", "SchemaTooNew", "migrate"]

HEAD: Final = "0002"
"""The revision that this version of the code works with; revisions are numbers, in order."""
_ADVISORY_LOCK: Final = 0x6D696C6C  # "mill"
_alembic = threading.Lock()
"""Alembic's operations go through variables of its modules."""


class SchemaTooNew(MeterError):
    """A later version of the code has been here. Nothing was changed."""

    def __init__(self, revision: str) -> None:
        super().__init__(revision)
        self.revision = revision

    def __str__(self) -> str:
        return (
            f"the database is at revision {self.revision}, this version of millstream knows none after {HEAD}: "
            "use the later version, or another database"
        )


def migrate(engine: sa.Engine) -> None:
    """Brings the database to HEAD, in one transaction; safe while others do the same, and quick when nothing is to do.

    Raises SchemaTooNew, and what the database raises.
    """
    with engine.connect() as connection:
        if _is_current(connection):
            return
    with _alembic, writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL lock_timeout = '60s'")
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
        if not _is_current(connection):  # else another was faster
            _upgrade(connection)


def _is_current(connection: sa.Connection) -> bool:
    if not sa.inspect(connection).has_table("alembic_version"):
        return False
    revision = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    if revision is not None and revision > HEAD:
        raise SchemaTooNew(revision)
    return revision == HEAD


def _upgrade(connection: sa.Connection) -> None:
    from alembic import command  # a fifth of a second
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, HEAD)
