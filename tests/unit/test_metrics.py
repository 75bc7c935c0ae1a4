"""Metrics: what the pipeline says of itself through OpenTelemetry's meters, read as a backend reads it."""

import gc
import itertools
import json
import logging
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import Histogram, InMemoryMetricReader, Sum
from opentelemetry.sdk.trace import TracerProvider

from astrocyte_otel_audit import AuditSpanExporter, AuditSpanProcessor, audit_operation
from astrocyte_otel_audit._version import __version__
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.pipeline import metrics as metrics_module
from astrocyte_otel_audit.pipeline.acknowledgement import Acknowledged, write_acknowledged
from astrocyte_otel_audit.pipeline.selection import Selection
from astrocyte_otel_audit.postgres import Appended, Fault, FaultClass
from tests.support import MemoryStorage

FLUSH_MILLIS = 20_000
NO_TABLE = Fault(FaultClass.PARK, "the table does not exist", "42P01")
#: What tells the first pipeline's from others'.
FIRST = (("otel.component.name", "astrocyte_audit_span_processor/0"),)
SECOND = (("otel.component.name", "astrocyte_audit_span_processor/1"),)
PROCESSOR = (*FIRST, ("otel.component.type", "astrocyte_audit_span_processor"))
EXPORTER = (
    ("otel.component.name", "astrocyte_audit_span_exporter/0"),
    ("otel.component.type", "astrocyte_audit_span_exporter"),
)
REJECTED = (("error.type", "rejected"), *EXPORTER)
NOTHING_DROPPED = {
    (*FIRST, ("reason", reason)): 0
    for reason in ("queue_full", "already_shutdown", "unreadable_span", "damaged_spool", "lost")
}


@pytest.fixture(autouse=True)
def _first_of_its_process(monkeypatch):
    monkeypatch.setattr(metrics_module, "_numbers", itertools.count())
    monkeypatch.setattr(metrics_module, "_global_sources", [])


@pytest.fixture
def reader():
    return InMemoryMetricReader()


@pytest.fixture
def meters(reader):
    meters = MeterProvider([reader], shutdown_on_exit=False)
    yield meters
    meters.shutdown()


@pytest.fixture
def second():
    """A tracer provider for a second pipeline."""
    second = TracerProvider(shutdown_on_exit=False)
    yield second
    second.shutdown()


@pytest.fixture
def observed(audit, storage, meters):
    """Makes pipelines onto the storage that are observed; none writes before it is asked to."""

    def observed(**arguments):
        defaults = {"storage": storage, "meter_provider": meters, "schedule_delay_millis": 3_600_000.0}
        return audit(**{**defaults, **arguments})

    return observed


@pytest.fixture
def read(reader):
    """Reads one metric: its points by their attributes; or all, by name."""

    def read(name=None):
        data = reader.get_metrics_data()
        found = {
            metric.name: metric
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            if scope.scope.name == "astrocyte_otel_audit"
            for metric in scope.metrics
        }
        if name is None:
            return found
        points = found[name].data.data_points
        return {tuple(sorted(point.attributes.items())): getattr(point, "value", point) for point in points}

    return read


#: Of a process of its own, whose meter provider and children go with it.
PRELUDE = """
import os, sys
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from astrocyte_otel_audit import audit_operation, configure_audit
from tests.support import MemoryStorage

reader = InMemoryMetricReader()

def pipeline(**arguments):
    tracers = TracerProvider()
    configure_audit(storage=MemoryStorage(), actions="*", tracer_provider=tracers, spool_dir=False, **arguments)
    return tracers

def emit(tracers, count=1):
    for _ in range(count):
        with audit_operation("recall", tracer_provider=tracers):
            pass

def emitted():
    [resource] = reader.get_metrics_data().resource_metrics
    [found] = [each for each in resource.scope_metrics[0].metrics if each.name == "audit.records.emitted"]
    return [point.value for point in found.data.data_points]
"""


