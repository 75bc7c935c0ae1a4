"""The row: its id, its times, and what it is when nobody says more."""

from __future__ import annotations

import hashlib
import uuid
from datetime import UTC, datetime, timedelta, timezone, tzinfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrocyte_otel_audit.record import (
    NO_SCOPE,
    OUTCOMES,
    AuditRecord,
    ScopeDefaults,
    datetime_from_ns,
    ns_from_datetime,
    record_id,
)

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
SPAN_ID = 0xB7AD6B7169203331
START_NS = 1_700_000_000_123_456_789

trace_ids = st.integers(0, 2**128 - 1)
span_ids = st.integers(0, 2**64 - 1)
int64s = st.integers(-(2**63), 2**63 - 1)
unhurried = settings(deadline=None, max_examples=100)


def as_documented(trace_id: int, span_id: int, start_ns: int) -> uuid.UUID:
    """The id by the words of RFC 9562 and of `record_id`, bit by bit rather than digit by digit."""
    material = trace_id.to_bytes(16) + span_id.to_bytes(8) + start_ns.to_bytes(8, signed=True)
    digest = int.from_bytes(hashlib.blake2b(material, digest_size=10).digest())
    bits = (start_ns // 1_000_000) % 2**48 << 80
    bits |= 0b1000 << 76 | digest >> 68 << 64  # the version, and the digest's first 12 bits; the next two are left out
    bits |= 0b10 << 62 | (digest >> 64) % 2**2 << 60 | (digest >> 4) % 2**60
    return uuid.UUID(int=bits)


def a_record(**fields) -> AuditRecord:
    defaults = dict.fromkeys(AuditRecord._fields) | {"id": "", "action": "recall", "metadata": {}}
    return AuditRecord(**{**defaults, **fields})


class TestRecordId:
    def test_is_the_same_in_every_release(self):
        # Another value here would let a retry across an upgrade write a second row. By `b2sum -l 80`, the digest is
        # 0643b2c6923f43cb4b0b.
        assert record_id(TRACE_ID, SPAN_ID, START_NS) == "018bcfe5-687b-8064-bb2c-6923f43cb4b0"

    @unhurried
    @given(trace_ids, span_ids, int64s)
    def test_is_what_its_documentation_says(self, trace_id, span_id, start_ns):
        assert record_id(trace_id, span_id, start_ns) == str(as_documented(trace_id, span_id, start_ns))

    @unhurried
    @given(trace_ids, span_ids, int64s)
    def test_is_a_uuid_of_version_8(self, trace_id, span_id, start_ns):
        text = record_id(trace_id, span_id, start_ns)
        parsed = uuid.UUID(text)
        assert (parsed.version, parsed.variant) == (8, uuid.RFC_4122)
        assert str(parsed) == text

    def test_is_the_same_for_the_same_span(self):
        assert record_id(TRACE_ID, SPAN_ID, START_NS) == record_id(TRACE_ID, SPAN_ID, START_NS)

    @unhurried
    @given(trace_ids, span_ids, int64s, trace_ids, span_ids, int64s)
    def test_differs_where_any_part_of_the_span_differs(self, trace, span, start, other_trace, other_span, other_start):
        given_parts = (trace, span, start)
        others = {(other_trace, span, start), (trace, other_span, start), (trace, span, other_start)} - {given_parts}
        assert record_id(*given_parts) not in {record_id(*parts) for parts in others}

    def test_differs_by_a_single_nanosecond_of_the_start(self):
        assert record_id(TRACE_ID, SPAN_ID, START_NS) != record_id(TRACE_ID, SPAN_ID, START_NS + 1)

    @unhurried
    @given(span_ids, span_ids, st.integers(0, 2**63 - 1_000_001), st.integers(1, 10_000))
    def test_sorts_by_the_millisecond_of_the_start(self, span, later_span, start_ns, milliseconds):
        later = min(start_ns + milliseconds * 1_000_000, 2**63 - 1)
        assert record_id(TRACE_ID, span, start_ns) < record_id(TRACE_ID, later_span, later)

    @pytest.mark.parametrize(
        "start_ns", [-1, -(2**63), -(2**63) - 1, 2**63 - 1, 2**63, 10**30, -(10**30)], ids=lambda ns: f"{ns:.0e}"
    )
    def test_exists_for_every_start_that_a_clock_may_claim(self, start_ns):
        assert uuid.UUID(record_id(TRACE_ID, SPAN_ID, start_ns)).version == 8

    @pytest.mark.parametrize("ids", [(0, 0), (2**128 - 1, 2**64 - 1), (1, 2**64 - 1)])
    def test_exists_for_the_smallest_and_the_greatest_ids(self, ids):
        assert uuid.UUID(record_id(*ids, START_NS)).version == 8


class TestTimes:
    @pytest.mark.parametrize(
        ("nanoseconds", "instant"),
        [
            (0, datetime(1970, 1, 1, tzinfo=UTC)),
            (START_NS, datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC)),
            (999, datetime(1970, 1, 1, tzinfo=UTC)),
            (-1, datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
            (10**30, datetime.max.replace(tzinfo=UTC)),
            (10**400, datetime.max.replace(tzinfo=UTC)),
            (-(10**30), datetime.min.replace(tzinfo=UTC)),
            (-(10**400), datetime.min.replace(tzinfo=UTC)),
        ],
        ids=["epoch", "now", "under a microsecond", "before the epoch", "late", "too late", "early", "too early"],
    )
    def test_nanoseconds_become_an_instant_cut_to_what_a_datetime_holds(self, nanoseconds, instant):
        assert datetime_from_ns(nanoseconds) == instant
        assert datetime_from_ns(nanoseconds).tzinfo is UTC

    @unhurried
    @given(st.datetimes(timezones=st.just(UTC)))
    def test_an_instant_survives_the_way_to_nanoseconds_and_back(self, instant):
        assert datetime_from_ns(ns_from_datetime(instant)) == instant

    @unhurried
    @given(int64s)
    def test_nanoseconds_survive_the_way_back_to_the_microsecond(self, nanoseconds):
        assert ns_from_datetime(datetime_from_ns(nanoseconds)) == nanoseconds // 1000 * 1000

    @pytest.mark.parametrize("offset", [timedelta(0), timedelta(hours=14), -timedelta(hours=12, minutes=1)])
    @pytest.mark.parametrize("instant", [datetime.min, datetime(2024, 2, 29, 12), datetime.max], ids=str)
    def test_an_offset_is_taken_off_at_both_ends_of_time_too(self, instant, offset):
        expected = ns_from_datetime(instant.replace(tzinfo=UTC)) - int(offset.total_seconds()) * 10**9
        assert ns_from_datetime(instant.replace(tzinfo=timezone(offset))) == expected

    def test_a_naive_instant_is_taken_as_utc(self):
        assert ns_from_datetime(datetime(2024, 1, 1)) == ns_from_datetime(datetime(2024, 1, 1, tzinfo=UTC))

    def test_a_time_zone_that_knows_no_offset_is_taken_as_utc(self):
        class Nowhere(tzinfo):
            def utcoffset(self, moment):
                return None

        instant = datetime(2024, 1, 1, tzinfo=Nowhere())
        assert ns_from_datetime(instant) == ns_from_datetime(datetime(2024, 1, 1, tzinfo=UTC))


class TestAuditRecord:
    def test_says_how_long_the_operation_took(self):
        start = datetime(2024, 1, 1, tzinfo=UTC)
        assert a_record(started_at=start, ended_at=start + timedelta(milliseconds=1500)).duration_seconds == 1.5

    def test_has_no_duration_without_an_end(self):
        assert a_record(started_at=datetime(2024, 1, 1, tzinfo=UTC), ended_at=None).duration_seconds is None

    def test_is_unwritten_and_in_the_default_schema_until_something_else_is_said(self):
        required = dict.fromkeys(AuditRecord._fields[:-2])
        record = AuditRecord(**required)
        assert (record.recorded_at, record.schema) == (None, None)

    def test_cannot_be_changed(self):
        with pytest.raises(AttributeError):
            a_record().action = "retain"

    def test_has_the_columns_of_the_upstream_table_first(self):
        assert AuditRecord._fields[:9] == (
            "id", "action", "transport", "bank_id", "started_at", "ended_at", "request", "response", "metadata",
        )  # fmt: skip


def test_a_scope_says_nothing_by_default_and_cannot_be_changed():
    nothing = ScopeDefaults()
    assert (nothing.actor_id, nothing.actor_type, nothing.transport, nothing.bank_id, nothing.schema) == (None,) * 5
    assert nothing == NO_SCOPE
    with pytest.raises(AttributeError):
        nothing.actor_id = "eve"


def test_outcomes_are_those_of_the_table():
    assert sorted(OUTCOMES) == ["failure", "success", "unknown"]
