"""A process that is frozen as soon as its handler has returned, and may never go on."""

import shutil
import signal

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from tests.integration.servers.conftest import wait_until

#: A runtime: a line is an invocation. In between it is frozen, as the tests do by SIGSTOP.
RUNTIME = """
import sys
import serverless
serverless.FLUSH_MILLIS = int(sys.argv[1])
for bank in map(str.strip, sys.stdin):
    if bank == "unflushed":
        serverless.recall("What does Calvin like?", bank)
    else:
        serverless.handler({"query": "What does Calvin like?", "bank_id": bank}, None)
    print("returned", flush=True)
"""
#: So that a slow machine has the time, and so that nobody waits for what can't be written.
PATIENT, IMPATIENT = 60_000, 100


@pytest.fixture
def spool(environment, tmp_path):
    """The directory that outlives the process."""
    environment["OTEL_ASTROCYTE_AUDIT_SPOOL_DIR"] = str(tmp_path / "spool")
    return tmp_path / "spool"


@pytest.fixture
def runtime(start, spool):
    """Starts runtimes; `invoke` wakes them, and freezes them when the handler has returned."""

    def runtime(flush_millis):
        process = start("-c", RUNTIME, str(flush_millis))

        def invoke(bank):
            count = process.said.count("returned")
            process.send(signal.SIGCONT)
            process.tell(bank)
            process.wait_until_said("returned", count + 1)
            process.send(signal.SIGSTOP)

        process.invoke = invoke
        return process

    return runtime


@pytest.fixture
def connections(server_dsn, database):
    """Allows connections to the database or doesn't; those that there are it ends."""
    name = conninfo_to_dict(database)["dbname"]

    def connections(*, allowed):
        with psycopg.connect(server_dsn, autocommit=True) as connection:
            connection.execute(
                sql.SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS {}").format(sql.Identifier(name), allowed)
            )
            connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", [name]
            )

    yield connections
    connections(allowed=True)


def test_what_a_handler_has_flushed_is_there_when_it_returns(runtime, banks, replay):
    function = runtime(PATIENT)
    function.invoke("flushed")
    assert banks() == ["flushed"]
    function.end(signal.SIGKILL)
    replay()
    assert banks() == ["flushed"]


def test_what_was_not_flushed_is_written_by_the_next_invocation(runtime, banks):
    function = runtime(PATIENT)
    function.invoke("unflushed")
    assert banks() == []
    function.invoke("flushed")
    assert banks() == ["flushed", "unflushed"]


def test_what_was_not_flushed_is_written_by_the_next_process(runtime, banks):
    function = runtime(PATIENT)
    function.invoke("unflushed")
    function.end(signal.SIGKILL)
    assert banks() == []
    runtime(PATIENT)
    wait_until(lambda: banks() == ["unflushed"])


def test_a_connection_that_was_lost_while_frozen_costs_nothing(runtime, banks, connections):
    function = runtime(PATIENT)
    function.invoke("before")
    connections(allowed=True)
    function.invoke("after")
    assert banks() == ["after", "before"]


def test_what_could_not_be_flushed_is_written_by_the_next_invocation(runtime, banks, connections):
    function = runtime(IMPATIENT)
    connections(allowed=False)
    function.invoke("away")
    connections(allowed=True)
    assert banks() == []
    function.invoke("back")
    function.send(signal.SIGCONT)
    wait_until(lambda: banks() == ["away", "back"], lambda: function.said)


@pytest.mark.parametrize("kept", [True, False])
def test_what_could_not_be_flushed_is_lost_only_with_the_directory(runtime, banks, connections, replay, spool, kept):
    function = runtime(IMPATIENT)
    connections(allowed=False)
    function.invoke("away")
    function.end(signal.SIGKILL)
    connections(allowed=True)
    if not kept:
        shutil.rmtree(spool)
    assert replay()["written"] == kept
    assert banks() == ["away"] * kept
