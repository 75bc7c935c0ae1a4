"""What is known so far of a row: it is one if nothing more comes, and never one beside it."""

import shutil
import tempfile
from pathlib import Path

import pytest
from opentelemetry import trace

from astrocyte_otel_audit import AuditSpanExporter, audit_operation, audit_scope
from astrocyte_otel_audit.pipeline.replay import replay, status
from astrocyte_otel_audit.pipeline.spool import Spool
from tests.support import MemoryStorage


@pytest.fixture
def spool(tmp_path):
    return tmp_path / "astrocyte-otel-audit" / "spool"


@pytest.fixture
def operation(provider):
    return lambda **arguments: audit_operation("recall", tracer_provider=provider, **arguments)


@pytest.fixture
def killed(spool, tmp_path):
    """Gives what another process would write, were this one killed now, and what `spool replay` would say."""

    def killed():
        copy, storage = Path(tempfile.mkdtemp(dir=tmp_path)), MemoryStorage()
        shutil.copytree(spool, copy, dirs_exist_ok=True)
        exporter = AuditSpanExporter(storage=storage)
        said = replay(copy, exporter, any_destination=True, progress=lambda count: None)
        return storage.records, said

    return killed


def test_an_operation_that_is_not_audited_at_its_end_leaves_what_was_inside_it_and_no_more(
    audit, storage, operation, spool, killed
):
    processor = audit(storage=storage, actions=["recall"])
    with operation() as outer:
        with operation():
            pass
        outer.action = "other"
        trace.get_current_span().set_attribute("audit.action", "other")
    assert processor.force_flush(10_000)
    assert len(killed()[0]) == len(storage.records) == 1
    processor.shutdown()
    assert list(spool.iterdir()) == []


def test_a_part_that_ends_within_a_write_leaves_no_second_row(audit, storage, operation, killed, monkeypatch):
    processor = audit(storage=storage)
    outer, middle = operation(bank_id="x"), operation()
    outer.start()
    with outer.current():
        middle.start()
    with middle.current(), operation():
        pass
    original = Spool.append

    def append(*arguments, **keywords):
        monkeypatch.setattr(Spool, "append", original)
        middle.finish()  # as garbage collection or a signal's handler may
        return original(*arguments, **keywords)

    monkeypatch.setattr(Spool, "append", append)
    with operation(bank_id="other"):
        pass
    outer.finish()
    assert processor.force_flush(10_000)
    assert len(killed()[0]) == len(storage.records) == 2


def test_what_was_replaced_is_not_counted_as_begun(audit, storage, operation, spool):
    audit(storage=storage)
    with operation():
        with operation(), operation():
            pass
        [process] = status(spool)
        assert process.begun == 1
    [process] = status(spool)
    assert process.begun == 0


def test_a_required_operation_and_its_part_are_one_row_that_is_counted_once(audit, storage, operation, killed):
    audit(storage=storage)
    with operation(required=True):
        with operation():
            pass
        rows, said = killed()
    assert said.written == len(rows) == 1


def test_another_actor_inside_a_required_operation_does_not_vanish(audit, storage, operation, killed):
    audit(storage=storage)
    with audit_scope(actor_id="admin"), operation(required=True):
        with operation(actor_id="intruder") as inner:
            pass
        rows, _ = killed()
    assert sorted((row.actor_id, row.outcome) for row in rows) == [("admin", "unknown"), ("intruder", "success")]
    assert inner.record_id in {row.id for row in rows}
