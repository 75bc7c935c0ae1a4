"""gunicorn, with workers forked before or after the application was loaded."""

import os
import signal

import psycopg
import pytest

from tests.integration.servers.conftest import wait_until

GUNICORN = ("-m", "gunicorn", "--bind", "unix:{socket}", "--no-control-socket")
PRELOAD = ("--preload",)
UVICORN_WORKER = ("--worker-class", "uvicorn_worker.UvicornWorker")
ASGI_WORKER = ("--worker-class", "asgi")

#: Worker classes and applications of the tests' own.
VARIANTS = """
import os, time
from uvicorn_worker import UvicornWorker
from astrocyte_otel_audit import audit_operation

class WithoutLifespan(UvicornWorker):
    CONFIG_KWARGS = {"lifespan": "off"}

def endless(environ, start_response):
    import wsgi
    wsgi.app(environ, start_response)
    with audit_operation("recall", bank_id="inside"):
        os.write(1, f"inside {os.getpid()}\\n".encode())
        while True:
            time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def variants(tmp_path):
    (tmp_path / "variants.py").write_text(VARIANTS)


def outcomes(database):
    with psycopg.connect(database) as connection:
        return connection.execute(
            "SELECT bank_id, outcome, error_type FROM astrocyte_audit_log ORDER BY bank_id"
        ).fetchall()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("wsgi:app",), id="sync"),
        pytest.param((*PRELOAD, "wsgi:app"), id="sync, preload"),
        pytest.param((*UVICORN_WORKER, "asgi:app"), id="uvicorn"),
        pytest.param((*UVICORN_WORKER, *PRELOAD, "asgi:app"), id="uvicorn, preload"),
        pytest.param((*ASGI_WORKER, "--asgi-lifespan", "off", "asgi:app"), id="asgi, no lifespan"),
    ],
)
@pytest.mark.usefixtures("without_spool")
def test_sigterm_to_the_arbiter_writes(serve, banks, options):
    server = serve(*GUNICORN, *options)
    server.get("bank")
    assert banks() == []
    server.end(signal.SIGTERM)
    assert banks() == ["bank"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("wsgi:app",), id="sync"),
        pytest.param((*PRELOAD, "wsgi:app"), id="sync, preload"),
        pytest.param(("--worker-class", "variants.WithoutLifespan", "asgi:app"), id="uvicorn, no lifespan"),
    ],
)
@pytest.mark.usefixtures("without_spool")
def test_a_worker_that_is_recycled_writes(serve, banks, options):
    server = serve(*GUNICORN, "--max-requests", "1", *options)
    first = server.get("bank-0")
    wait_until(lambda: banks() == ["bank-0"], lambda: server.said)
    assert server.get("bank-1") != first
    wait_until(lambda: banks() == ["bank-0", "bank-1"], lambda: server.said)


def test_a_uvicorn_worker_without_a_lifespan_leaves_it_to_the_next_start(serve, banks, replay):
    server = serve(*GUNICORN, "--worker-class", "variants.WithoutLifespan", "asgi:app")
    server.get("bank")
    server.end(signal.SIGTERM)
    assert banks() == []
    assert replay()["written"] == 1
    assert banks() == ["bank"]


@pytest.mark.usefixtures("without_spool")
def test_a_worker_that_is_aborted_in_a_request_writes_it_as_failed(serve, database):
    server = serve(*GUNICORN, "variants:endless")
    server.request("before")
    server.wait_until_said("inside")
    # What the arbiter sends first to a worker that takes too long.
    os.kill(int(server.said.rpartition("inside ")[2].split()[0]), signal.SIGABRT)
    expected = [("before", "success", None), ("inside", "failure", "SystemExit")]
    wait_until(lambda: outcomes(database) == expected, lambda: server.said)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("wsgi:app",), id="sync"),
        pytest.param((*UVICORN_WORKER, "asgi:app"), id="uvicorn"),
    ],
)
def test_a_worker_that_is_killed_by_the_timeout_leaves_it_to_the_one_in_its_place(serve, banks, options):
    server = serve(*GUNICORN, "--timeout", "1", *options)
    os.kill(server.get("bank"), signal.SIGSTOP)  # it hangs, and can't handle SIGABRT, so that SIGKILL follows
    wait_until(lambda: banks() == ["bank"], lambda: server.said)


def test_a_preloaded_worker_that_is_killed_leaves_it_to_the_next_one_that_audits(serve, banks):
    server = serve(*GUNICORN, *PRELOAD, "wsgi:app")
    os.kill(killed := server.get("killed"), signal.SIGKILL)
    assert server.get("next") != killed
    wait_until(lambda: "killed" in banks(), lambda: server.said)


def test_a_uvicorn_worker_that_is_aborted_leaves_it_to_the_one_in_its_place(serve, banks):
    server = serve(*GUNICORN, *UVICORN_WORKER, "asgi:app")
    os.kill(server.get("bank"), signal.SIGABRT)
    wait_until(lambda: banks() == ["bank"], lambda: server.said)
