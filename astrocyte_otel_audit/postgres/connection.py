"""Where connections come from: one of our own, or a pool that the application lends."""

from __future__ import annotations

import hashlib
import inspect
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo, TransactionStatus
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from astrocyte_otel_audit.errors import ConfigurationError, DatabaseUnavailableError

#: What libpq waits for, where the DSN doesn't say: without these a network that swallows packets is waited for
#: without end. Seconds, but for tcp_user_timeout, which is in milliseconds.
_PATIENCE: dict[str, int | str] = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "application_name": "astrocyte-otel-audit",
    # Not what PGCLIENTENCODING or the database would make it: records may hold any character.
    "client_encoding": "UTF8",
}
#: Parts of a DSN that libpq and psycopg look at only when they connect, and that are nothing but numbers.
_NUMBERS = ("port", "connect_timeout", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout")


class Connections(Protocol):
    """A source of connections. Thread-safe."""

    #: The database, as a name without a secret in it: the same wherever the same one is meant.
    database: str

    def connection(self, answer_seconds: float | None = None) -> Any:
        """Return a context manager that lends a connection to the calling thread, with autocommit.

        Args:
            answer_seconds: how long one answer is waited for, where that can be said; without end by default.
        """

    def close(self) -> None:
        """Close what this source has opened itself."""

    def after_fork(self) -> None:
        """Forget, without touching it, what belongs to the parent process."""


class _Patience:
    """Waits for a connection's answers in its place, and gives it up when one takes too long.

    A server's own timeouts end nothing where the server is frozen, or what is before it swallows its answers; and
    where everything is acknowledged, libpq's don't either. Set on the connection itself: where psycopg is
    instrumented, a class of our own would not be the one that connects.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.answer_seconds: float | None = None
        self._connection = connection
        self._is_stuck = False
        connection.wait = self.wait  # type: ignore[method-assign]

    def end(self) -> None:
        """Let the connection wait for itself again."""
        self._connection.__dict__.pop("wait", None)  # which refers to this, and this to it

    def wait(self, gen: Any, *arguments: Any, **keywords: Any) -> Any:
        """Wait for one answer; raises DatabaseUnavailableError where it takes too long."""
        connection = self._connection
        if self.answer_seconds is None:
            return type(connection).wait(connection, gen, *arguments, **keywords)
        deadline = time.monotonic() + self.answer_seconds
        try:
            wanted = next(gen)
            while True:
                if ready := self._ready(wanted, deadline):
                    wanted = gen.send(ready)
                else:  # whoever reads from it now finds that it has ended, and cleans up
                    self._is_stuck, deadline = True, time.monotonic() + self.answer_seconds
                    with socket.socket(fileno=os.dup(self._connection.pgconn.socket)) as twin:
                        twin.shutdown(socket.SHUT_RDWR)
        except StopIteration as end:
            return end.value
        except psycopg.OperationalError:
            if self._is_stuck:
                raise DatabaseUnavailableError(
                    "the server is connected and doesn't answer; is it stopped, or something before it stuck?"
                ) from None
            raise

    def _ready(self, wanted: int, deadline: float) -> int:
        """Return for what the socket is ready by the deadline; 0 for nothing."""
        with selectors.DefaultSelector() as selector:
            try:
                selector.register(self._connection.pgconn.socket, wanted)
            except (OSError, ValueError, psycopg.OperationalError):
                return wanted  # it was lost and closed; whoever waits for it will see so
            while (left := deadline - time.monotonic()) > 0:
                if ready := selector.select(min(left, 60.0)):  # a selector's own longest time is shorter than some
                    return ready[0][1]
        return 0


class OwnConnection:
    """One connection, opened when it is first needed and again after it broke. Thread-safe: users take turns.

    A plain connection, not a pool: writing needs one, and during interpreter shutdown a pool can't start its
    threads (seen on CPython 3.12.1).

    Args:
        dsn: connection string; ``postgresql://…`` or ``key=value`` pairs, several hosts included.

    Raises:
        ConfigurationError: a DSN that can't be parsed. The message doesn't quote it, since it holds the password.
    """

    def __init__(self, dsn: str) -> None:
        try:
            given = conninfo_to_dict(dsn)
            self._conninfo = make_conninfo(dsn, **{k: v for k, v in _PATIENCE.items() if k not in given})
        except psycopg.Error:
            # Not chained: psycopg's message prints the string it could not parse.
            raise ConfigurationError(
                "dsn",
                "can't be parsed; accepted is postgresql://user:password@host:port/database (with special characters "
                "of the password percent-encoded) or key=value pairs",
            ) from None
        for name in _NUMBERS:
            # One for each host, where there are several; an empty one is the default.
            for number in str(given.get(name) or "").split(","):
                if number and not (number.isascii() and number.strip().lstrip("-").isdigit()):
                    # Not quoted: of a password whose "@" is not percent-encoded, it is a part.
                    raise ConfigurationError(
                        "dsn",
                        f"its {name} is no number; accepted is a whole number, and special characters of a password "
                        "percent-encoded",
                    )
        self.database = _fingerprint(given)
        self._lock = threading.Lock()
        self._connection: psycopg.Connection[Any] | None = None
        self._patience: _Patience | None = None

    @contextmanager
    def connection(self, answer_seconds: float | None = None) -> Iterator[psycopg.Connection[Any]]:
        """Lend the connection, opening it if there is none that works."""
        with self._lock:
            if self._connection is None or self._connection.closed:
                self._connection = psycopg.connect(
                    self._conninfo,
                    autocommit=True,
                    # pgbouncer in transaction mode gives every transaction another server, which knows no statement.
                    prepare_threshold=None,
                )
                self._patience = _Patience(self._connection)
            connection = self._connection
            if self._patience is not None:
                self._patience.answer_seconds = answer_seconds
            try:
                yield connection
            except psycopg.errors.ReadOnlySqlTransaction:
                self._discard()  # what made it read-only may be over for new sessions only, or on another host
                raise
            finally:
                # In the middle of anything, as after an interrupt, it is of no use to the next user.
                if connection.info.transaction_status is not TransactionStatus.IDLE:
                    self._discard()

    def close(self) -> None:
        """Close the connection; it is opened again if it is needed again."""
        with self._lock:
            self._discard()

    def after_fork(self) -> None:
        """Drop the parent's connection without a word to its server; psycopg closes it in its own process only."""
        self._lock = threading.Lock()
        patience, self._connection, self._patience = self._patience, None, None
        if patience is not None:
            patience.end()

    def _discard(self) -> None:
        connection, patience = self._connection, self._patience
        self._connection = self._patience = None
        if connection is not None:
            connection.close()
        if patience is not None:
            patience.end()


class PooledConnections:
    """Connections of a psycopg pool that the application owns, opens and closes.

    Raises:
        ConfigurationError: anything but a `psycopg_pool.ConnectionPool`. An async pool belongs to its event loop
            and can't be used from the writer's thread.
    """

    def __init__(self, pool: object) -> None:
        if not isinstance(pool, ConnectionPool):
            raise ConfigurationError(
                "pool",
                f"got a {type(pool).__module__}.{type(pool).__qualname__}; accepted is a psycopg_pool.ConnectionPool "
                "(an async or asyncpg pool can't be used from a thread: give a dsn instead)",
            )
        self._pool: ConnectionPool[Any] = pool
        self._process = os.getpid()
        try:
            self.database = _fingerprint(conninfo_to_dict(dsn_of_pool(pool)))
        except ConfigurationError:
            self.database = "pool"  # which connects by a coroutine of the application's own

    @contextmanager
    def connection(self, answer_seconds: float | None = None) -> Iterator[psycopg.Connection[Any]]:
        """Lend a connection of the pool.

        Raises:
            DatabaseUnavailableError: in a forked child. Two processes on one socket get each other's answers.
        """
        if os.getpid() != self._process:
            raise DatabaseUnavailableError(
                "the lent pool was made before this process was forked, and can't be used in it; "
                "call configure_audit() in each process, or give it a dsn in place of the pool"
            )
        with self._pool.connection() as connection:
            lent_with = connection.autocommit
            connection.autocommit = True
            patience = _Patience(connection)
            patience.answer_seconds = answer_seconds
            try:
                yield connection
            except psycopg.errors.ReadOnlySqlTransaction:
                connection.close()  # as with one of our own; the pool makes another
                raise
            finally:
                patience.end()
                if connection.info.transaction_status is TransactionStatus.IDLE:  # else the pool makes another
                    connection.autocommit = lent_with

    def close(self) -> None:
        """Do nothing: the pool is the application's."""

    def after_fork(self) -> None:
        """Do nothing: the pool is the parent's, and refused in a child."""


def _fingerprint(parts: dict[str, Any]) -> str:
    """Return a name for the database of a connection string: of its hosts, ports and name, and of nothing secret."""
    defaults = (("host", "PGHOST", ""), ("port", "PGPORT", "5432"), ("dbname", "PGDATABASE", parts.get("user") or ""))
    found = [str(parts.get(name) or os.environ.get(variable) or default) for name, variable, default in defaults]
    found[0] = ",".join(sorted(found[0].split(",")))  # a failover changes their order
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def dsn_of_pool(pool: object) -> str:
    """Return the connection string that a psycopg pool connects with, sync or async, open or not.

    Raises:
        ConfigurationError: anything but a psycopg pool.
    """
    if not isinstance(pool, (ConnectionPool, AsyncConnectionPool)):
        raise ConfigurationError(
            "pool_getter",
            f"gives a {type(pool).__module__}.{type(pool).__qualname__}; accepted is a pool of psycopg_pool (an "
            "asyncpg pool does not say how it connects: call configure_audit(dsn=…) instead)",
        )
    conninfo, kwargs = (value() if callable(value) else value for value in (pool.conninfo, pool.kwargs))
    for value in (conninfo, kwargs):
        if inspect.iscoroutine(value):
            value.close()  # it would warn that nobody awaited it
    if not isinstance(conninfo, str) or not (kwargs is None or isinstance(kwargs, dict)):
        raise ConfigurationError(
            "pool_getter", "gives a pool that connects by a coroutine; call configure_audit(dsn=…) instead"
        )
    # The rest, such as a row factory, is how the application likes its connections.
    understood = {option.keyword.decode() for option in Conninfo.get_defaults()}
    try:
        return make_conninfo(conninfo, **{name: value for name, value in (kwargs or {}).items() if name in understood})
    except psycopg.Error:
        # Not chained: psycopg's message prints the string it could not parse.
        raise ConfigurationError("pool_getter", "gives a pool whose connection string can't be parsed") from None
