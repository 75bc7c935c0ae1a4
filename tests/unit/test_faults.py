"""Every error that Postgres answers with falls into one of three classes, and its message is ours."""

import psycopg
import pytest
from psycopg_pool import PoolClosed, PoolTimeout

from astrocyte_otel_audit.postgres import Fault, FaultClass
from astrocyte_otel_audit.postgres.faults import classify, connection_fault

#: Stands for what an error's own words may quote: a payload, a password, a DSN.
SECRET = "hunter2-secret"


def refusal(sqlstate: str) -> psycopg.Error:
    """Return an error as a server's answer raises it, with words that nobody may see."""
    try:
        kind = psycopg.errors.lookup(sqlstate)
    except KeyError:
        kind = type("Unlisted", (psycopg.DatabaseError,), {"sqlstate": sqlstate})
    return kind(f"refused\nDETAIL:  Failing row contains ({SECRET}).")


RETRY = {
    "08006": "connection failure",
    "25006": "read-only transaction, on a standby",
    "25P03": "idle in a transaction for too long",
    "25P04": "transaction timeout",
    "28000": "invalid authorization",
    "28P01": "invalid password",
    "3D000": "no such database",
    "40001": "serialization failure",
    "40P01": "deadlock",
    "53100": "disk full",
    "53200": "out of memory",
    "53300": "too many connections",
    "55006": "object in use",
    "57P01": "administrator's shutdown",
    "57P02": "crash of a server process",
    "57P03": "starting up",
    "58030": "file system error",
}
PARK = {
    "0A000": "feature not supported",
    "23514": "no constraint's name: no partition takes the row",
    "3F000": "no such schema",
    "42501": "a right is missing",
    "42601": "syntax error",
    "42703": "no such column",
    "42804": "other types",
    "42809": "no table",
    "42P01": "no such table",
    "55000": "a view that can't be written to",
    "55P03": "lock not available",
    "57014": "statement cancelled",
    "XX001": "corrupted data",
    "ZZ123": "a code that no manual lists",
}
SET_ASIDE = {
    "22001": "text too long",
    "22003": "number out of range",
    "22021": "not a character",
    "22P02": "not an input of the type",
    "22P05": "not translatable",
    "23502": "not null",
    "23503": "foreign key",
    "23505": "unique",
    "27000": "triggered data change",
    "44000": "check option",
    "54000": "program limit, as of an index entry",
    "P0001": "a trigger's own exception",
    "P0004": "a trigger's assertion",
}


@pytest.mark.parametrize(
    ("sqlstate", "kind"),
    [
        pytest.param(sqlstate, kind, id=f"{sqlstate} {meaning}")
        for kind, states in (
            (FaultClass.RETRY, RETRY), (FaultClass.PARK, PARK), (FaultClass.SET_ASIDE, SET_ASIDE)
        )
        for sqlstate, meaning in states.items()
    ],
)  # fmt: skip
def test_the_sqlstate_decides_what_becomes_of_the_records(sqlstate, kind):
    fault = classify(refusal(sqlstate))

    assert fault.kind is kind
    assert fault.sqlstate == sqlstate


@pytest.mark.parametrize("sqlstate", [*RETRY, *PARK, *SET_ASIDE])
def test_a_fault_shows_the_sqlstate_and_one_line_of_ours(sqlstate):
    shown = str(classify(refusal(sqlstate)))

    assert shown.endswith(f"[SQLSTATE {sqlstate}]")
    assert SECRET not in shown
    assert "DETAIL" not in shown
    assert "\n" not in shown


def test_a_fault_without_a_sqlstate_shows_its_reason_only():
    assert str(Fault(FaultClass.RETRY, "nothing listens")) == "nothing listens"


