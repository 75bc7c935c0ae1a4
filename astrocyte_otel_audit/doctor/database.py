"""Checks of the database: from the DSN to a row that is written, read and gone again."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.doctor.examination import Examination
from astrocyte_otel_audit.doctor.finding import Finding, failed, in_two, ok, skipped, warning
from astrocyte_otel_audit.errors import ConfigurationError, DatabaseUnavailableError
from astrocyte_otel_audit.postgres.inspection import (
    LOG_COLUMNS,
    OLDEST_SERVER,
    SIDE_COLUMNS,
    AuditInspector,
    Relation,
    Rights,
    hosts,
)

_VERIFY = "add sslmode=verify-full, and sslrootcert=… if it needs one, to the DSN"
_MIGRATE = "run `astrocyte-otel-audit migrate`"
_ROLES = "`astrocyte-otel-audit migrate --roles`, and GRANT astrocyte_audit_writer to the role your service logs in as"
#: Seconds between the clocks that are worth a word, and that make a log useless beside its traces.
_SKEW, _FAR = 1.0, 60.0
#: Migrations that writing and reading can do without.
_NOT_FOR_WRITING = frozenset({"004_holds"})
_NO_RIGHT, _LOCKED, _PROTOCOL = "42501", "55P03", "08P01"


def check_dsn(examination: Examination) -> Iterator[Finding]:
    """There is a connection string, and it can be parsed."""
    dsn = examination.value("dsn")
    if dsn is None and examination.is_external:
        yield skipped(
            "dsn", "none is needed: another process writes", "give that one's --dsn, to look at the database too"
        )
        return
    if dsn is None:
        yield failed(
            "dsn", "no database is named", f"set {settings.PREFIX}DSN=postgresql://writer@host/database, or give --dsn"
        )
        return
    try:
        examination.inspector = AuditInspector(
            dsn,
            schema=examination.value("schema"),
            table=examination.value("table"),
            timeout_seconds=examination.timeout_seconds,
        )
    except ConfigurationError as error:
        yield failed("dsn", *in_two(str(error).removeprefix("dsn: ")))
    else:
        yield ok("dsn", "the DSN can be parsed")


def check_host(examination: Examination) -> Iterator[Finding]:
    """The names of its hosts can be resolved. They aren't shown: one may be a part of a password."""
    names = hosts(examination.value("dsn"))
    if not names:
        yield ok("host", "there is no name to resolve")
        return
    started = time.monotonic()
    lost = [number for number, name in enumerate(names, 1) if not _resolves(name, examination.timeout_seconds)]
    which = "the host's name" if len(names) == 1 else f"of {len(names)} hosts, the name of number {_listed(lost)}"
    what = f"{which} can't be resolved"
    advice = "correct the DSN (a password's @ is written %40), or mend DNS"
    if len(lost) == len(names):
        yield failed("host", what, advice)
    elif lost:
        yield warning("host", what, advice)
    else:
        yield ok("host", f"resolved in {(time.monotonic() - started) * 1000:.0f} ms")


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _resolves(name: str, seconds: float) -> bool:
    """Ask the resolver, in a thread, since it keeps no timeout of ours."""
    found: list[object] = []

    def ask() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.extend(socket.getaddrinfo(name, None))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return bool(found)


def check_connection(examination: Examination) -> Iterator[Finding]:
    """The server lets us in. Says whom, how fast and how safely; what the server is like is said with it."""
    inspector = _inspector(examination)
    try:
        server = inspector.server()
    except DatabaseUnavailableError as error:
        what, advice = in_two(error.reason, error.sqlstate)
        if error.sqlstate == _PROTOCOL:
            advice = "if a pooler such as pgbouncer is in between, let it pool sessions or transactions, not statements"
        yield failed("connection", what, advice)
        return
    yield ok("connection", f"to {server.database} as {server.role}, in {server.connect_seconds * 1000:.0f} ms")
    if server.encrypted and (server.local or server.verified):
        yield ok("tls", "TLS is in use")
    elif server.encrypted:
        yield warning(
            "tls",
            "TLS is in use, and the server's certificate is not verified: who gets in between can read the log and "
            "change what is written",
            _VERIFY,
        )
    elif server.local:
        whom = "pooler" if server.pooled else "server"
        yield ok("tls", f"TLS is not in use, nor needed: the {whom} is on this machine")
    else:
        yield warning(
            "tls",
            "TLS is not in use, and the server is on another machine: who listens can read the log",
            _VERIFY,
        )
    name = f"PostgreSQL {server.version}"
    if server.version_number < OLDEST_SERVER:
        yield failed("server", f"{name} is not supported", f"upgrade to {OLDEST_SERVER // 10_000} or later")
    elif server.in_recovery:
        yield failed(
            "server",
            f"{name} is a standby, and takes no rows",
            "point the DSN at the primary, or name all hosts and add target_session_attrs=read-write",
        )
    elif server.read_only:
        yield failed(
            "server",
            f"{name} is read-only for this role or database, and takes no rows",
            "end that: ALTER ROLE or DATABASE … SET default_transaction_read_only = off",
        )
    elif server.pooled:
        yield ok("server", f"{name}, by a pooler such as pgbouncer: pool sessions or transactions, not statements")
    else:
        yield ok("server", name)


