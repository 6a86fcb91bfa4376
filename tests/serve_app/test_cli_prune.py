"""`millstream usage prune`: what it removes, what it says, and how it asks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
import yaml
from typer.testing import CliRunner, Result

from deployments.meter.ledger.database import open_database
from deployments.meter.ledger.retention import kept_from
from deployments.meter.ledger.rows import write_settlements
from deployments.meter.ledger.schema import REQUESTS, USAGE_HOURS
from serve_app.cli import app
from tests.deployments.accounts import account, settlement
from tests.sqlite import new_database

DAY_S = 86_400
ROOT = Path(__file__).parents[2]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sa.Engine]:
    """With a request of 500 days ago, one of 300 days ago and one of now, of 7 tokens each."""
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path))
    engine = open_database(new_database(tmp_path / "ledger.db"))
    ages = {"old": 500, "older-than-300": 300, "new": 0}
    write_settlements(
        engine,
        [
            settlement(name, 5, account=account(name, started_at=time.time() - days * DAY_S))
            for name, days in ages.items()
        ],
    )
    with engine.begin() as connection:
        connection.execute(sa.update(REQUESTS).values(recorded_at=REQUESTS.c.started_at))
    yield engine
    engine.dispose()


def prune(*arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(app, ["usage", "prune", *arguments], input=answer)


def ids(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.sum(USAGE_HOURS.c.requests))) == connection.scalar(
            sa.select(sa.func.count()).select_from(REQUESTS)
        )
        return sorted(connection.scalars(sa.select(REQUESTS.c.id)))


def day(days_ago: int) -> str:
    return datetime.fromtimestamp(time.time() - days_ago * DAY_S, UTC).strftime("%Y-%m-%d")


def test_a_dry_run_tells_and_removes_nothing(engine: sa.Engine) -> None:
    result = prune("--older-than", "200d", "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Would remove 2 requests with 14 tokens, from before {day(200)} ")
    assert ids(engine) == ["new", "old", "older-than-300"]


def test_it_asks_and_removes_nothing_unless_it_is_told_to(engine: sa.Engine) -> None:
    for answer in ("n\n", ""):  # and where nobody can be asked
        result = prune("--older-than", "400d", answer=answer)
        assert (result.exit_code, "Removed" in result.stdout) == (1, False)
        assert "Remove 1 request with 7 tokens" in result.stderr
        assert "--yes does not ask" in result.stderr
    assert ids(engine) == ["new", "old", "older-than-300"]
    result = prune("--older-than", "400d", answer="y\n")
    assert result.exit_code == 0
    assert "Removed 1 request with 7 tokens, from before " in result.stdout
    assert ids(engine) == ["new", "older-than-300"]
    result = prune("--older-than", "400d")  # nothing is left to ask about
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("Removed 0 requests with 0 tokens")


@pytest.mark.parametrize(("age", "date"), [(400, 200), (200, 400)])
def test_with_both_options_it_must_be_older_than_either(engine: sa.Engine, age: int, date: int) -> None:
    result = prune("--older-than", f"{age}d", "--before", day(date), "--yes")
    assert (result.exit_code, result.stderr) == (0, "")
    assert ids(engine) == ["new", "older-than-300"]


def test_what_quotas_and_late_settlements_need_is_kept_and_told(engine: sa.Engine) -> None:
    result = prune("--older-than", "0d", "--yes")
    assert result.exit_code == 0
    kept = datetime.fromtimestamp(kept_from(time.time()), UTC).strftime("%Y-%m-%d")
    assert f"All from {kept} " in result.stderr
    assert "quotas of the month" in result.stderr
    assert ids(engine) == ["new"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--older-than, such as 400d", "--before"]),
        (["--older-than", "old"], ["--older-than", "'old'", "30d"]),
        (["--before", "2999-01-01"], ["--before", "'2999-01-01'", "has passed"]),
    ],
)
def test_wrong_options_are_told_in_a_line(engine: sa.Engine, arguments: list[str], words: list[str]) -> None:
    result = prune(*arguments, "--yes")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    for word in words:
        assert word in result.stderr
    assert len(ids(engine)) == 3


def test_options_of_the_report_are_not_taken_for_those_of_prune(engine: sa.Engine, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["usage", "--config", "other.yaml", "prune", "--older-than", "400d", "--yes"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "--config: before `prune` it is of the report, expected behind it\n"
    assert len(ids(engine)) == 3


def test_the_cron_job_of_the_documentation_prunes_the_clusters_ledger(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    job = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    [container] = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        secret = variable.get("valueFrom", {}).get("secretKeyRef")
        assert secret in (None, {"name": "millstream-database", "key": "url"})
        monkeypatch.setenv(variable["name"], str(engine.url) if secret else variable["value"])
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path / "elsewhere"))  # in the pod there is nothing
    program, *arguments = container["command"]
    assert program == "millstream"
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("Removed 1 request ")
    assert os.environ["MILLSTREAM_POD_CLUSTER"] == job["metadata"]["labels"]["app.kubernetes.io/instance"]