def run_alone(script, *arguments):
    """Run a script after the prelude in a process of its own, and read what it prints."""
    done = subprocess.run(
        # Python 3.12 warns of every fork beside a thread, which is what is tested.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + textwrap.dedent(script), *arguments],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


class Refuses(MemoryStorage):
    def append(self, records):
        return Appended(set_aside=[(record, Fault(FaultClass.SET_ASIDE, "no")) for record in records])


def emit(provider, count=1, action="recall", **arguments):
    for _ in range(count):
        with audit_operation(action, tracer_provider=provider, **arguments):
            pass


def wait_until(condition):
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.001)


def test_these_are_the_metrics(observed, provider, read):
    processor = observed()
    emit(provider)
    assert processor.force_flush(FLUSH_MILLIS)
    counter, level = (Sum, True), (Sum, False)
    assert {
        name: (metric.unit, (type(metric.data), getattr(metric.data, "is_monotonic", None)))
        for name, metric in read().items()
    } == {
        "audit.records.emitted": ("{record}", counter),
        "audit.records.exported": ("{record}", counter),
        "audit.records.rejected": ("{record}", counter),
        "audit.records.dropped": ("{record}", counter),
        "audit.queue.depth": ("{record}", level),
        "audit.spool.bytes": ("By", level),
        "audit.export.duration": ("s", (Histogram, None)),
        "otel.sdk.processor.span.queue.size": ("{span}", level),
        "otel.sdk.processor.span.queue.capacity": ("{span}", level),
        "otel.sdk.processor.span.processed": ("{span}", counter),
        "otel.sdk.exporter.span.exported": ("{span}", counter),
    }
    assert all(metric.description for metric in read().values())


def test_they_are_this_librarys_and_say_its_version(observed, reader):
    observed()
    (resource,) = reader.get_metrics_data().resource_metrics
    assert [(each.scope.name, each.scope.version) for each in resource.scope_metrics] == [
        ("astrocyte_otel_audit", __version__)
    ]


def test_what_waits_and_what_was_written_is_counted(observed, provider, read, tmp_path):
    processor = observed(max_queue_size=77)
    emit(provider, 3)
    files = list(tmp_path.glob("astrocyte-otel-audit/spool/*/0*.segment"))
    assert read("audit.records.emitted") == {FIRST: 3}
    assert read("audit.records.exported") == {FIRST: 0}
    assert read("audit.queue.depth") == {FIRST: 3}
    assert read("audit.spool.bytes") == {FIRST: sum(path.stat().st_size for path in files)}
    assert read("otel.sdk.processor.span.queue.size") == {PROCESSOR: 3}
    assert read("otel.sdk.processor.span.queue.capacity") == {PROCESSOR: 77}
    assert read("otel.sdk.processor.span.processed") == {PROCESSOR: 0}
    assert processor.force_flush(FLUSH_MILLIS)
    emit(provider)
    assert read("audit.records.emitted") == {FIRST: 4}
    assert read("audit.records.exported") == {FIRST: 3}
    assert read("audit.queue.depth") == {FIRST: 1}
    assert read("otel.sdk.processor.span.queue.size") == {PROCESSOR: 1}
    assert read("otel.sdk.processor.span.processed") == {PROCESSOR: 3}
    assert read("otel.sdk.exporter.span.exported") == {EXPORTER: 3}
    assert read("audit.records.rejected") == {FIRST: 0}
    assert read("audit.records.dropped") == NOTHING_DROPPED


def test_a_meter_provider_without_a_hash_will_do(observed, provider):
    reader = InMemoryMetricReader()

    class Unhashable(MeterProvider):  # as logfire's is
        __hash__ = None

    meters = Unhashable([reader], shutdown_on_exit=False)
    processor = observed(meter_provider=meters)
    emit(provider)
    assert processor.force_flush(FLUSH_MILLIS)
    [resource] = reader.get_metrics_data().resource_metrics
    assert "audit.records.emitted" in {each.name for each in resource.scope_metrics[0].metrics}
    meters.shutdown()