SOCKET = 'connection failed: connection to server on socket "/run/.s.PGSQL.5432" failed: '
TCP = 'connection failed: connection to server at "10.0.0.1", port 5432 failed: '


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (TCP + "Connection refused\n\tIs the server running on that host?", "nothing listens"),
        (SOCKET + "No such file or directory", "no such socket"),
        (TCP + "Connection timed out", "no answer in time"),
        (TCP + "timeout expired", "no answer in time"),
        ("connection timeout expired", "no answer in time"),
        ("failed to resolve host 'db.invalid': [Errno -2] Name or service not known", "can't be resolved"),
        (TCP + 'FATAL:  password authentication failed for user "u"', "the password is wrong"),
        (TCP + "fe_sendauth: no password supplied", "wants a password"),
        (TCP + 'FATAL:  no pg_hba.conf entry for host "10.0.0.9", user "u", database "d"', "does not admit this user"),
        (
            TCP + 'FATAL:  pg_hba.conf rejects connection for host "h", user "u", database "d"',
            "does not admit this user",
        ),
        (SOCKET + 'FATAL:  Peer authentication failed for user "u"', "the login failed"),
        (TCP + 'FATAL:  role "u" does not exist', "the role does not exist"),
        (TCP + 'FATAL:  role "u" is not permitted to log in', "may not log in"),
        (TCP + 'FATAL:  database "d" does not exist', "the database does not exist"),
        (TCP + 'FATAL:  database "d" is not currently accepting connections', "lets nobody in"),
        (TCP + 'FATAL:  permission denied for database "d"\nDETAIL:  User does not have CONNECT', "GRANT CONNECT"),
        (TCP + 'FATAL:  too many connections for role "u"', "no connection free"),
        (TCP + 'FATAL:  too many connections for database "d"', "no connection free"),
        (TCP + "FATAL:  sorry, too many clients already", "no connection free"),
        (TCP + "FATAL:  remaining connection slots are reserved for roles with SUPERUSER", "no connection free"),
        (TCP + "FATAL:  the database system is starting up", "starting up"),
        (TCP + "FATAL:  the database system is shutting down", "shutting down"),
        (TCP + "server does not support SSL, but SSL was required", "encrypted connection"),
        (TCP + "SSL error: certificate verify failed", "encrypted connection"),
        ("consuming input failed: SSL connection has been closed unexpectedly", "the connection broke"),
        ("consuming input failed: SSL SYSCALL error: EOF detected", "the connection broke"),
        ("consuming input failed: server closed the connection unexpectedly", "the connection broke"),
        ("the connection is lost", "the connection broke"),
        ("something that no list knows", "the connection failed"),
    ],
)
def test_what_libpq_says_without_a_sqlstate_is_retried_with_a_reason_that_helps(message, reason):
    fault = classify(psycopg.OperationalError(message))

    assert fault.kind is FaultClass.RETRY
    assert reason in fault.reason
    assert fault.sqlstate is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PoolTimeout("couldn't get a connection after 30.00 sec"), "the lent pool"),
        (PoolClosed("the pool 'pool-1' is already closed"), "the lent pool"),
    ],
)
def test_a_lent_pool_that_gives_no_connection_is_named_as_such(error, reason):
    fault = classify(error)

    assert fault.kind is FaultClass.RETRY
    assert reason in fault.reason


@pytest.mark.parametrize(
    "error",
    [
        psycopg.DataError(f"PostgreSQL text fields cannot contain NUL: {SECRET}"),
        ValueError(SECRET),
        TypeError(SECRET),
        AttributeError(SECRET),
        OverflowError(SECRET),
        UnicodeEncodeError("utf-8", f"\ud800{SECRET}", 0, 1, "surrogates not allowed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_record_that_makes_no_statement_is_set_aside(error):
    fault = classify(error)

    assert fault.kind is FaultClass.SET_ASIDE
    assert type(error).__name__ in fault.reason
    assert SECRET not in str(fault)


@pytest.mark.parametrize(
    "error", [RuntimeError(SECRET), KeyError(SECRET), MemoryError(SECRET), psycopg.ProgrammingError(SECRET)], ids=repr
)
def test_what_nobody_expected_is_parked_since_nothing_is_lost_by_waiting(error):
    fault = classify(error)

    assert fault.kind is FaultClass.PARK
    assert type(error).__name__ in fault.reason
    assert SECRET not in str(fault)


def test_a_broken_socket_is_retried():
    assert classify(BrokenPipeError(SECRET)).kind is FaultClass.RETRY


def test_the_words_of_a_failed_connection_are_never_repeated():
    error = psycopg.OperationalError(f'connection to "postgresql://u:{SECRET}@h/d" failed: Connection refused')

    assert SECRET not in str(classify(error))


@pytest.mark.parametrize(
    "error",
    [
        psycopg.ProgrammingError(f"invalid value: {SECRET}"),
        psycopg.errors.lookup("42501")(SECRET),
        psycopg.errors.lookup("22023")(SECRET),
        ValueError(SECRET),
        UnicodeError(SECRET),
        RuntimeError(SECRET),
        PoolTimeout(SECRET),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_record_is_to_blame_where_there_is_no_connection(error):
    fault = connection_fault(error)

    assert fault.kind is FaultClass.RETRY
    assert SECRET not in str(fault)
