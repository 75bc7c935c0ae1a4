"""Migration: creates the table, or upgrades the one that Astrocyte's migration 023 or an older release made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql

from astrocyte_otel_audit.postgres.reader import plain_cursor
from astrocyte_otel_audit.postgres.statements import migrations, statement


def migrate(
    connection: psycopg.Connection[Any],
    schema: str,
    table: str,
    *,
    create_schema: bool = False,
    lock_timeout_seconds: float = 30.0,
) -> list[str]:
    """Bring one schema's table to the newest version, in one transaction. Any number of processes may call it at once.

    Args:
        connection: not inside a transaction.
        schema: where the table is or shall be.
        table: name of the table; names of its indexes and side tables begin with it.
        create_schema: create the schema if it does not exist.
        lock_timeout_seconds: how long to wait for one lock. Whoever waits for a table keeps all others waiting
            behind it, its writers included, so this has an end.

    Returns:
        Names of the migrations that were applied now; empty where the table was up to date, and then nothing
        was locked.

    Raises:
        psycopg.Error: as it comes; `faults.classify` says what it means.
    """
    with brief(connection, lock_timeout_seconds) as cursor:
        if not _pending(cursor, schema, table):
            return []
    with alone_in(connection, schema, lock_timeout_seconds) as cursor:
        if create_schema:
            cursor.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
        cursor.execute(statement("migrations_ledger", schema, table))
        applied: list[str] = []
        for version, name in _missing(cursor, schema, table):
            cursor.execute(statement(name, schema, table))
            cursor.execute(statement("migrations_done", schema, table), [version, name.rpartition("/")[2]])
            applied.append(name.rpartition("/")[2])
    return applied


@contextmanager
def alone_in(
    connection: psycopg.Connection[Any], schema: str, lock_timeout_seconds: float
) -> Iterator[psycopg.Cursor[Any]]:
    """Give a transaction, beside which no other process changes one schema's tables, or who may use them, as we do.

    Args:
        connection: not inside a transaction.
        schema: the tenant's.
        lock_timeout_seconds: how long to wait for one lock.
    """
    with brief(connection, lock_timeout_seconds) as cursor:
        # Transaction-scoped, so it also holds behind a transaction pooler and can't be left behind.
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_lock_key(schema)], prepare=False)
        yield cursor


@contextmanager
def brief(connection: psycopg.Connection[Any], lock_timeout_seconds: float) -> Iterator[psycopg.Cursor[Any]]:
    """Give a transaction that waits for no lock for longer than so many seconds."""
    with connection.transaction():
        cursor = plain_cursor(connection)
        timeout = f"{max(1, lock_timeout_seconds * 1000):.0f}ms"
        cursor.execute("SELECT set_config('lock_timeout', %s, true)", [timeout], prepare=False)
        yield cursor


def try_lock(cursor: psycopg.Cursor[Any], key: int) -> bool:
    """Take an advisory lock, unless somebody has it; return whether it is ours until the transaction ends.

    Of the transaction, not of the session: a transaction pooler gives the next one another session. And a statement of
    its own, so that what comes after it sees what whoever had the lock before has done.
    """
    ((is_ours,),) = cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [key], prepare=False).fetchall()
    return bool(is_ours)


def _pending(cursor: psycopg.Cursor[Any], schema: str, table: str) -> bool:
    (has_ledger,) = cursor.execute(statement("migrations_begun", schema, table)).fetchall()[0]
    return not has_ledger or bool(_missing(cursor, schema, table))


def _missing(cursor: psycopg.Cursor[Any], schema: str, table: str) -> list[tuple[int, str]]:
    done = {row[0] for row in cursor.execute(statement("migrations_applied", schema, table))}
    return [(version, name) for version, name in migrations() if version not in done]


def advisory_key(what: str) -> int:
    """Return the key of the advisory lock that whoever does this, anywhere, has."""
    digest = hashlib.sha256(f"astrocyte-otel-audit {what}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _lock_key(schema: str) -> int:
    # Of the schema, not of the table: two tables of a new schema would both create it.
    return advisory_key(schema)