def test_what_a_parked_tenant_waits_for_is_in_the_queue(observed, provider, read, storage):
    storage.parked[None] = NO_TABLE
    processor = observed()
    emit(provider, 2)
    assert not processor.force_flush(FLUSH_MILLIS)
    assert processor.stats()["parked"] == 2
    assert read("audit.queue.depth") == {FIRST: 2}
    assert read("otel.sdk.processor.span.queue.size") == {PROCESSOR: 2}
    assert read("audit.records.exported") == {FIRST: 0}


def test_what_the_table_refused_is_counted_as_rejected(observed, provider, read):
    processor = observed(storage=Refuses())
    emit(provider, 2)
    assert not processor.force_flush(FLUSH_MILLIS)
    assert read("audit.records.rejected") == {FIRST: 2}
    assert read("audit.records.exported") == {FIRST: 0}
    assert read("audit.records.dropped") == NOTHING_DROPPED


def test_what_the_table_refused_was_exported_and_processed_with_an_error(observed, provider, read):
    processor = observed(storage=Refuses())
    emit(provider, 2)
    assert not processor.force_flush(FLUSH_MILLIS)
    assert read("otel.sdk.exporter.span.exported") == {EXPORTER: 0, REJECTED: 2}
    assert read("otel.sdk.processor.span.processed") == {PROCESSOR: 0, (("error.type", "rejected"), *PROCESSOR): 2}


# Without a row, each with the reason.


def assert_dropped(read, reason, count):
    assert read("audit.records.dropped") == {**NOTHING_DROPPED, (*FIRST, ("reason", reason)): count}
    processed = read("otel.sdk.processor.span.processed")
    processed.pop(PROCESSOR)
    assert processed == {(("error.type", reason), *PROCESSOR): count}


def test_what_found_no_room_was_dropped_as_the_queue_was_full(observed, provider, read, storage):
    opened = threading.Event()
    storage.before_append = lambda records: opened.wait(20)
    observed(spool_dir=False, max_queue_size=3)
    emit(provider, 5)
    assert_dropped(read, "queue_full", 2)
    assert read("audit.records.emitted") == {FIRST: 3}
    opened.set()


def test_what_came_after_the_shutdown_was_dropped_for_that(observed, provider, read):
    observed().shutdown()
    emit(provider, 2)
    assert_dropped(read, "already_shutdown", 2)


def test_a_span_that_could_not_become_a_record_was_dropped(observed, provider, read, monkeypatch):
    def fail(*args):
        raise RuntimeError

    monkeypatch.setattr(Selection, "capture", fail)
    observed()
    emit(provider, 2)
    assert_dropped(read, "unreadable_span", 2)


def test_what_is_damaged_in_the_spool_was_dropped(observed, provider, read, tmp_path):
    processor = observed()
    emit(provider, 3, bank_id="user-calvin")
    (path,) = tmp_path.glob("astrocyte-otel-audit/spool/*/000001.segment")
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(b"user-calvin"))
        file.write(b"?")
    assert not processor.force_flush(FLUSH_MILLIS)
    assert_dropped(read, "damaged_spool", 1)
    assert read("audit.records.exported") == {FIRST: 2}
    assert read("audit.queue.depth") == {FIRST: 0}


def test_what_a_parked_tenant_found_no_place_for_was_dropped_as_lost(observed, provider, read, storage):
    storage.parked[None] = NO_TABLE
    processor = observed(spool_dir=False, max_queue_size=4, max_export_batch_size=1)
    for _ in range(4):
        emit(provider)
        assert not processor.force_flush(FLUSH_MILLIS)
    assert processor.stats()["lost"] == 2
    assert_dropped(read, "lost", 2)


# How long an attempt took.


def durations(read):
    return {attributes: point.count for attributes, point in read("audit.export.duration").items()}


def test_each_attempt_to_write_is_timed_with_the_class_of_its_error(observed, provider, read, storage):
    def fail(records):
        if errors:
            raise errors.pop()

    errors = [RuntimeError("its own words"), DatabaseUnavailableError("no"), DatabaseUnavailableError("no", "57P03")]
    storage.before_append = fail
    processor = observed()
    emit(provider, 3)
    assert processor.force_flush(FLUSH_MILLIS)
    emit(provider, 2)
    assert processor.force_flush(FLUSH_MILLIS)
    assert durations(read) == {
        FIRST: 2,
        (("error.type", "57P03"), *FIRST): 1,
        (("error.type", "DatabaseUnavailableError"), *FIRST): 1,
        (("error.type", "RuntimeError"), *FIRST): 1,
    }


