"""Who counted, for whom, at which price; sums per hour; keys and teams. Rows from before have no price."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    _extend_requests()
    _create_usage_hours()
    _create_keys()


def _extend_requests() -> None:
    for column in (
        sa.Column("team", sa.String),
        sa.Column("dialect", sa.String, nullable=False, server_default="D3"),
        sa.Column("caller_request_id", sa.String),
        sa.Column("witness", sa.String, nullable=False, server_default="ingress"),
        sa.Column("parts", sa.String),
        sa.Column("reserved_tokens", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("prompt_price", sa.Double, nullable=False, server_default="0"),
        sa.Column("completion_price", sa.Double, nullable=False, server_default="0"),
        sa.Column("cost", sa.Double, nullable=False, server_default="0"),
        sa.Column("admitted_at", sa.Double),
        sa.Column("queue_s", sa.Double),
    ):
        op.add_column("requests", column)
    op.create_index("requests_started_at", "requests", ["started_at"])
    op.create_index("requests_key", "requests", ["key_id", "started_at"])


def _create_usage_hours() -> None:
    op.create_table(
        "usage_hours",
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("key_id", sa.String, primary_key=True),
        sa.Column("team", sa.String, primary_key=True),
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("dialect", sa.String, primary_key=True),
        sa.Column("status", sa.String, primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost", sa.Double, nullable=False),
    )
    op.create_index("usage_hours_key", "usage_hours", ["key_id", "hour"])
    op.create_index("usage_hours_team", "usage_hours", ["team", "hour"])
    # A cast cuts off in SQLite and rounds in PostgreSQL.
    whole = "started_at / 3600" if op.get_bind().dialect.name == "sqlite" else "floor(started_at / 3600)"
    op.execute(
        "INSERT INTO usage_hours (hour, key_id, team, model, dialect, status,"
        " requests, prompt_tokens, cached_tokens, completion_tokens, cost)"
        f" SELECT CAST({whole} AS BIGINT) * 3600, key_id, '', model, dialect, status,"
        " count(*), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens), sum(cost)"
        " FROM requests GROUP BY 1, 2, 3, 4, 5, 6"
    )


def _create_keys() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("prefix", sa.String, nullable=False),
        sa.Column("owner", sa.String),
        sa.Column("team", sa.String),
        sa.Column("labels", sa.String, nullable=False),
        sa.Column("models", sa.String),
        sa.Column("limits", sa.String, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("revoked_at", sa.Double),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_keys_revision", "keys", ["revision"])
    op.create_table(
        "teams",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("limits", sa.String, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("removed_at", sa.Double),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_teams_revision", "teams", ["revision"])
    revisions = op.create_table(
        "revisions",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(revisions, [{"id": 1, "revision": 0}])
