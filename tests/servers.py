"""What tests make on a server themselves: roles that may do less, and databases that outlive one test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from astrocyte_otel_audit.postgres import AuditTable, OwnConnection


@contextmanager
def role(database: str, *grants: str) -> Iterator[str]:
    """Make a role that may log in and what the grants say, such as ``"USAGE ON SCHEMA public"``; give its DSN."""
    name, password = f"audit_{uuid.uuid4().hex}", uuid.uuid4().hex
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(password))
        )
        for grant in grants:
            connection.execute(sql.SQL("GRANT " + grant + " TO {}").format(sql.Identifier(name)))
    try:
        yield make_conninfo(database, user=name, password=password)
    finally:
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@contextmanager
def role_prefix(database: str) -> Iterator[str]:
    """Give what the names of a test's roles may begin with. Roles are the server's, so they are dropped in the end."""
    prefix = f"Audit-{uuid.uuid4().hex[:12]}"
    try:
        yield prefix
    finally:
        drop_roles(database, prefix)


def drop_roles(database: str, prefix: str) -> None:
    """Drop the roles whose names begin so, with what one database has granted to them."""
    with psycopg.connect(database, autocommit=True) as connection:
        for (name,) in connection.execute("SELECT rolname FROM pg_roles WHERE starts_with(rolname, %s)", [prefix]):
            connection.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


@contextmanager
def new_database(server_dsn: str) -> Iterator[str]:
    """Make a database for all tests of a module; give its DSN."""
    name = f"audit_module_{uuid.uuid4().hex}"
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield make_conninfo(server_dsn, dbname=name)
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def emptied(database: str) -> str:
    """Leave nothing in a database but an empty schema public: ten times as quick as dropping and making one."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            """
            SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
            """
        )
        schemas = connection.execute(
            "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'"
        ).fetchall()
        with connection.transaction():
            for (schema,) in schemas:
                connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
            connection.execute("CREATE SCHEMA public; GRANT USAGE ON SCHEMA public TO PUBLIC")
    return database


def emptied_and_migrated(database: str) -> str:
    """Leave nothing in a database but an empty table in schema public."""
    table = AuditTable(OwnConnection(emptied(database)))
    table.migrate()
    table.close()
    return database
