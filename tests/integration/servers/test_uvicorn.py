"""uvicorn, alone and with two workers: SIGTERM runs the lifespan's shutdown, and no exit handlers."""

import os
import signal

import psycopg
import pytest

from tests.integration.servers.conftest import wait_until

UVICORN = ("-m", "uvicorn", "--uds", "{socket}")
WITHOUT_LIFESPAN = ("--lifespan", "off")
TWO = ("--workers", "2")

#: The example, with an operation that doesn't end.
ENDLESS = """
import asyncio, os
from starlette.routing import Route
from asgi import app
from astrocyte_otel_audit import audited

@audited("recall")
async def recall_for_ever(bank_id):
    os.write(1, b"inside\\n")
    await asyncio.Event().wait()

async def answer(request):
    await recall_for_ever(request.path_params["bank_id"])

app.router.routes.append(Route("/endless/{bank_id}", answer))
"""


def ask_each_worker(server, count):
    """Ask until so many processes have answered; return the banks that were asked for, sorted."""
    asked, answered = [], set()

    def is_done():
        asked.append(f"bank-{len(asked):04}")
        answered.add(server.get(asked[-1]))
        return len(answered) == count

    wait_until(is_done)
    return asked


@pytest.mark.parametrize(
    ("options", "workers", "number"),
    [
        pytest.param((), 1, signal.SIGTERM, id="lifespan, SIGTERM"),
        pytest.param(TWO, 2, signal.SIGTERM, id="two workers, lifespan, SIGTERM"),
        pytest.param(WITHOUT_LIFESPAN, 1, signal.SIGINT, id="no lifespan, SIGINT"),
    ],
)
@pytest.mark.usefixtures("without_spool")
def test_an_exit_that_writes(serve, banks, options, workers, number):
    server = serve(*UVICORN, *options, "asgi:app")
    asked = ask_each_worker(server, workers)
    assert banks() == []
    server.end(number)
    assert banks() == asked


@pytest.mark.usefixtures("without_spool")
def test_the_last_request_of_a_limit(serve, banks):
    server = serve(*UVICORN, *WITHOUT_LIFESPAN, "--limit-max-requests", "1", "asgi:app")
    server.get("last")
    wait_until(server.is_over)
    assert banks() == ["last"]


@pytest.mark.parametrize(
    ("options", "number"),
    [
        pytest.param(WITHOUT_LIFESPAN, signal.SIGTERM, id="no lifespan, SIGTERM"),
        pytest.param((), signal.SIGKILL, id="lifespan, SIGKILL"),
    ],
)
def test_an_exit_that_leaves_it_to_the_next_start(serve, banks, options, number):
    server = serve(*UVICORN, *options, "asgi:app")
    asked = ask_each_worker(server, 1)
    server.end(number)
    assert banks() == []
    serve(*UVICORN, *options, "asgi:app")
    wait_until(lambda: banks() == asked, banks)


def test_two_workers_without_a_lifespan_leave_it_to_whoever_comes_next(serve, banks, replay):
    server = serve(*UVICORN, *WITHOUT_LIFESPAN, *TWO, "asgi:app")
    asked = ask_each_worker(server, 2)
    server.end(signal.SIGTERM)
    assert replay()["waiting"] == 0
    assert banks() == asked


def test_what_a_killed_worker_left_is_written_by_the_one_in_its_place(serve, banks):
    server = serve(*UVICORN, *TWO, "asgi:app")
    os.kill(server.get("killed"), signal.SIGKILL)
    wait_until(lambda: banks() == ["killed"], lambda: server.said)


@pytest.mark.usefixtures("without_spool")
def test_a_request_that_is_cancelled_as_the_server_stops(serve, database, tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    server = serve(*UVICORN, "--timeout-graceful-shutdown", "1", "endless:app")
    server.request("endless/cancelled")
    server.wait_until_said("inside")
    server.end(signal.SIGTERM)
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT bank_id, outcome, error_type FROM astrocyte_audit_log").fetchall()
    assert rows == [("cancelled", "failure", "asyncio.exceptions.CancelledError")]