def check_table(examination: Examination) -> Iterator[Finding]:
    """The table is there, with all columns, and an id can be in it once only."""
    inspector = _inspector(examination)
    name = f"{inspector.schema}.{inspector.table}"
    examination.log, examination.side = inspector.relations()
    if examination.log is None:
        elsewhere = inspector.elsewhere()
        also = f"; or name the schema that has one: --schema {' or '.join(elsewhere)}" if elsewhere else ""
        yield failed(
            "table", f"{name} does not exist", f"{_MIGRATE} (with --create-schema if its schema is missing too){also}"
        )
        return
    troubles = list(_troubles("table", name, examination.log, LOG_COLUMNS))
    if examination.log.kind in "rp" and not inspector.is_unique():
        troubles.append(
            failed(
                "table",
                f"nothing keeps {name} from having an id twice: what is written again becomes a second row",
                "give it a PRIMARY KEY (id); with partitions, of the partition key and id",
            )
        )
    yield from troubles
    if not troubles:
        partitioned = ", in partitions" if examination.log.kind == "p" else ""
        yield ok("table", f"{name} has all {len(LOG_COLUMNS)} columns{partitioned}")


def check_set_aside(examination: Examination) -> Iterator[Finding]:
    """The side table, which takes what the table refuses, is there and has all columns."""
    inspector = _inspector(examination)
    name = f"{inspector.schema}.{inspector.table}_set_aside"
    if examination.side is None:
        yield failed("set-aside", f"{name} does not exist: a record that the table refuses waits for ever", _MIGRATE)
        return
    troubles = list(_troubles("set-aside", name, examination.side, SIDE_COLUMNS))
    yield from troubles
    if not troubles:
        yield ok("set-aside", f"{name} has all {len(SIDE_COLUMNS)} columns")


def _troubles(check: str, name: str, relation: Relation, wanted: Mapping[str, str]) -> Iterator[Finding]:
    if relation.kind not in "rpf":
        yield warning(check, f"{name} is a view", "check that its rows go to an audit log, or name the table itself")
    if missing := [column for column in wanted if column not in relation.columns]:
        advice = f"{_MIGRATE}, if it is an audit log; else give it another name by --table"
        yield failed(check, f"{name} lacks {', '.join(missing)}", advice)
    for column, found in relation.columns.items():
        if column not in wanted:
            if found.must_be_given:
                yield failed(
                    check,
                    f"{name} has a column {column} of its own that refuses every record",
                    "give that column a DEFAULT, or let it be NULL",
                )
        elif found.type != wanted[column]:
            yield warning(
                check,
                f"{column} of {name} is {found.type}, where {wanted[column]} is expected",
                "change its type, unless `rights` and `canary` below are ok and it is meant",
            )


def check_indexes(examination: Examination) -> Iterator[Finding]:
    """Searches have the indexes that they use."""
    missing = _inspector(examination).missing_indexes()
    for statement in missing:
        yield warning("indexes", "searches are slow, as an index is missing or invalid", statement)
    if not missing:
        yield ok("indexes", "all indexes are there")


def check_migrations(examination: Examination) -> Iterator[Finding]:
    """The table has had every migration."""
    try:
        pending = _inspector(examination).pending_migrations()
    except DatabaseUnavailableError as error:
        if error.sqlstate != _NO_RIGHT:
            raise
        yield skipped(
            "migrations", "this role may not read which ones were applied", "ask with the DSN of the table's owner"
        )
        return
    if pending and _NOT_FOR_WRITING.issuperset(pending):
        what = f"some were not applied: {', '.join(pending)}; records are written, and can't be held or swept"
        yield warning("migrations", what, _MIGRATE)
    elif pending:
        yield failed("migrations", f"some were not applied: {', '.join(pending)}", _MIGRATE)
    else:
        yield ok("migrations", "all were applied")


