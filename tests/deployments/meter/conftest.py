"""Databases for the tests of the meter: what is tested on one holds on the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from deployments.meter.ledger.database import open_database
from deployments.meter.ledger.migrations import migrate
from tests.postgres import PostgresServer
from tests.sqlite import new_database


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def bare_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of each kind without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
def database_url(bare_database_url: str, tmp_path: Path) -> str:
    """The same with all tables and no rows."""
    if bare_database_url.startswith("sqlite:"):
        return new_database(tmp_path / "ledger.db")
    engine = open_database(bare_database_url)
    migrate(engine)
    engine.dispose()
    return bare_database_url


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = open_database(database_url)
    yield engine
    engine.dispose()
