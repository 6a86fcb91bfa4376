from __future__ import annotations

import multiprocessing
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from deployments.contracts import UsageQuery, UsageRow
from deployments.meter.ledger import migrations
from deployments.meter.ledger.database import open_database
from deployments.meter.ledger.migrations import HEAD, SchemaTooNew, migrate
from deployments.meter.ledger.schema import METADATA, REQUESTS, REVISIONS
from deployments.meter.ledger.usage import read_usage

VERSION_0_1 = sa.Table(
    "requests",
    sa.MetaData(),
    sa.Column("id", sa.String, primary_key=True),
    *(sa.Column(name, sa.String, nullable=False) for name in ("key_id", "model", "status")),
    *(
        sa.Column(name, sa.BigInteger, nullable=False)
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "choices", "resumes")
    ),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("first_token_s", sa.Double),
    sa.Column("total_s", sa.Double, nullable=False),
    sa.Column("recorded_at", sa.Double, nullable=False),
)


@pytest.fixture
def engine(bare_database_url: str) -> Iterator[sa.Engine]:
    engine = open_database(bare_database_url)
    yield engine
    engine.dispose()


def differences(engine: sa.Engine) -> list[object]:
    with engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), METADATA))


def test_a_new_database_is_as_the_schema_says(engine: sa.Engine) -> None:
    assert differences(engine)
    migrate(engine)
    assert differences(engine) == []


def test_the_revision_of_the_keys_is_there_to_be_counted_up(engine: sa.Engine) -> None:
    migrate(engine)
    with engine.connect() as connection:
        assert connection.execute(sa.select(REVISIONS)).all() == [(1, 0)]


def test_a_ledger_of_version_0_1_keeps_its_rows_and_gains_their_sums(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        VERSION_0_1.create(connection)
        for number, started_at in enumerate((3600.0, 7199.9, 7200.0)):
            connection.execute(
                VERSION_0_1.insert().values(
                    (f"cmpl-{number}", "admin", "m", "finished", 10, 4, 5, 1, 0, started_at, None, 1.5, 2.5)
                )
            )
    migrate(engine)
    assert differences(engine) == []
    with engine.connect() as connection:
        row = connection.execute(sa.select(REQUESTS).where(REQUESTS.c.id == "cmpl-1")).mappings().one()
        hours = read_usage(connection, UsageQuery(since=0.0, width_s=3600, by=("team", "dialect")))
    assert (row["started_at"], row["total_s"], row["recorded_at"]) == (7199.9, 1.5, 2.5)
    assert (row["team"], row["dialect"], row["witness"], row["parts"], row["cost"]) == (None, "D3", "ingress", None, 0)
    assert hours == [
        UsageRow(2, 20, 8, 10, 0.0, 3600, team="", dialect="D3"),
        UsageRow(1, 10, 4, 5, 0.0, 7200, team="", dialect="D3"),
    ]


def test_migrating_again_changes_nothing(engine: sa.Engine) -> None:
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(sa.update(REVISIONS).values(revision=7))
    migrate(engine)
    with engine.connect() as connection:
        assert connection.scalar(sa.select(REVISIONS.c.revision)) == 7


def test_a_migration_that_fails_leaves_nothing_of_itself(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE teams (other INTEGER)")
    with pytest.raises(sa.exc.DBAPIError, match="already exists"):
        migrate(engine)
    assert sa.inspect(engine).get_table_names() == ["teams"]
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE teams")
    migrate(engine)
    assert differences(engine) == []


def test_a_database_of_a_later_version_is_refused(engine: sa.Engine) -> None:
    migrate(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0099'")
    with pytest.raises(SchemaTooNew, match="revision 0099, this version of millstream knows none after") as refusal:
        migrate(engine)
    assert pickle.loads(pickle.dumps(refusal.value)).revision == "0099"


def test_the_head_is_the_last_step() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    script = ScriptDirectory.from_config(config)
    assert script.get_heads() == [HEAD]
    revisions = [step.revision for step in script.walk_revisions()]
    assert revisions == sorted(revisions, reverse=True)


def migrate_when_told(database_url: str, start: multiprocessing.synchronize.Barrier) -> None:
    engine = open_database(database_url)
    start.wait(30)
    migrate(engine)
    engine.dispose()


def test_several_processes_may_migrate_at_the_same_time(engine: sa.Engine, bare_database_url: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    start = context.Barrier(4)
    processes = [context.Process(target=migrate_when_told, args=(bare_database_url, start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert differences(engine) == []


def test_a_new_sqlite_file_that_another_process_writes_to_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        waits: list[float] = []

        def wait(duration_s: float) -> None:
            waits.append(duration_s)
            if len(waits) == 3:
                other.execute("ROLLBACK")

        monkeypatch.setattr("deployments.meter.ledger.database.time.sleep", wait)
        engine = open_database(f"sqlite:///{tmp_path}/ledger.db")
        migrate(engine)
        assert differences(engine) == []
        engine.dispose()
    assert len(waits) == 3


def test_alembic_is_not_imported_when_there_is_nothing_to_do(engine: sa.Engine, bare_database_url: str) -> None:
    migrate(engine)
    program = (
        "import sys; from deployments.meter.ledger.database import open_database;"
        "from deployments.meter.ledger.migrations import migrate;"
        "migrate(open_database(sys.argv[1])); sys.exit('alembic' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, bare_database_url], check=True, cwd=Path(__file__).parents[4])
