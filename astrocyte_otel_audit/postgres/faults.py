"""Faults: every error that Postgres can answer with, as one of three classes, in one table.

*Retry*: the same statement can succeed later (connection, shutdown, lock, disk, read-only). *Park*: this tenant
waits for somebody to act (table, schema or right missing), the others go on. *Set aside*: this very record can
never be stored, and is kept elsewhere with the reason. What is unknown is parked: nothing is lost by waiting.

The words are ours. A server's message can quote a payload, and psycopg's can quote a password.
"""

from __future__ import annotations

import enum
import re
from typing import Final, NamedTuple

import psycopg
from psycopg_pool import PoolClosed, PoolTimeout, TooManyRequests


class FaultClass(enum.Enum):
    """What becomes of the records that a fault has hit."""

    RETRY = "retry"
    PARK = "park"
    SET_ASIDE = "set aside"


class Fault(NamedTuple):
    """A classified error: safe to log and to store."""

    kind: FaultClass
    reason: str
    sqlstate: str | None = None

    def __str__(self) -> str:
        return self.reason if self.sqlstate is None else f"{self.reason} [SQLSTATE {self.sqlstate}]"


_RETRY, _PARK, _SET_ASIDE = FaultClass.RETRY, FaultClass.PARK, FaultClass.SET_ASIDE

_NO_RIGHT: Final = (
    "a right is missing; GRANT the role USAGE on the schema, and on the table and on its side table <table>_set_aside "
    "INSERT to write or SELECT to read; migrating needs CREATE on the schema and the table's owner"
)

#: Postgres says so of a table in a missing schema too.
_NO_TABLE: Final = (
    "the table does not exist; run `astrocyte-otel-audit migrate` (--create-schema if its schema is missing too), or "
    "set migrate=True"
)

#: By SQLSTATE (PostgreSQL manual, appendix A): its own entry goes before that of its first two characters.
_BY_SQLSTATE: Final[dict[str, tuple[FaultClass, str]]] = {
    "08": (_RETRY, "the connection broke"),
    "22": (_SET_ASIDE, "a value can't be stored in its column"),
    "23": (_SET_ASIDE, "a constraint of the table refuses the record"),
    # Its own entry where it is a conversion's, see `classify`.
    "conversion": (
        _PARK,
        (
            "the table is being partitioned, and the record begins beyond what was checked; if nobody is at it, run "
            "`astrocyte-otel-audit migrate --partition-by` again"
        ),
    ),
    # Its own entry where it comes without a constraint's name, see `classify`.
    "no partition": (_PARK, "no partition of the table takes the record's start; attach one, or a DEFAULT partition"),
    "25006": (_RETRY, "the server is read-only, as a standby is; point the DSN at the primary"),
    "25P03": (_RETRY, "the server ended the session, as its transaction was idle for too long"),
    "25P04": (_RETRY, "the server ended the session, as its transaction took too long"),
    "27": (_SET_ASIDE, "a trigger of the table refuses the record"),
    "28": (_RETRY, "the server refuses the login; check user, password and pg_hba.conf"),
    "3D": (_RETRY, "the database does not exist; create it or correct the DSN"),
    "3F": (_PARK, "the schema does not exist; create it, or run `astrocyte-otel-audit migrate --create-schema`"),
    "40": (_RETRY, "the transaction was rolled back by a concurrent one"),
    "42501": (_PARK, _NO_RIGHT),
    "42703": (_PARK, "the table lacks a column; run `astrocyte-otel-audit migrate`, if it is an audit log"),
    "42P01": (_PARK, _NO_TABLE),
    "42804": (_PARK, "the table's columns have other types; is it an audit log?"),
    "44": (_SET_ASIDE, "a view's check option refuses the record"),
    "53": (_RETRY, "the server is out of disk, memory or connections"),
    "54": (_SET_ASIDE, "the record exceeds a limit of Postgres"),
    "55": (_RETRY, "the server's object is in use"),
    "55P03": (_PARK, "the table is locked by somebody else"),
    "55000": (_PARK, "no rows can be added to what has the table's name; is it a view?"),
    "57": (_RETRY, "the server is shutting down or starting up, or ended the session"),
    "57014": (_PARK, "the statement was cancelled or took too long; is the table locked, or the server overloaded?"),
    "58": (_RETRY, "the server has trouble with its own files"),
    "P0": (_SET_ASIDE, "a trigger of the table refuses the record"),
}

