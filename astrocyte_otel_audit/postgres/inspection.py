"""`AuditInspector`: what a server, its tables and its rights are like, for one who asks why there are no rows.

Everything is read from the catalogs, which needs no right on the table. Nothing it does leaves a trace.
"""

from __future__ import annotations

import ipaddress
import math
import os
import secrets
import statistics
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from astrocyte_otel_audit.postgres.connection import OwnConnection
from astrocyte_otel_audit.postgres.encoding import columns
from astrocyte_otel_audit.postgres.statements import migrations, statement
from astrocyte_otel_audit.postgres.table import AuditTable
from astrocyte_otel_audit.record import AuditRecord, record_id

#: What the oldest server that is supported calls itself.
OLDEST_SERVER: Final = 140_000
_INSTANT = "timestamp with time zone"
#: Columns of the log and of its side table, and their types, as the migrations make them.
LOG_COLUMNS: Final[Mapping[str, str]] = {
    "id": "uuid", "action": "text", "transport": "text", "bank_id": "text", "started_at": _INSTANT,
    "ended_at": _INSTANT, "request": "jsonb", "response": "jsonb", "metadata": "jsonb", "outcome": "text",
    "error_type": "text", "actor_id": "text", "actor_type": "text", "trace_id": "text", "span_id": "text",
    "parent_span_id": "text", "sampled": "boolean", "service_name": "text", "recorded_at": _INSTANT,
}  # fmt: skip
SIDE_COLUMNS: Final[Mapping[str, str]] = {
    "id": "uuid", "action": "text", "reason": "text", "sqlstate": "text", "record": "text", "set_aside_at": _INSTANT,
}  # fmt: skip
#: Leading keys of the indexes that searches of the log use.
INDEXES: Final = (
    ("bank_id", "started_at"), ("action", "started_at"), ("started_at",), ("trace_id",), ("recorded_at",),
)  # fmt: skip
_CLOCK_ROUND_TRIPS = 5


class Server(NamedTuple):
    """Whom one talks to."""

    database: str
    role: str
    #: As it calls itself, and as a number such as 180004.
    version: str
    version_number: int
    in_recovery: bool
    read_only: bool
    #: Seconds that connecting took.
    connect_seconds: float
    encrypted: bool
    #: Whether its certificate is verified, so that nobody is in between.
    verified: bool
    #: Whether it is reached without leaving this machine.
    local: bool
    #: Whether somebody is in between who hands out sessions of the server, such as pgbouncer.
    pooled: bool


class Column(NamedTuple):
    """A column as it is."""

    type: str
    #: It takes no row that doesn't name it.
    must_be_given: bool


class Relation(NamedTuple):
    """A table, or what has its name."""

    #: As in `pg_class.relkind`: ``r`` a table, ``p`` a partitioned one, ``v`` a view, …
    kind: str
    columns: dict[str, Column]


class Rights(NamedTuple):
    """What the connecting role may do with a table."""

    superuser: bool
    owner: bool
    #: Whether it may use the schema.
    usage: bool
    #: Out of SELECT, INSERT, UPDATE, DELETE and TRUNCATE, in this order.
    verbs: list[str]


class Canary(NamedTuple):
    """What became of a row that was written to be seen."""

    #: False where a rule or a trigger has made it vanish without an error.
    written: bool
    #: Whether it was read back; None where the role may not read.
    read_back: bool | None = None
    #: Whether what was read is what was written.
    unchanged: bool = True
    #: Removed by DELETE; else it was rolled back.
    removed: bool = False


def driver() -> str:
    """Return which implementation of psycopg is in use, and its libpq's version."""
    return f"{psycopg.pq.__impl__}, libpq {psycopg.pq.version() // 10_000}"


def hosts(dsn: str) -> list[str]:
    """Return the names of hosts that a connection string needs resolved; none for sockets and services."""
    given = conninfo_to_dict(dsn)
    if given.get("hostaddr") or given.get("service") or os.environ.get("PGSERVICE"):
        return []
    named = str(given.get("host") or os.environ.get("PGHOST") or "")
    return [host for host in named.split(",") if host and host[0] not in "/@"]


