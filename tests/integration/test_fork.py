"""`os.fork`: each process writes what it accepted itself, once, and over a connection of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psycopg
import pytest

ROOT = Path(__file__).parents[2]

#: A parent with a pipeline, and what its scripts are made of.
PRELUDE = """
import os, sys, threading
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from astrocyte_otel_audit import AuditSpanExporter, AuditUnavailableError, audit_operation, configure_audit

dsn = sys.argv[1]
provider = TracerProvider()
trace.set_tracer_provider(provider)

def emit(bank, **arguments):
    with audit_operation("recall", bank_id=bank, **arguments) as operation:
        pass
    return operation

def in_child(function):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child

def reap(child):
    _, status = os.waitpid(child, 0)
    assert status == 0, status
"""


@pytest.fixture
def run(database):
    """Run a script after the prelude in a process of its own, and read the banks of all rows, sorted."""

    def run(script):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        done = subprocess.run(
            # Python 3.12 warns of every fork beside a thread, which is what is tested.
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + textwrap.dedent(script), database],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        with psycopg.connect(database) as connection:
            return [bank for (bank,) in connection.execute("SELECT bank_id FROM astrocyte_audit_log ORDER BY bank_id")]

    return run


def test_what_waits_at_the_fork_is_written_once_by_the_parent_and_the_childs_own_by_the_child(run):
    rows = run(
        """
        processor = configure_audit(dsn=dsn, actions="*", schedule_delay_millis=3_600_000.0)
        for number in range(3):
            emit(f"parent-{number}")

        def child():
            assert processor.stats()["accepted"] == 0
            for number in range(3):
                emit(f"child-{number}")
            assert processor.force_flush(20_000)
            assert processor.stats()["stored"] == 3

        reap(in_child(child))
        assert processor.stats()["waiting"] == 3
        assert processor.force_flush(20_000)
        """
    )
    assert rows == ["child-0", "child-1", "child-2", "parent-0", "parent-1", "parent-2"]


def test_an_open_connection_is_not_shared_by_parent_and_children(run):
    rows = run(
        """
        processor = configure_audit(dsn=dsn, actions="*", schedule_delay_millis=1.0)
        emit("a-before")
        assert processor.force_flush(20_000)

        def child():
            for number in range(50):
                emit("b-child")
            assert processor.force_flush(20_000)

        children = [in_child(child) for _ in range(4)]
        for number in range(50):
            emit("c-parent")
            assert processor.force_flush(20_000)
        for each in children:
            reap(each)
        emit("d-after")
        assert processor.force_flush(20_000)
        """
    )
    assert rows == ["a-before", *["b-child"] * 200, *["c-parent"] * 50, "d-after"]


def test_a_child_that_ends_as_a_program_does_writes_what_it_left(run):
    rows = run(
        """
        processor = configure_audit(dsn=dsn, actions="*", schedule_delay_millis=3_600_000.0)
        child = os.fork()
        emit("child" if child == 0 else "parent")
        if child == 0:
            sys.exit()
        reap(child)
        """
    )
    assert rows == ["child", "parent"]


def test_a_child_of_a_child_is_a_process_like_any_other(run):
    rows = run(
        """
        processor = configure_audit(dsn=dsn, actions="*")
        def write(bank):
            emit(bank)
            assert processor.force_flush(20_000)
        write("1")
        def child():
            write("2")
            reap(in_child(lambda: write("3")))
            write("4")
        reap(in_child(child))
        write("5")
        """
    )
    assert rows == ["1", "2", "3", "4", "5"]


def test_an_operation_under_way_at_the_fork_is_one_row(run):
    rows = run(
        """
        processor = configure_audit(dsn=dsn, actions="*", schedule_delay_millis=1.0)
        with audit_operation("recall", bank_id="both"):
            with audit_operation("recall", bank_id="both"):
                pass
            child = os.fork()
        assert processor.force_flush(20_000)
        if child == 0:
            os._exit(0)
        reap(child)
        """
    )
    assert rows == ["both"]


def test_what_an_operation_has_taken_in_before_the_fork_is_the_parents(run):
    rows = run(
        """
        processor = configure_audit(dsn=dsn, actions="*", schedule_delay_millis=1.0)
        with audit_operation("recall", bank_id="outer"):
            with audit_operation("recall", bank_id="outer"):
                pass
            reap(in_child(processor.shutdown))
        assert processor.force_flush(20_000)
        """
    )
    assert rows == ["outer"]


def test_forks_beside_threads_that_audit_do_not_hang(run):
    rows = run(
        """
        processor = configure_audit(dsn=dsn, actions="*", schedule_delay_millis=1.0, max_export_batch_size=8)
        done = threading.Event()
        def work():
            while not done.is_set():
                emit("parent")
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()

        def child():
            emit("child")
            assert processor.force_flush(20_000)

        for _ in range(10):
            reap(in_child(child))
        done.set()
        for thread in threads:
            thread.join()
        assert processor.force_flush(20_000)
        """
    )
    assert rows.count("child") == 10
    assert set(rows) == {"child", "parent"}


def test_a_child_of_a_process_that_is_shut_down_refuses_as_its_parent_does(run):
    rows = run(
        """
        processor = configure_audit(dsn=dsn, actions="*")
        emit("before")
        processor.shutdown()

        def child():
            emit("after")
            try:
                emit("after", required=True)
            except AuditUnavailableError:
                pass
            else:
                raise AssertionError("its body ran")
            assert processor.stats()["refused_shutdown"] == 2

        reap(in_child(child))
        """
    )
    assert rows == ["before"]


@pytest.mark.parametrize("stock", ["SimpleSpanProcessor", "BatchSpanProcessor"])
def test_an_exporter_in_a_stock_processor_has_a_connection_a_process(run, stock):
    rows = run(
        f"""
        provider.add_span_processor({stock}(AuditSpanExporter(dsn=dsn, actions="*")))

        def write(bank):
            for _ in range(20):
                emit(bank)
                assert provider.force_flush()

        write("a")
        children = [in_child(lambda: write("b")) for _ in range(3)]
        write("c")
        for each in children:
            reap(each)
        write("d")
        """
    )
    assert rows == ["a"] * 20 + ["b"] * 60 + ["c"] * 20 + ["d"] * 20


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_of_multiprocessing_writes_what_it_left(database, tmp_path, method):
    # A spawned child imports its parent's main module, so it has to be a file.
    script = tmp_path / "program.py"
    script.write_text(
        PRELUDE + textwrap.dedent(
            """
            import multiprocessing

            processor = configure_audit(dsn=dsn, actions="*", schedule_delay_millis=3_600_000.0)

            if __name__ == "__main__":
                context = multiprocessing.get_context(sys.argv[2])
                children = [context.Process(target=emit, args=[f"child-{number}"]) for number in range(3)]
                for child in children:
                    child.start()
                for child in children:
                    child.join(60)
                    assert child.exitcode == 0, child.exitcode
                emit("parent")
            """
        )
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(script), database, method],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT bank_id FROM astrocyte_audit_log ORDER BY bank_id").fetchall()
    assert [bank for (bank,) in rows] == ["child-0", "child-1", "child-2", "parent"]


def test_a_lent_pool_is_not_used_in_a_forked_child(run):
    rows = run(
        """
        from psycopg_pool import ConnectionPool

        with ConnectionPool(dsn, min_size=1, max_size=2) as pool:
            processor = configure_audit(pool=pool, actions="*", schedule_delay_millis=1.0)
            emit("parent-1")
            assert processor.force_flush(20_000)

            def child():
                emit("child")
                assert not processor.force_flush(500)
                assert processor.stats()["stored"] == 0

            reap(in_child(child))
            emit("parent-2")
            assert processor.force_flush(20_000)
            provider.shutdown()
        """
    )
    assert rows == ["parent-1", "parent-2"]