def check_rights(examination: Examination) -> Iterator[Finding]:
    """The role may write to both tables, and do no harm."""
    inspector = _inspector(examination)
    log, side = inspector.rights()
    if log is None or side is None:
        return
    names = (f"{inspector.schema}.{inspector.table}", f"{inspector.schema}.{inspector.table}_set_aside")
    if lacks := [name for name, rights in zip(names, (log, side), strict=True) if "INSERT" not in rights.verbs]:
        yield failed("rights", f"the role may not INSERT rows into {' and '.join(lacks)}", _ROLES)
    elif not log.usage:
        yield failed("rights", f"the role may not use the schema {inspector.schema}", _ROLES)
    elif (fault := inspector.check()) is not None:
        what, advice = in_two(fault.reason, fault.sqlstate)
        yield failed(
            "rights", what, "see pg_locks for who holds it, and end that" if fault.sqlstate == _LOCKED else advice
        )
    elif (more := _more_than_needed(log, side)) is not None:
        advice = _ROLES
        if examination.value("migrate"):
            advice = f"unset {settings.PREFIX}MIGRATE, which needs the owner, and migrate by hand; {advice}"
        yield warning("rights", f"the role {more}: who has its password can rewrite the log", advice)
    else:
        yield ok("rights", f"the role may {' and '.join(log.verbs)}, and change nothing")


def _more_than_needed(log: Rights, side: Rights) -> str | None:
    if log.superuser:
        return "is a superuser"
    if log.owner or side.owner:
        return "owns the table"
    harmful = [verb for verb in ("UPDATE", "DELETE", "TRUNCATE") if verb in {*log.verbs, *side.verbs}]
    return f"may also {' and '.join(harmful)}" if harmful else None


def check_clock(examination: Examination) -> Iterator[Finding]:
    """This machine and the server agree on the time: a row has both clocks in it."""
    skew = _inspector(examination).clock_skew()
    what = f"the server's is {abs(skew):.3g} s {'ahead of' if skew > 0 else 'behind'} this machine's"
    advice = "synchronize both clocks, as by NTP: started_at is by this machine's, recorded_at by the server's"
    if abs(skew) > _FAR:
        yield failed("clock", what, advice)
    elif abs(skew) > _SKEW:
        yield warning("clock", what, advice)
    else:
        yield ok("clock", f"the server's agrees with this machine's to {max(abs(skew) * 1000, 1):.0f} ms")


def check_canary(examination: Examination) -> Iterator[Finding]:
    """A row can be written and read. None is left behind."""
    if not examination.canary:
        yield skipped("canary", "--no-canary was given", "leave it out to see whether a row can be written")
        return
    inspector = _inspector(examination)
    rights, _ = inspector.rights()
    verbs = rights.verbs if rights is not None else []
    try:
        canary = inspector.canary(may_read="SELECT" in verbs, may_delete="DELETE" in verbs)
    except DatabaseUnavailableError as error:
        if error.sqlstate != _NO_RIGHT:
            raise
        yield failed(
            "canary",
            "the role may INSERT, and its row was refused for want of a right",
            "look at the row security policies of the table, and at what its triggers need",
        )
        return
    end = "removed" if canary.removed else "rolled back"
    if not canary.written:
        yield failed(
            "canary",
            "a row was accepted and is not there",
            "look for a rule, or a BEFORE INSERT trigger that returns NULL, on the table",
        )
    elif canary.read_back is None:
        yield ok("canary", f"a row was written and {end}; reading it back is not proved, as this role may not SELECT")
    elif not canary.read_back:
        yield warning(
            "canary",
            f"a row was written, is not to be seen by this role, and was {end}",
            "look at the row security policies of the table",
        )
    elif not canary.unchanged:
        yield warning(
            "canary", f"a row was read back otherwise than it was written, and {end}", "look for a trigger on the table"
        )
    else:
        yield ok("canary", f"a row was written, read back and {end}")


def _inspector(examination: Examination) -> AuditInspector:
    if examination.inspector is None:
        raise RuntimeError("the check of the DSN comes first")
    return examination.inspector
