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
import gc, os, signal, sys, time
from astrocyte_otel_audit import audit_operation, configure_audit
from opentelemetry.sdk.trace import TracerProvider

dsn, way, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
provider = TracerProvider()
place = {} if os.environ.get("OTEL_ASTROCYTE_AUDIT_WRITER") == "external" else {"dsn": dsn}
# Nothing is written by this process itself, unless its end is one that writes.
processor = configure_audit(**place, actions="*", tracer_provider=provider, schedule_delay_millis=3_600_000.0)

def emit(number):
    with audit_operation("recall", bank_id=f"bank-{number}", tracer_provider=provider):
        pass
    os.write(1, f"{number}\\n".encode())

def nest(number, within=lambda: None, **arguments):
    with audit_operation("recall", actor_id="outer", tracer_provider=provider, **arguments) as outer:
        with audit_operation("recall", bank_id=f"bank-{number}", tracer_provider=provider) as inner:
            inner.response = {"hits": number}
        os.write(1, f"{number} {inner.record_id} {outer.record_id}\\n".encode())
        within()

def nest_in_three(number, within=lambda: None):
    with audit_operation("recall", actor_id="outer", tracer_provider=provider) as outermost:
        with audit_operation("recall", transport="mcp", tracer_provider=provider) as middle:
            with audit_operation("recall", bank_id=f"bank-{number}", tracer_provider=provider) as inner:
                inner.response = {"hits": number}
        os.write(1, f"{number} {inner.record_id} {middle.record_id} {outermost.record_id}\\n".encode())
        within()

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def in_child(function):
    if (child := os.fork()) == 0:
        function()
        os._exit(0)
    os.waitpid(child, 0)

if way == "required":
    with audit_operation("forget", bank_id="begun", required=True, tracer_provider=provider):
        kill()
if way == "inside":
    nest(0, kill)
if way == "inside required":
    nest(0, kill, required=True)
if way == "inside three":
    nest_in_three(0, kill)
if way == "three":
    while True:
        nest_in_three(count := count + 1)
if way == "shutdown inside required":
    nest(0, lambda: (processor.shutdown(), kill()), required=True)
if way == "shutdown inside required, which ends":
    nest(0, provider.shutdown, required=True)
if way == "fork inside required":
    operation = audit_operation("recall", required=True, tracer_provider=provider)
    operation.start()
    with operation.current():
        emit(0)

    def forget():
        global operation
        del operation
        gc.collect()
        assert processor.stats()["open"] == 0
        assert processor.force_flush(10_000)
        processor.shutdown()
        os.write(1, f"{processor.stats()['accepted']}\\n".encode())

    in_child(forget)
    operation.response = {"hits": 3}
    operation.finish()
if way == "after nested":
    for number in range(count):
        nest(number)
    kill()
if way == "nested":
    while True:
        nest(count := count + 1)
if way == "fork":
    in_child(lambda: emit(1000))
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


@pytest.fixture(params=["never", "interval", "always", "external"])
def mode(request, monkeypatch):
    """How the spool is synced, or that another process writes it; to what a process leaves, it makes no difference."""
    if request.param == "external":
        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_WRITER", "external")
        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_DESTINATION", "default")  # for `spool replay`, which has a DSN
    else:
        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_SPOOL_FSYNC", request.param)


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


@pytest.fixture
def next_process(database):
    """Runs a process that audits nothing itself, until it has written a number of rows."""
    program = (
        "import sys, time\n"
        "from astrocyte_otel_audit import configure_audit\n"
        "processor = configure_audit(actions='*')\n"
        "deadline = time.monotonic() + 30\n"
        "while processor.stats()['stored'] < int(sys.argv[1]) and time.monotonic() < deadline:\n"
        "    time.sleep(0.05)\n"
    )

    def run(count):
        subprocess.run(
            [sys.executable, "-c", program, str(count)],
            cwd=ROOT, env={**os.environ, "OTEL_ASTROCYTE_AUDIT_DSN": database}, timeout=60, check=True,
        )  # fmt: skip

    return run


@pytest.fixture
def left(tmp_path):
    """What there is in the spool."""
    return lambda: list((tmp_path / "astrocyte-otel-audit" / "spool").iterdir())


def banks(database):
    with psycopg.connect(database) as connection:
        return sorted(bank for (bank,) in connection.execute("SELECT bank_id FROM astrocyte_audit_log"))


def nested_rows(database):
    with psycopg.connect(database) as connection:
        return connection.execute(
            "SELECT id::text, bank_id, actor_id, (response->>'hits')::int, outcome, ended_at IS NOT NULL"
            " FROM astrocyte_audit_log ORDER BY response->'hits' NULLS FIRST, id"
        ).fetchall()


def killed_in_the_middle(process):
    """Kill a process that goes on and on; gives the lines that it has said until then."""
    with process:
        said = [process.stdout.readline() for _ in range(200)]
        process.send_signal(signal.SIGKILL)
        # Not by `communicate`, which knows nothing of what `readline` has read ahead.
        return said + process.stdout.readlines()