#: A login that fails has no SQLSTATE in libpq, only a message, which we look into and never repeat.
_BY_MESSAGE: Final[tuple[tuple[str, str], ...]] = (
    ("password authentication failed", "the password is wrong; correct it in the DSN"),
    ("no password supplied", "the server wants a password; put one into the DSN, or into ~/.pgpass"),
    ("pg_hba.conf", "the server's pg_hba.conf does not admit this user from here to this database; add a line to it"),
    ("authentication failed", "the login failed; check the user and its way of authentication"),
    ("too many", "the server has no connection free; raise max_connections or close some"),
    ("remaining connection slots", "the server has no connection free; raise max_connections or close some"),
    ("is not permitted to log in", "the role may not log in; ALTER ROLE … LOGIN, or correct the DSN"),
    ("permission denied for database", "the role may not use the database; GRANT CONNECT on it, or correct the DSN"),
    ("not currently accepting connections", "the database lets nobody in; ALTER DATABASE … ALLOW_CONNECTIONS true"),
    ('role "', "the role does not exist; create it or correct the DSN"),
    ('database "', "the database does not exist; create it or correct the DSN"),
    ("starting up", "the server is starting up"),
    ("shutting down", "the server is shutting down"),
    ("could not translate host name", "the host's name can't be resolved; correct the DSN"),
    ("failed to resolve host", "the host's name can't be resolved; correct the DSN"),
    ("connection refused", "nothing listens at that host and port; is Postgres running?"),
    ("no such file or directory", "there is no such socket; is Postgres running?"),
    ("timeout", "no answer in time; is the host reachable?"),
    ("timed out", "no answer in time; is the host reachable?"),
    ("closed the connection", "the connection broke"),
    ("connection has been closed", "the connection broke"),
    ("connection is lost", "the connection broke"),
    ("eof detected", "the connection broke"),
    ("ssl", "the encrypted connection failed; check sslmode and the certificates"),
)


#: Name of the constraint that stands while a table is being partitioned; see `switch.Target.check`.
_CONVERSIONS_CHECK: Final = re.compile(r"_before_\d{8}$")

#: What migrating can mend: a schema, a table or a column that isn't there.
MENDED_BY_MIGRATING: Final = frozenset({"3F000", "42P01", "42703"})


def classify(error: BaseException) -> Fault:
    """Return the class of an error that a statement raised, with a reason that is safe to show.

    For an error of connecting, before there was a statement, see `connection_fault`.
    """
    sqlstate = getattr(error, "sqlstate", None)
    if isinstance(sqlstate, str):
        if sqlstate == "23514" and isinstance(error, psycopg.Error):
            constraint = error.diag.constraint_name
            if constraint is None:
                return Fault(*_BY_SQLSTATE["no partition"], sqlstate)
            if _CONVERSIONS_CHECK.search(constraint):
                return Fault(*_BY_SQLSTATE["conversion"], sqlstate)
        for length in (5, 2):
            if (found := _BY_SQLSTATE.get(sqlstate[:length])) is not None:
                return Fault(*found, sqlstate)
        return Fault(_PARK, "Postgres refuses the statement; see the SQLSTATE", sqlstate)
    if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError, psycopg.InternalError, OSError)):
        return connection_fault(error)
    if isinstance(error, (psycopg.DataError, ValueError, TypeError, AttributeError, OverflowError)):
        return Fault(_SET_ASIDE, f"the record can't be turned into a statement ({type(error).__name__})")
    return Fault(_PARK, f"an unexpected {type(error).__name__}")


def connection_fault(error: BaseException) -> Fault:
    """Return the fault of a connection that could not be had, or broke: always retry, as no record is to blame."""
    sqlstate = getattr(error, "sqlstate", None)
    if isinstance(sqlstate, str):
        found = _BY_SQLSTATE.get(sqlstate[:5]) or _BY_SQLSTATE.get(sqlstate[:2])
        return Fault(
            _RETRY, "the server gives no connection; see the SQLSTATE" if found is None else found[1], sqlstate
        )
    if isinstance(error, (PoolClosed, PoolTimeout, TooManyRequests)):
        return Fault(_RETRY, "the lent pool gives no connection; is it open, large enough, and is Postgres running?")
    message = str(error).lower()
    reason = next((reason for fragment, reason in _BY_MESSAGE if fragment in message), None)
    return Fault(_RETRY, reason or f"the connection failed ({type(error).__name__})")
