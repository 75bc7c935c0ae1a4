"""However a process ends: each call that returned is one row, written by it or by whoever comes after it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

ROOT = Path(__file__).parents[2]

#: Emits operations and says of each that it has returned, then ends in some way.
PROGRAM = """
import os, signal, sys, time
from astrocyte_otel_audit import audit_operation, configure_audit
from opentelemetry.sdk.trace import TracerProvider

dsn, way, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
provider = TracerProvider()
# Nothing is written by this process itself, unless its end is one that writes.
processor = configure_audit(dsn=dsn, actions="*", tracer_provider=provider, schedule_delay_millis=3_600_000.0)

def emit(number):
    with audit_operation("recall", bank_id=f"bank-{number}", tracer_provider=provider):
        pass
    os.write(1, f"{number}\\n".encode())

if way == "required":
    with audit_operation("forget", bank_id="begun", required=True, tracer_provider=provider):
        os.kill(os.getpid(), signal.SIGKILL)
if way == "fork":
    if (child := os.fork()) == 0:
        emit(1000)
        os._exit(0)
    os.waitpid(child, 0)
for number in range(count):
    emit(number)
if way in ("SIGKILL", "SIGTERM"):
    os.kill(os.getpid(), getattr(signal, way))
    time.sleep(60)
elif way == "_exit":
    os._exit(0)
elif way == "sys.exit":
    sys.exit(0)
elif way == "exception":
    raise RuntimeError("on purpose")
elif way == "wait":
    while True:
        emit(count := count + 1)
"""


@pytest.fixture
def start(database):
    """Starts the program; its output is the operations that have returned."""

    def start(way, count=50):
        return subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM, database, way, str(count)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.fixture
def replay(database):
    """Runs `spool replay`, and gives what it said."""

    def replay():
        done = subprocess.run(
            [sys.executable, "-m", "astrocyte_otel_audit", "spool", "replay", "--json", "--dsn", database],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return replay


def banks(database):
    with psycopg.connect(database) as connection:
        return sorted(bank for (bank,) in connection.execute("SELECT bank_id FROM astrocyte_audit_log"))


@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM", "_exit", "sys.exit", "exception", "end", "fork"])
def test_each_call_that_returned_is_one_row(start, replay, database, way, tmp_path):
    out, _ = start(way).communicate(timeout=60)
    returned = sorted(f"bank-{number}" for number in out.split())
    assert len(returned) == (51 if way == "fork" else 50)
    said = replay()
    assert said["damaged"] == said["waiting"] == 0
    assert banks(database) == returned
    assert replay()["processes"] == 0
    assert list((tmp_path / "astrocyte-otel-audit" / "spool").iterdir()) == []


def test_a_process_that_is_killed_in_the_middle_of_its_work_leaves_what_had_returned(start, replay, database):
    process = start("wait", 0)
    for _ in range(200):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    replay()
    rows = banks(database)
    returned = 200 + len(out.split())
    # The one whose return was being said may be there, too.
    assert returned <= len(rows) <= returned + 1
    assert len(set(rows)) == len(rows)


def test_a_required_operation_whose_process_dies_inside_leaves_a_row(start, replay, database):
    start("required").communicate(timeout=60)
    replay()
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT action, bank_id, outcome, ended_at FROM astrocyte_audit_log").fetchall()
    assert rows == [("forget", "begun", "unknown", None)]


def test_the_next_process_writes_what_a_killed_one_left(start, database, tmp_path):
    start("SIGKILL").communicate(timeout=60)
    environment = {**os.environ, "OTEL_ASTROCYTE_AUDIT_DSN": database}
    program = (
        "import time\n"
        "from astrocyte_otel_audit import configure_audit\n"
        "processor = configure_audit(actions='*')\n"
        "deadline = time.monotonic() + 30\n"
        "while processor.stats()['stored'] < 50 and time.monotonic() < deadline:\n"
        "    time.sleep(0.05)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, timeout=60, check=True)
    assert len(banks(database)) == 50
    assert list((tmp_path / "astrocyte-otel-audit" / "spool").iterdir()) == []
