"""Migration: creates the table, or upgrades the one that Astrocyte's migration 023 or an older release made."""

from __future__ import annotations

import hashlib
from typing import Any

import psycopg
from psycopg import sql

from astrocyte_otel_audit.postgres.statements import migrations, statement


def migrate(connection: psycopg.Connection[Any], schema: str, table: str, *, create_schema: bool = False) -> list[str]:
    """Bring one schema's table to the newest version, in one transaction. Any number of processes may call it at once.

    Args:
        connection: not inside a transaction.
        schema: where the table is or shall be.
        table: name of the table; names of its indexes and side tables begin with it.
        create_schema: create the schema if it does not exist.

    Returns:
        Names of the migrations that were applied now; empty where the table was up to date, and then nothing
        was locked.

    Raises:
        psycopg.Error: as it comes; `faults.classify` says what it means.
    """
    if not _pending(connection, schema, table):
        return []
    with connection.transaction():
        # Transaction-scoped, so it also holds behind a transaction pooler and can't be left behind.
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [_lock_key(schema, table)])
        if create_schema:
            connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
        connection.execute(statement("migrations_ledger", schema, table))
        applied: list[str] = []
        for version, name in _missing(connection, schema, table):
            connection.execute(statement(name, schema, table))
            connection.execute(statement("migrations_done", schema, table), [version, name.rpartition("/")[2]])
            applied.append(name.rpartition("/")[2])
    return applied


def _pending(connection: psycopg.Connection[Any], schema: str, table: str) -> bool:
    with connection.transaction():
        ledger = connection.execute(
            "SELECT to_regclass(%s)", [statement("migrations_name", schema, table).as_string(connection).strip()]
        ).fetchone()
        return ledger is None or ledger[0] is None or bool(_missing(connection, schema, table))


def _missing(connection: psycopg.Connection[Any], schema: str, table: str) -> list[tuple[int, str]]:
    done = {row[0] for row in connection.execute(statement("migrations_applied", schema, table))}
    return [(version, name) for version, name in migrations() if version not in done]


def _lock_key(schema: str, table: str) -> int:
    digest = hashlib.sha256(f"astrocyte-otel-audit {schema}.{table}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
