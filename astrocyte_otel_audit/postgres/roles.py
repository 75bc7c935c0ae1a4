"""Least privilege: a group role each for writing, reading and sweeping the log, to make login roles members of."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from astrocyte_otel_audit.errors import AuditError
from astrocyte_otel_audit.postgres.migrate import alone_in
from astrocyte_otel_audit.postgres.statements import statement


class RolesError(AuditError):
    """The roles can't be made, or can't have their rights and no others; the message says what to do.

    Neither roles nor rights have changed then.
    """


class Roles(NamedTuple):
    """Names of the three roles. None may log in."""

    #: INSERT, on the table and on its side table.
    writer: str
    #: SELECT on both, and on the holds.
    reader: str
    #: SELECT and DELETE on both, and SELECT on the holds.
    sweeper: str

    @classmethod
    def named(cls, prefix: str) -> Roles:
        """Return the names that begin with a prefix."""
        return cls(*(f"{prefix}_{kind}" for kind in cls._fields))

    @property
    def next_step(self) -> str:
        """The statement that lets a login role write."""
        return f"GRANT {_shown(self.writer)} TO app_user"


def grant_roles(
    connection: psycopg.Connection[Any],
    schema: str,
    table: str,
    role_prefix: str,
    *,
    lock_timeout_seconds: float = 30.0,
) -> Roles:
    """Make the roles that are missing, and give each its rights on one schema's table, in one transaction.

    Whatever else they, or PUBLIC, could do with the table, its partitions and its side tables is revoked. Safe to
    repeat; any number of processes may call it at once, of different databases too, since roles are the server's.

    Args:
        connection: not inside a transaction; as the owner of the tables, and of their schema unless PUBLIC may use it;
            with CREATEROLE where a role is missing.
        schema: where the table is.
        table: name of the table.
        role_prefix: what the names of the roles begin with.
        lock_timeout_seconds: how long to wait for one lock.

    Raises:
        RolesError: a right is missing for it, or a role there would have others than its own.
        psycopg.Error: any other; `faults.classify` says what it means.
    """
    roles = Roles.named(role_prefix)
    with alone_in(connection, schema, lock_timeout_seconds) as cursor:
        there, partitions, grants, differences = (
            statement(name, schema, table, **roles._asdict())
            for name in ("roles_there", "roles_partitions", "grant_roles", "roles_differ")
        )
        _make(connection, cursor, there, roles)
        try:
            cursor.execute(grants)
            for partition in cursor.execute(partitions).fetchall():
                cursor.execute(statement("revoke_partition", *partition, **roles._asdict()))
        except psycopg.errors.InsufficientPrivilege:
            raise RolesError(
                "the roles can't be given their rights: repeat this as the owner of the tables and their schema"
            ) from None
        if found := cursor.execute(differences).fetchall():
            raise RolesError(_difference(*found[0]))
    return roles


def _make(connection: psycopg.Connection[Any], cursor: psycopg.Cursor[Any], there: sql.Composed, names: Roles) -> None:
    can_login = dict(cursor.execute(there).fetchall())
    if used := [_shown(name) for name, may in can_login.items() if may]:
        raise RolesError(f"{used[0]} is a role that may log in: choose another prefix, or ALTER ROLE {used[0]} NOLOGIN")
    missing = [name for name in names if name not in can_login]
    for name in missing:
        try:
            with connection.transaction():
                cursor.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(name)))
        except (psycopg.errors.DuplicateObject, psycopg.errors.UniqueViolation):
            pass  # made meanwhile, as from another database of the server
        except psycopg.errors.InsufficientPrivilege:
            statements = "; ".join(f"CREATE ROLE {_shown(name)}" for name in missing)
            raise RolesError(
                f"the roles can't be made, as that needs CREATEROLE: let somebody who has it run `{statements}` and "
                "repeat this; the tables are as they were"
            ) from None


def _difference(role: str, privilege: str, relation: str, is_more: bool) -> str:
    if is_more:
        return (
            f"{_shown(role)} may also {privilege} {relation}, as a superuser or owner, as a member of another role or "
            "by its grant: end that, or choose another prefix"
        )
    return (
        f"{_shown(role)} can't be given {privilege} on {relation}: repeat this as the owner of the tables and their "
        "schema"
    )


def _shown(name: str) -> str:
    """Return a name as SQL takes it, with quotes only where it needs them."""
    return name if re.fullmatch("[a-z_][a-z0-9_]*", name) else sql.Identifier(name).as_string(None)