@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM", "_exit", "sys.exit", "exception", "end", "fork"])
@pytest.mark.usefixtures("mode")
def test_each_call_that_returned_is_one_row(start, replay, database, way, left):
    out, _ = start(way).communicate(timeout=60)
    returned = sorted(f"bank-{number}" for number in out.split())
    assert len(returned) == (51 if way == "fork" else 50)
    said = replay()
    assert said["damaged"] == said["waiting"] == 0
    assert banks(database) == returned
    assert replay()["processes"] == 0
    assert left() == []


@pytest.mark.usefixtures("mode")
def test_a_process_that_is_killed_in_the_middle_of_its_work_leaves_what_had_returned(start, replay, database):
    returned = len(killed_in_the_middle(start("wait", 0)))
    replay()
    rows = banks(database)
    # The one whose return was being said may be there, too.
    assert returned <= len(rows) <= returned + 1
    assert len(set(rows)) == len(rows)


@pytest.mark.usefixtures("mode")
def test_a_required_operation_whose_process_dies_inside_leaves_a_row(start, replay, database):
    start("required").communicate(timeout=60)
    replay()
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT action, bank_id, outcome, ended_at FROM astrocyte_audit_log").fetchall()
    assert rows == [("forget", "begun", "unknown", None)]


def test_the_next_process_writes_what_a_killed_one_left(start, next_process, database, left):
    start("SIGKILL").communicate(timeout=60)
    next_process(50)
    assert len(banks(database)) == 50
    assert left() == []


def test_the_next_process_writes_what_had_returned_inside_an_operation_in_which_one_was_killed(
    start, next_process, database, left
):
    out, _ = start("inside").communicate(timeout=60)
    _, _, outer = out.split()
    next_process(1)
    assert nested_rows(database) == [(outer, "bank-0", None, 0, "success", True)]
    assert left() == []


def test_of_three_levels_the_outermost_is_the_row_where_the_process_is_killed_inside(
    start, next_process, database, left
):
    out, _ = start("inside three").communicate(timeout=60)
    next_process(1)
    assert nested_rows(database) == [(out.split()[3], "bank-0", None, 0, "success", True)]
    assert left() == []


def test_a_required_operation_and_what_had_returned_inside_it_are_one_row_where_the_process_is_killed_inside(
    start, next_process, database, left
):
    out, _ = start("inside required").communicate(timeout=60)
    _, _, outer = out.split()
    next_process(1)
    assert nested_rows(database) == [(outer, "bank-0", None, 0, "unknown", False)]
    assert left() == []


@pytest.mark.parametrize(
    ("way", "end"),
    [
        ("shutdown inside required", (None, "unknown", False)),
        ("shutdown inside required, which ends", ("outer", "success", True)),
    ],
)
def test_a_required_operation_in_which_its_process_shuts_down_has_its_row_from_the_next_one(
    start, next_process, database, left, way, end
):
    out, _ = start(way, 0).communicate(timeout=60)
    _, _, outer = out.split()
    assert nested_rows(database) == []
    assert left() != []
    next_process(1)
    actor, outcome, is_ended = end
    assert nested_rows(database) == [(outer, "bank-0", actor, 0, outcome, is_ended)]
    assert left() == []


def test_a_required_operation_that_a_child_inherits_and_forgets_has_the_row_of_its_parent(start, database, left):
    out, said = start("fork inside required", 0).communicate(timeout=60)
    assert out.splitlines() == ["0", "0"], said
    [(_, bank, _, hits, outcome, is_ended)] = nested_rows(database)
    assert (bank, hits, outcome, is_ended) == ("bank-0", 3, "success", True)
    assert left() == []


def test_an_operation_and_the_one_inside_it_are_one_row_where_the_process_is_killed_after_both(
    start, next_process, replay, database, left
):
    out, _ = start("after nested", 20).communicate(timeout=60)
    outer = [line.split()[2] for line in out.splitlines()]
    assert len(outer) == 20
    next_process(20)
    assert replay()["processes"] == 0
    expected = [(row, f"bank-{number}", "outer", number, "success", True) for number, row in enumerate(outer)]
    assert nested_rows(database) == expected
    assert left() == []


@pytest.mark.parametrize("way", ["nested", "three"])
@pytest.mark.usefixtures("mode")
def test_wherever_a_process_is_killed_an_operation_and_those_inside_it_are_one_row(start, replay, database, left, way):
    returned = killed_in_the_middle(start(way, 0))
    replay()
    rows = nested_rows(database)
    assert [bank for _, bank, *_ in rows] == [f"bank-{number}" for number in range(1, len(rows) + 1)]
    assert [row for row, *_ in rows][: len(returned)] == [line.split()[-1] for line in returned]
    # One more may have been on the disk, before it was said.
    assert len(returned) <= len(rows) <= len(returned) + 1
    assert left() == []
