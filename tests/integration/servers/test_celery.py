"""Celery's prefork pool: its children end by `os._exit`, and send a signal before that unless they are killed."""

import signal

import pytest

from tests.integration.servers.conftest import wait_until

#: The example with a broker in files, and tasks of the tests' own.
WORK = """
import os, sys, time
from celery.signals import worker_process_shutdown
from tasks import app, recall, write_what_waits

folder = os.environ["BROKER_FOLDER"]
app.conf.update(
    broker_url="filesystem://",
    broker_transport_options={
        "data_folder_in": folder, "data_folder_out": folder, "control_folder": folder, "polling_interval": 0.02
    },
    worker_enable_remote_control=False,
)
if os.environ.get("WITHOUT_SIGNAL"):
    worker_process_shutdown.disconnect(write_what_waits)

@app.task(name="hang")
def recall_and_hang(bank_id):
    recall(bank_id)
    os.write(1, b"inside\\n")
    while True:
        time.sleep(0.01)

if __name__ == "__main__":
    for bank in sys.argv[1:]:
        recall.delay(bank) if bank.startswith("bank") else recall_and_hang.delay(bank)
"""


@pytest.fixture
def worker(start, environment, tmp_path):
    """Starts a Celery worker for tasks of those banks."""
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "broker").mkdir()
    environment["BROKER_FOLDER"] = str(tmp_path / "broker")
    environment["TMPDIR"] = str(tmp_path)

    def worker(*banks, options=()):
        producer = start(str(tmp_path / "work.py"), *banks)
        wait_until(producer.is_over)
        assert producer.said == ""
        return start(
            "-m", "celery", "--app", "work", "worker", "--concurrency", "1", "--loglevel", "info",
            "--without-gossip", "--without-mingle", "--without-heartbeat", *options,
        )  # fmt: skip

    return worker


ONE_TASK = ("--max-tasks-per-child", "1")
BANKS = ["bank-0", "bank-1", "bank-2"]


@pytest.mark.usefixtures("without_spool")
def test_a_child_that_has_done_its_tasks_writes(worker, banks):
    celery = worker(*BANKS, options=ONE_TASK)
    wait_until(lambda: banks() == BANKS, lambda: celery.said)


@pytest.mark.usefixtures("without_spool")
def test_a_warm_shutdown_writes(worker, banks):
    celery = worker(*BANKS)
    celery.wait_until_said("succeeded", 3)
    assert banks() == []
    celery.end(signal.SIGTERM)
    assert banks() == BANKS


def test_a_child_without_the_signal_leaves_it_to_whoever_comes_next(worker, banks, replay, environment):
    environment["WITHOUT_SIGNAL"] = "yes"
    celery = worker(*BANKS, options=ONE_TASK)
    celery.wait_until_said("succeeded", 3)
    celery.end(signal.SIGTERM)
    assert replay()["waiting"] == 0
    assert banks() == BANKS


def test_a_child_that_is_killed_by_its_time_limit_leaves_it_to_whoever_comes_next(worker, banks, replay):
    celery = worker("hangs", options=("--time-limit", "1"))
    celery.wait_until_said("exited with")
    celery.kill()  # the child may have had a lock that a warm shutdown would wait for
    assert replay()["waiting"] == 0
    assert banks() == ["hangs"]


def test_a_cold_shutdown_leaves_it_to_the_next_start(worker, banks, replay):
    celery = worker("hangs")
    celery.wait_until_said("inside")
    celery.end(signal.SIGQUIT)
    assert replay()["waiting"] == 0
    assert banks() == ["hangs"]
