"""What may be given as a place to connect to, and what is refused before anything runs."""

import traceback

import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool, ConnectionPool, NullConnectionPool

from astrocyte_otel_audit import ConfigurationError
from astrocyte_otel_audit.postgres import OwnConnection, PooledConnections, dsn_of_pool

PASSWORD = "hunter2-secret"


class AsyncpgPool:
    """Looks like a pool of asyncpg."""

    async def acquire(self):
        raise NotImplementedError


AsyncpgPool.__module__ = "asyncpg.pool"
AsyncpgPool.__qualname__ = "Pool"


def chain(error: BaseException) -> str:
    """Return what a log shows of an error."""
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://u:%zz{PASSWORD}@h/d",
        f"postgresql://u:{PASSWORD}%@h/d",
        f"postgresql://u:{PASSWORD}@h/d?no_such_option=1",
        f"postgresql://u:{PASSWORD}@[::1/d",
        f"host=h password={PASSWORD} nonsense",
        f"host=h password='{PASSWORD}",
        f"password={PASSWORD} no_such_option=1",
    ],
)
def test_a_dsn_that_cant_be_parsed_is_refused_without_its_password(dsn, caplog):
    caplog.set_level(0)

    with pytest.raises(ConfigurationError, match="dsn: can't be parsed; accepted is postgresql://") as refusal:
        OwnConnection(dsn)

    assert PASSWORD not in chain(refusal.value)
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize(
    ("dsn", "named"),
    [
        ("host=h connect_timeout=10s", "its connect_timeout is no number"),
        ("postgresql://h/d?tcp_user_timeout=never", "its tcp_user_timeout is no number"),
        ("host=h port=5432x", "its port is no number"),
        ("postgresql://a:1,b:2/d?keepalives_count=1.5", "its keepalives_count is no number"),
        ("host=a,b port=1,two", "its port is no number"),
        (f"postgresql://u:hunter2@pw:{PASSWORD}@db.example:5432/x", "its port is no number"),
    ],
)
def test_a_dsn_whose_numbers_are_none_is_refused_before_anything_runs(dsn, named):
    with pytest.raises(ConfigurationError, match="accepted is a whole number") as refusal:
        OwnConnection(dsn)
    assert named in str(refusal.value)
    assert PASSWORD not in chain(refusal.value)


@pytest.mark.parametrize(
    "dsn",
    [
        "",
        "host=h",
        "postgresql://u:p%40ss@h:5433/d",
        "postgresql://a:1,b:2/d?target_session_attrs=read-write",
        "host=a,b port=1, connect_timeout=-1",
    ],
)
def test_a_dsn_connects_to_nothing_until_a_connection_is_needed(dsn):
    OwnConnection(dsn).close()


def test_a_pool_of_psycopg_is_taken_open_or_not():
    PooledConnections(ConnectionPool("host=/nowhere", open=False))
    PooledConnections(NullConnectionPool("host=/nowhere", open=False))


def test_an_async_pool_is_refused_as_it_belongs_to_its_event_loop():
    with pytest.raises(ConfigurationError, match=r"pool: got a psycopg_pool\.\S+AsyncConnectionPool; .*dsn instead"):
        PooledConnections(AsyncConnectionPool("host=/nowhere", open=False))


def test_a_pool_of_asyncpg_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"pool: got a asyncpg\.pool\.Pool; .*dsn instead"):
        PooledConnections(AsyncpgPool())


@pytest.mark.parametrize("pool", [None, "postgresql://h/d", object()], ids=repr)
def test_what_is_no_pool_is_refused_by_its_type(pool):
    with pytest.raises(ConfigurationError, match=f"pool: got a builtins.{type(pool).__qualname__}"):
        PooledConnections(pool)


@pytest.mark.parametrize("kind", [ConnectionPool, AsyncConnectionPool])
@pytest.mark.parametrize(
    ("conninfo", "kwargs", "says"),
    [
        ("host=h dbname=d", None, {"host": "h", "dbname": "d"}),
        ("host=h", {"password": "p w", "port": 5433}, {"host": "h", "password": "p w", "port": "5433"}),
        ("host=h", {"host": "other"}, {"host": "other"}),
        ("host=h", {"autocommit": True, "row_factory": object(), "prepare_threshold": 0}, {"host": "h"}),
        ("", {"host": "h"}, {"host": "h"}),
        (lambda: "host=from-a-function", None, {"host": "from-a-function"}),
        ("host=h", lambda: {"user": "from-a-function"}, {"host": "h", "user": "from-a-function"}),
    ],
    ids=["string", "arguments", "arguments win", "other arguments", "nothing but arguments", "function", "functions"],
)
def test_a_pool_says_how_it_connects(kind, conninfo, kwargs, says):
    pool = kind(conninfo, kwargs=kwargs, open=False)

    assert conninfo_to_dict(dsn_of_pool(pool)) == says


def test_a_pool_that_connects_by_a_coroutine_is_refused():
    async def conninfo():
        raise NotImplementedError

    with pytest.raises(ConfigurationError, match=r"pool_getter: .* connects by a coroutine"):
        dsn_of_pool(AsyncConnectionPool(conninfo, open=False))


def test_a_pool_whose_dsn_cant_be_parsed_is_refused_without_its_password(caplog):
    caplog.set_level(0)
    pool = ConnectionPool(f"postgresql://u:%zz{PASSWORD}@h/d", open=False)

    with pytest.raises(ConfigurationError, match=r"pool_getter: .* can't be parsed") as refusal:
        dsn_of_pool(pool)

    assert PASSWORD not in chain(refusal.value)
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize("pool", [AsyncpgPool(), None, object()], ids=["asyncpg", "None", "object"])
def test_only_a_pool_of_psycopg_says_how_it_connects(pool):
    with pytest.raises(ConfigurationError, match=r"pool_getter: gives a .*accepted is a pool of psycopg_pool"):
        dsn_of_pool(pool)
