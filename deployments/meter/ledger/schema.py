"""The meter's tables, as SQLAlchemy sees them; deployments/meter/migrations has how they came about, step by step.

Times are Unix seconds (`_at`) and durations seconds (`_s`); money is in the currency of the models' prices.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

__all__ = ["KEYS", "METADATA", "REQUESTS", "REVISIONS", "TEAMS", "USAGE_HOURS"]

METADATA: Final = sa.MetaData()

REQUESTS: Final = sa.Table(
    "requests",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("key_id", sa.String, nullable=False),
    sa.Column("team", sa.String),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("dialect", sa.String, nullable=False, server_default="D3"),
    sa.Column("caller_request_id", sa.String),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("witness", sa.String, nullable=False, server_default="ingress"),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("parts", sa.String),
    sa.Column("choices", sa.BigInteger, nullable=False),
    sa.Column("resumes", sa.BigInteger, nullable=False),
    sa.Column("reserved_tokens", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("prompt_price", sa.Double, nullable=False, server_default="0"),
    sa.Column("completion_price", sa.Double, nullable=False, server_default="0"),
    sa.Column("cost", sa.Double, nullable=False, server_default="0"),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("admitted_at", sa.Double),
    sa.Column("queue_s", sa.Double),
    sa.Column("first_token_s", sa.Double),
    sa.Column("total_s", sa.Double, nullable=False),
    sa.Column("recorded_at", sa.Double, nullable=False),
    sa.Index("requests_started_at", "started_at"),
    sa.Index("requests_key", "key_id", "started_at"),
)
"""One row per request: contracts.Settlement with its account. `parts` is its dictionary as JSON, prices are per million
tokens, `cost` is what they make of the tokens."""

USAGE_HOURS: Final = sa.Table(
    "usage_hours",
    METADATA,
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
    sa.Index("usage_hours_key", "key_id", "hour"),
    sa.Index("usage_hours_team", "team", "hour"),
)
"""Sums of REQUESTS, kept in the transaction that changes it: `hour` is the Unix time at which the hour of `started_at`
began, and the empty text stands for no team."""

KEYS: Final = sa.Table(
    "keys",
    METADATA,
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
    sa.Column("revision", sa.BigInteger, nullable=False, index=True),
)
"""`digest` is the SHA-256 of the key, `prefix` its first characters, for people to know it by. `labels`, `models` and
`limits` (contracts.Limits) are JSON."""

TEAMS: Final = sa.Table(
    "teams",
    METADATA,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("limits", sa.String, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("removed_at", sa.Double),
    sa.Column("revision", sa.BigInteger, nullable=False, index=True),
)

REVISIONS: Final = sa.Table(
    "revisions",
    METADATA,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
)
"""One row (id 1): each change of a key or a team counts it up first, in its own transaction, so that changes commit in
the order of their revisions and a reader that knows one revision finds all later ones."""
