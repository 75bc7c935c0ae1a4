"""Parking: tenants that can't be written wait in lanes of their own, and the others go on."""

import math

import pytest

from astrocyte_otel_audit.pipeline.backlog import Entry
from astrocyte_otel_audit.pipeline.parking import Backoff, Parking
from astrocyte_otel_audit.pipeline.segment import MemorySegment
from tests.records import bare_record

#: The schemas of two tenants.
A, B = "tenant_a", "tenant_b"


def items(schema, *numbers):
    where = MemorySegment()
    return [Entry(number, schema, bare_record(number, schema=schema), where, number) for number in numbers]


def nowhere_else(entry):
    """As for an entry that is in memory only."""
    return False


def numbers(found):
    return [item.number for item in found]


@pytest.fixture
def parking():
    return Parking(Backoff(8.0, 8.0))


@pytest.mark.parametrize(
    ("attempt", "longest"), [(1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 5.0), (6, 5.0), (10_000, 5.0)]
)
def test_a_backoff_doubles_up_to_its_maximum_less_a_jitter(attempt, longest):
    delays = [Backoff(0.5, 5.0).delay(attempt) for _ in range(200)]
    assert longest / 2 <= min(delays) < max(delays) <= longest
    assert len(set(delays)) > 1


def test_nothing_parked_diverts_nothing(parking):
    batch = [*items(A, 0), *items(None, 1)]
    assert parking.divert(batch, capacity=10, drop=nowhere_else) == (batch, [])
    assert (len(parking), parking.oldest(), parking.next_attempt()) == (0, None, math.inf)


def test_a_parked_tenants_next_records_join_it_and_the_others_go_on(parking):
    parking.park(items(A, 0, 1), now=0.0, flush=0)
    others, overflow = parking.divert(
        [*items(A, 2), *items(B, 3), *items(None, 4), *items(A, 5)], capacity=10, drop=nowhere_else
    )
    assert (numbers(others), overflow) == ([3, 4], [])
    assert (len(parking), parking.oldest()) == (4, 0)


def test_a_tenant_by_the_default_schema_is_a_tenant_too(parking):
    parking.park(items(None, 0), now=0.0, flush=0)
    others, _ = parking.divert([*items(None, 1), *items(A, 2)], capacity=10, drop=nowhere_else)
    assert numbers(others) == [2]


def test_what_finds_no_place_overflows_newest_first(parking):
    parking.park(items(A, 0), now=0.0, flush=0)
    parking.park(items(B, 1), now=0.0, flush=0)
    others, overflow = parking.divert([*items(A, 2, 3), *items(None, 4), *items(B, 5)], capacity=3, drop=nowhere_else)
    assert (numbers(others), numbers(overflow), len(parking)) == ([4], [3, 5], 3)


def test_what_is_on_disk_too_finds_a_place_past_the_capacity(parking):
    dropped = []
    parking.park(items(A, 0), now=0.0, flush=0)
    others, overflow = parking.divert(items(A, 1, 2, 3), capacity=2, drop=lambda entry: not dropped.append(entry))
    assert (others, overflow, numbers(dropped), len(parking)) == ([], [], [2, 3], 4)


def test_records_parked_again_wait_in_front_in_their_order(parking):
    parking.park(items(A, 0, 1), now=0.0, flush=0)
    parking.divert(items(A, 2, 3), capacity=10, drop=nowhere_else)
    parking.expedite()
    assert numbers(parking.due(0.0, limit=4)) == [0, 1]
    parking.park(items(A, 0, 1), now=0.0, flush=0)
    parking.expedite()
    assert numbers(parking.due(0.0, limit=16)) == [0, 1, 2, 3]


def test_an_attempt_is_due_after_the_backoff_and_not_before(parking):
    parking.park(items(A, 0), now=100.0, flush=0)
    assert 104.0 <= parking.next_attempt() <= 108.0
    assert parking.due(103.9, limit=9) == []
    assert numbers(parking.due(108.0, limit=9)) == [0]