class AuditInspector(AuditTable):
    """The audit log in one database, to be examined. Not for threads.

    Args:
        dsn: connection string of the role that is examined.
        schema: schema of the table.
        table: name of the table.
        timeout_seconds: how long to wait for a connection, and for one statement.

    Raises:
        ConfigurationError: a DSN that can't be parsed. The message doesn't quote it.
    """

    def __init__(self, dsn: str, *, schema: str, table: str, timeout_seconds: float) -> None:
        OwnConnection(dsn)  # refuses what can't be parsed, in words without a password
        patient = make_conninfo(
            dsn, connect_timeout=max(2, math.ceil(timeout_seconds)), tcp_user_timeout=math.ceil(timeout_seconds * 1000)
        )
        super().__init__(OwnConnection(patient), schema=schema, table=table, statement_timeout_seconds=timeout_seconds)
        self._relations = {"schema": schema, "relations": [table, f"{table}_set_aside"]}

    def server(self) -> Server:
        """Connect, and say whom to.

        Raises:
            DatabaseUnavailableError: nobody answers, or lets us in.
        """
        started = time.monotonic()
        with self._connection(self._answer_seconds) as connection:
            seconds = time.monotonic() - started
            info, encrypted = connection.info, connection.pgconn.ssl_in_use
            verified = info.get_parameters().get("sslmode") in ("verify-ca", "verify-full")
            own_pid, local = info.backend_pid, _is_local(info.host, info.hostaddr)
        [(database, role, version, number, in_recovery, read_only, pid)] = self._read("inspection/server", {}, None)
        # A pooler answers the start of a session itself, with a process id of its own invention.
        return Server(
            database, role, version, number, in_recovery, read_only, seconds, encrypted, verified, local, pid != own_pid
        )

    def relations(self) -> tuple[Relation | None, Relation | None]:
        """Return what the log and its side table are like; None for one that isn't there."""
        found: dict[str, Relation] = {}
        for name, kind, column, *facts in self._read("inspection/columns", self._relations, self.schema):
            found.setdefault(name, Relation(kind, {})).columns[column] = Column(*facts)
        return found.get(self.table), found.get(f"{self.table}_set_aside")

    def elsewhere(self) -> list[str]:
        """Return up to three other schemas that have a table of that name."""
        return [row[0] for row in self._read("inspection/elsewhere", self._names(), self.schema)]

    def missing_indexes(self) -> list[str]:
        """Return the statements that make the indexes that the log lacks."""
        whole = [list(keys) for keys, _, serves in self._indexes() if serves]
        wanted = [keys for keys in INDEXES if not any(index[: len(keys)] == list(keys) for index in whole)]
        name = sql.Identifier(self.schema, self.table).as_string(None)
        methods: dict[tuple[str, ...], str] = {("recorded_at",): "USING brin "}
        return [f"CREATE INDEX CONCURRENTLY ON {name} {methods.get(k, '')}({', '.join(k)})" for k in wanted]

    def is_unique(self) -> bool:
        """Say whether an id can be in the log once only."""
        return any(unique and serves and "id" in keys for keys, unique, serves in self._indexes())

    def pending_migrations(self) -> list[str]:
        """Return the names of migrations that were not applied.

        Raises:
            DatabaseUnavailableError: the role may not read which ones were (SQLSTATE 42501).
        """
        [(begun,)] = self._read("migrations_begun", {}, self.schema)
        done = {row[0] for row in self._read("migrations_applied", {}, self.schema)} if begun else set[int]()
        return [name.rpartition("/")[2] for version, name in migrations() if version not in done]

    def rights(self) -> tuple[Rights | None, Rights | None]:
        """Return what the role may do with the log and with its side table; None for one that isn't there."""
        rows = self._read("inspection/rights", self._relations, self.schema)
        found = {name: Rights(*facts) for name, *facts in rows}
        return found.get(self.table), found.get(f"{self.table}_set_aside")

    def clock_skew(self) -> float:
        """Return by how many seconds the server's clock is ahead of this machine's: the median of a few round trips."""
        skews: list[float] = []
        with self._in_transaction() as cursor:
            for _ in range(_CLOCK_ROUND_TRIPS):
                before = time.time()
                [(there,)] = cursor.execute(statement("inspection/clock", self.schema, self.table), prepare=False)
                skews.append(there.timestamp() - (before + time.time()) / 2)
        return statistics.median(skews)

    def canary(self, *, may_read: bool, may_delete: bool) -> Canary:
        """Write a row, read it back and remove it, as far as the role may, in one transaction that leaves none.

        Args:
            may_read: the role has SELECT; else nothing is read back.
            may_delete: the role has DELETE; else the transaction is rolled back.

        Raises:
            DatabaseUnavailableError: the row is refused, or can't be read back; the reason says what to do.
        """
        now = datetime.now(UTC)
        record = canary_record(now)
        found = Canary(written=False)
        with self._in_transaction() as cursor:
            cursor.execute(statement("append", self.schema, self.table), columns([record]), prepare=False)
            if cursor.rowcount == 1:
                rows: list[tuple[Any, ...]] | None = None
                if may_read:
                    get = statement("get", self.schema, self.table)
                    rows = cursor.execute(get, {"id": record.id}, prepare=False).fetchall()
                removed = False
                if may_read and may_delete:
                    remove = statement("inspection/remove", self.schema, self.table)
                    removed = cursor.execute(remove, {"id": record.id}, prepare=False).rowcount == 1
                unchanged = not rows or AuditRecord._make((*rows[0], None))._replace(recorded_at=None) == record
                found = Canary(True, None if rows is None else bool(rows), unchanged, removed)
            if not found.removed:
                raise psycopg.Rollback
        return found

    def _names(self) -> dict[str, Any]:
        return {"schema": self.schema, "table": self.table}

    def _indexes(self) -> list[tuple[Any, ...]]:
        return self._read("inspection/indexes", self._names(), self.schema)


def canary_record(now: datetime) -> AuditRecord:
    """Return a record that has something in each of its columns."""
    trace, span = secrets.randbits(128), secrets.randbits(64)
    return AuditRecord(
        id=record_id(trace, span, int(now.timestamp() * 1e9)), action="audit.canary", transport="system",
        bank_id="doctor", started_at=now, ended_at=now, request={"n": 1}, response={"n": 1}, metadata={},
        outcome="success", error_type="none", actor_id="doctor", actor_type="system", trace_id=f"{trace:032x}",
        span_id=f"{span:016x}", parent_span_id=f"{span:016x}", sampled=False, service_name="astrocyte-otel-audit",
    )  # fmt: skip


def _is_local(host: str | None, address: str | None) -> bool:
    if not host or host[0] in "/@":
        return not address or address[0] == "/" or _is_loopback(address)
    return _is_loopback(address or host)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