def test_an_attempts_duration_is_in_seconds(observed, provider, read, storage):
    storage.before_append = lambda records: time.sleep(0.05)
    processor = observed()
    emit(provider)
    assert processor.force_flush(FLUSH_MILLIS)
    (point,) = read("audit.export.duration").values()
    assert 0.05 <= point.sum < 5.0


def test_durations_from_a_millisecond_to_the_longest_statement_are_told_apart(observed, provider, read):
    processor = observed()
    emit(provider)
    assert processor.force_flush(FLUSH_MILLIS)
    (point,) = read("audit.export.duration").values()
    bounds = point.explicit_bounds
    assert (bounds[0], bounds[-1]) == (0.001, 30.0)
    assert all(upper <= 3 * lower for lower, upper in itertools.pairwise(bounds))


def test_before_the_first_attempt_there_is_no_duration(observed, read):
    observed()
    assert "audit.export.duration" not in read()


# Whose they are, and for how long.


def test_a_processor_that_is_gone_is_not_observed_any_more(meters, read, storage, tmp_path):
    tracers = TracerProvider(shutdown_on_exit=False)
    exporter = AuditSpanExporter(storage=storage, actions="*")
    processor = AuditSpanProcessor(exporter, meter_provider=meters)
    tracers.add_span_processor(processor)
    emit(tracers)
    assert read("audit.records.emitted") == {FIRST: 1}
    tracers.shutdown()
    gone = weakref.ref(processor)
    del tracers, processor
    gc.collect()
    assert gone() is None
    assert read().keys() <= {"audit.export.duration"}


def test_each_of_several_pipelines_is_observed_under_its_own_name(observed, provider, second, read):
    processors = [observed(), observed(tracer_provider=second, max_queue_size=77)]
    emit(provider)
    emit(second, 2)
    assert all(processor.force_flush(FLUSH_MILLIS) for processor in processors)
    emit(second, 3)
    assert read("audit.records.emitted") == {FIRST: 1, SECOND: 5}
    assert read("audit.records.exported") == {FIRST: 1, SECOND: 2}
    assert read("audit.queue.depth") == {FIRST: 0, SECOND: 3}
    assert durations(read) == {FIRST: 1, SECOND: 1}
    assert len(read("audit.records.dropped")) == 2 * len(NOTHING_DROPPED)
    assert by_component(read("otel.sdk.processor.span.queue.capacity")) == {
        "astrocyte_audit_span_processor/0": 32_768,
        "astrocyte_audit_span_processor/1": 77,
    }
    assert by_component(read("otel.sdk.exporter.span.exported")) == {
        "astrocyte_audit_span_exporter/0": 1,
        "astrocyte_audit_span_exporter/1": 2,
    }


def by_component(points):
    return {dict(labels)["otel.component.name"]: value for labels, value in points.items()}


def test_a_pipeline_is_observed_after_another_one_is_gone(observed, second, read, meters, storage):
    processor = AuditSpanProcessor(AuditSpanExporter(storage=storage, actions="*"), meter_provider=meters)
    processor.shutdown()
    gone = weakref.ref(processor)
    del processor
    gc.collect()
    assert gone() is None
    observed(tracer_provider=second)
    emit(second)
    assert read("audit.records.emitted") == {SECOND: 1}


def test_each_meter_provider_hears_of_its_own_pipelines_only(observed, second, read):
    others = InMemoryMetricReader()
    meters = MeterProvider([others], shutdown_on_exit=False)
    observed()
    observed(tracer_provider=second, meter_provider=meters)
    assert read("audit.records.emitted") == {FIRST: 0}
    assert "astrocyte_audit_span_processor/0" not in others.get_metrics_data().to_json()
    meters.shutdown()


