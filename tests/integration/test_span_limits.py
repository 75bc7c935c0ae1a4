"""An SDK that limits spans cuts what is oldest: what a row can't do without must survive it."""

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanLimits, TracerProvider

from astrocyte_otel_audit import audit_operation, audit_scope, audited
from astrocyte_otel_audit.postgres import AuditTable
from tests.servers import emptied_and_migrated


@pytest.fixture
def database(module_database):
    return emptied_and_migrated(module_database)


@pytest.fixture
def limited(audit, database):
    """Makes a provider with limits, and a pipeline onto the database."""
    made = []

    def make(**limits):
        provider = TracerProvider(span_limits=SpanLimits(**limits), shutdown_on_exit=False)
        made.append(provider)
        return provider, audit(dsn=database, tracer_provider=provider, actions=["recall"])

    yield make
    for provider in made:
        provider.shutdown()


def crowd(span):
    """What an application of many words sets on a span that it takes for its own."""
    for number in range(100):
        span.set_attribute(f"app.attribute.{number}", number)


def vital(row):
    return row.action, row.outcome, row.error_type, row.bank_id, row.transport, row.actor_id, row.actor_type


@pytest.mark.parametrize("limit", [32, 128])
def test_the_vital_fields_survive_a_hundred_attributes_of_the_applications(limited, table: AuditTable, limit):
    provider, processor = limited(max_span_attributes=limit)
    with (
        audit_scope(actor_id="alice", actor_type="user", transport="http"),
        audit_operation("recall", bank_id="b", request={"top_k": 5}, tracer_provider=provider) as operation,
    ):
        crowd(trace.get_current_span())
        operation.response = {"hits": 3}
    assert processor.force_flush()
    [row] = table.search().records
    assert vital(row) == ("recall", "success", None, "b", "http", "alice", "user")
    assert (row.request, row.response) == ({"top_k": 5}, {"hits": 3})


@pytest.mark.parametrize("limit", [32, 128])
def test_the_receipt_survives_them_too(limited, table: AuditTable, limit):
    provider, processor = limited(max_span_attributes=limit)
    with audit_operation("recall", tracer_provider=provider) as operation:
        span = trace.get_current_span()
        crowd(span)
    assert processor.force_flush()
    [row] = table.search().records
    assert span.attributes["audit.record.id"] == operation.record_id == row.id


@pytest.mark.parametrize("limit", [32, 128])
def test_a_failure_and_its_error_survive_too(limited, table: AuditTable, limit):
    provider, processor = limited(max_span_attributes=limit)

    @audited("recall", transport="mcp", tracer_provider=provider)
    def recall(bank_id):
        crowd(trace.get_current_span())
        raise TimeoutError("a secret")

    with audit_scope(actor_id="alice", actor_type="service"), pytest.raises(TimeoutError):
        recall("b")
    assert processor.force_flush()
    [row] = table.search().records
    assert vital(row) == ("recall", "failure", "TimeoutError", "b", "mcp", "alice", "service")


def test_a_payload_of_more_keys_than_the_limit_is_cut_and_the_row_says_so(limited, table: AuditTable):
    provider, processor = limited(max_span_attributes=32)
    payload = {f"key_{number}": number for number in range(60)}
    with audit_operation("recall", bank_id="b", request=payload, tracer_provider=provider):
        pass
    assert processor.force_flush()
    [row] = table.search().records
    assert vital(row) == ("recall", "success", None, "b", "unknown", None, None)
    assert 0 < len(row.request) < 60
    assert row.metadata["dropped_attributes"] > 0


def test_a_required_operation_that_is_not_on_the_allowlist_survives_too(limited, table: AuditTable):
    provider, processor = limited(max_span_attributes=32)
    with audit_operation("forget", bank_id="b", required=True, tracer_provider=provider):
        crowd(trace.get_current_span())
    assert processor.force_flush()
    assert [row.action for row in table.search().records] == ["forget"]


def test_an_inner_operation_still_joins_an_outer_one_whose_attributes_were_evicted(limited, table: AuditTable):
    provider, processor = limited(max_span_attributes=32)
    with audit_operation("recall", bank_id="b", tracer_provider=provider):
        crowd(trace.get_current_span())
        with audit_operation("recall", bank_id="b", transport="mcp", tracer_provider=provider):
            crowd(trace.get_current_span())
    assert processor.force_flush()
    [row] = table.search().records
    assert (row.bank_id, row.transport, row.parent_span_id) == ("b", "mcp", None)


@pytest.mark.parametrize("length", [128, 36, 8])
def test_a_limit_of_strings_cuts_long_values_and_never_the_row_or_its_id(limited, table: AuditTable, length):
    provider, processor = limited(max_span_attribute_length=length)
    with audit_operation(
        "recall", bank_id="b" * 200, actor_id="alice", request={"token_of_choice": "short"}, tracer_provider=provider
    ):
        context = trace.get_current_span().get_span_context()
    assert processor.force_flush()
    [row] = table.search().records
    assert (row.action, row.outcome, row.bank_id, row.actor_id) == ("recall", "success", "b" * length, "alice")
    assert row.span_id == f"{context.span_id:016x}"
    assert row.id[14] == "8"  # a whole UUID, although the receipt on the span may be cut