def test_pauses_grow_with_every_failure():
    parking = Parking(Backoff(1.0, 1000.0))
    pauses = []
    for _ in range(8):
        parking.park(items(A, 0), now=0.0, flush=0)
        pauses.append(parking.next_attempt())
        parking.due(1000.0, limit=1)
    assert pauses == sorted(pauses)
    assert pauses[-1] >= 64.0


def test_an_attempt_is_half_as_large_with_every_failure_and_twice_with_every_success(parking):
    parking.park(items(A, *range(64)), now=0.0, flush=0)
    sizes = []
    for passes in (False, False, False, False, True, True, True, True):
        parking.expedite()
        batch = parking.due(0.0, limit=16)
        sizes.append(len(batch))
        if passes:
            parking.release(A)
        else:
            parking.park(batch, now=0.0, flush=0)
    assert sizes == [8, 4, 2, 1, 1, 1, 2, 4]


def test_a_tenant_of_which_others_passed_is_tried_again_soon():
    parking = Parking(Backoff(1.0, 1000.0))
    for _ in range(8):
        parking.park(items(A, 0), now=0.0, flush=0)
        parking.due(1e9, limit=1)
    parking.park(items(A, 0), now=0.0, flush=0, others_passed=True)
    assert parking.next_attempt() <= 1.0


def test_while_an_attempt_is_under_way_the_tenant_is_not_due_again(parking):
    parking.park(items(A, 0, 1), now=0.0, flush=0)
    assert numbers(parking.due(10.0, limit=1)) == [0]
    assert parking.due(1e9, limit=1) == []
    # It is still parked: what comes now waits behind.
    assert parking.divert(items(A, 2), capacity=9, drop=nowhere_else) == ([], [])


def test_a_released_tenants_backlog_is_due_at_once_and_an_empty_lane_is_gone(parking):
    parking.park(items(A, 0, 1), now=0.0, flush=0)
    parking.due(10.0, limit=1)
    parking.release(A)
    assert numbers(parking.due(10.0, limit=1)) == [1]
    parking.release(A)
    assert parking.divert(items(A, 2), capacity=9, drop=nowhere_else)[1] == []
    assert len(parking) == 0


def test_releasing_a_tenant_that_is_not_parked_is_harmless(parking):
    parking.park(items(A, 0), now=0.0, flush=0)
    parking.release(B)
    assert len(parking) == 1


def test_only_the_due_tenant_is_taken(parking):
    parking.park(items(A, 0), now=0.0, flush=0)
    parking.park(items(B, 1), now=100.0, flush=0)
    assert numbers(parking.due(50.0, limit=9)) == [0]
    assert parking.due(50.0, limit=9) == []


def test_expediting_makes_every_tenant_due(parking):
    parking.park(items(A, 0), now=0.0, flush=0)
    parking.park(items(B, 1), now=0.0, flush=0)
    parking.expedite()
    assert sorted(numbers([*parking.due(0.0, limit=9), *parking.due(0.0, limit=9)])) == [0, 1]


@pytest.mark.parametrize(
    ("failed_for", "flush", "goal", "answer"),
    [
        (3, 3, 10, True),  # an attempt was made for this flush, and failed
        (4, 3, 10, True),
        (2, 3, 10, False),  # not yet
        (2, 3, 5, True),  # what waits was accepted after the flush was called
    ],
)
def test_a_flush_can_give_up_once_an_attempt_made_for_it_has_failed(parking, failed_for, flush, goal, answer):
    parking.park(items(A, 5), now=0.0, flush=failed_for)
    assert parking.all_failed_for(flush, goal) is answer


def test_a_flush_waits_for_every_tenant(parking):
    parking.park(items(A, 0), now=0.0, flush=2)
    parking.park(items(B, 1), now=0.0, flush=1)
    assert not parking.all_failed_for(2, 10)