@pytest.mark.parametrize("when", [0, 1, 2])
def test_pipelines_are_observed_whenever_the_application_sets_its_meter_provider(when):
    script = """
        for number in range(3):
            if number == int(sys.argv[1]):
                metrics.set_meter_provider(MeterProvider([reader]))
            if number < 2:
                emit(pipeline())
        print(emitted())
    """
    assert run_alone(script, str(when)) == [1, 1]


def test_a_forked_child_tells_of_the_pipeline_it_has_inherited_and_of_its_own():
    script = """
        meters = MeterProvider([reader])
        inherited = pipeline(meter_provider=meters)
        emit(inherited)
        if (child := os.fork()) == 0:
            emit(inherited, 2)
            emit(pipeline(meter_provider=meters), 3)
            print(emitted(), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
    """
    assert run_alone(script) == [2, 3]


def test_a_processor_that_is_shut_down_is_still_observed(observed, provider, read):
    processor = observed()
    emit(provider, 2)
    processor.shutdown()
    assert read("audit.records.exported") == {FIRST: 2}
    assert read("audit.spool.bytes") == {FIRST: 0}


def test_without_a_meter_provider_of_its_own_the_global_one_is_taken(observed, provider, read, meters, monkeypatch):
    monkeypatch.setattr(metrics_module, "get_meter_provider", lambda: meters)
    processor = observed(meter_provider=None)
    emit(provider)
    assert processor.force_flush(FLUSH_MILLIS)
    assert read("audit.records.exported") == {FIRST: 1}


def test_without_any_meter_provider_nothing_is_said_and_all_goes_on(observed, provider, storage, caplog):
    processor = observed(meter_provider=None)
    emit(provider)
    assert processor.force_flush(FLUSH_MILLIS)
    assert (len(storage.records), caplog.messages) == (1, [])


def test_a_reader_may_read_while_operations_end_and_are_written(observed, provider, read, caplog):
    caplog.set_level(logging.WARNING)
    processor = observed(schedule_delay_millis=1.0, max_export_batch_size=7)
    threads = [threading.Thread(target=emit, args=[provider, 300]) for _ in range(4)]
    for thread in threads:
        thread.start()
    last = 0
    while any(thread.is_alive() for thread in threads):
        found = read("audit.records.emitted")[FIRST]
        assert found >= last
        last = found
    assert processor.force_flush(FLUSH_MILLIS)
    assert read("audit.records.exported") == {FIRST: 1200}
    assert caplog.messages == []


# What another process writes.


def test_with_an_external_writer_that_one_says_what_was_exported(audit, provider, meters, read, tmp_path):
    audit(writer="external", meter_provider=meters)
    emit(provider, 5)
    (directory,) = [path.parent for path in tmp_path.glob("astrocyte-otel-audit/spool/*/000001.segment")]
    assert read("audit.queue.depth") == {FIRST: 5}
    write_acknowledged(directory, Acknowledged(1, 1, stored=3, refused=1))
    assert read("audit.records.emitted") == {FIRST: 5}
    assert read("audit.records.exported") == {FIRST: 3}
    assert read("audit.records.rejected") == {FIRST: 1}
    assert read("audit.queue.depth") == {FIRST: 1}
    assert read("audit.records.dropped") == {
        (*FIRST, ("reason", reason)): 0 for reason in ("queue_full", "already_shutdown", "unreadable_span")
    }
    assert read("otel.sdk.exporter.span.exported") == {EXPORTER: 3, REJECTED: 1}
    assert read("audit.spool.bytes")[FIRST] > 0


# What they are made of.


def test_the_stats_have_these_counts_whoever_writes(audit, storage, tmp_path):
    everywhere = {
        "accepted", "waiting", "stored", "set_aside", "refused_full", "refused_shutdown", "unreadable", "spool_bytes",
        "open",
    }  # fmt: skip
    thread = audit(storage=storage)
    external = audit(writer="external")
    assert thread.stats().keys() == everywhere | {"adopted", "parked", "lost", "damaged"}
    assert external.stats().keys() == everywhere
    assert {*thread.stats().values(), *external.stats().values()} == {0}
