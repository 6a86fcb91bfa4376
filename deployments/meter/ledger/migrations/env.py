"""Alembic runs this file for each of its commands: in the transaction of
deployments/meter/ledger/migrations/__init__.py."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
