"""Whatever a payload is, its flat attributes give back exactly that."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from astrocyte_otel_audit.attributes import EMPTY, METADATA, REQUEST, RESPONSE, escape, unflatten
from astrocyte_otel_audit.normalize import Normalizer
from astrocyte_otel_audit.pipeline.captured import filled, normalized, to_record
from astrocyte_otel_audit.pipeline.segment import PROVISIONAL, RECORD, captured_frame, frames, parse_captured
from tests.records import full_captured

unhurried = settings(deadline=None, max_examples=200)

#: Every key there is, those that look like paths, escapes and markers often.
keys = st.text(max_size=6) | st.text(".%2E5", max_size=6) | st.sampled_from(["", ".", "%", EMPTY, "%25empty", "a.b"])
scalars = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
values = scalars | st.lists(st.integers(), max_size=3) | st.lists(st.text(max_size=3), max_size=3)
payloads = st.dictionaries(
    keys, st.recursive(values, lambda inner: st.dictionaries(keys, inner, max_size=3), max_leaves=10), max_size=5
)


def flattened(payload: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The attributes of a payload, by the wire's documentation and without the code under test."""
    for key, value in payload.items():
        segments = (*path, "".join({".": "%2E", "%": "%25"}.get(character, character) for character in key))
        if value == {} and isinstance(value, dict):
            yield ".".join((*segments, "%empty")), True
        elif isinstance(value, dict):
            yield from flattened(value, segments)
        else:
            yield ".".join(segments), tuple(value) if isinstance(value, list) else value


def rebuilt(attributes: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in attributes:
        unflatten(path, value, tree)
    return tree


def leaves(tree: object) -> Iterator[object]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    else:
        yield tree


@unhurried
@given(payloads, st.randoms(use_true_random=False))
def test_a_payload_survives_the_way_through_attributes_in_any_order(payload, random):
    attributes = list(flattened(payload))
    random.shuffle(attributes)
    assert rebuilt(attributes) == payload


@unhurried
@given(payloads)
def test_no_two_values_share_an_attribute(payload):
    paths = [path for path, _ in flattened(payload)]
    assert len(set(paths)) == len(paths)


@unhurried
@given(keys)
def test_an_escaped_key_is_one_segment_and_the_same_key_again(key):
    assert "." not in escape(key)
    assert rebuilt([(escape(key), 1)]) == {key: 1}


@unhurried
@given(st.sets(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), max_size=12), st.data())
def test_attributes_that_contradict_each_other_lose_nothing_in_any_order(paths, data):
    attributes = [(path, number) for number, path in enumerate(sorted(paths))]
    one, other = (rebuilt(data.draw(st.permutations(attributes))) for _ in range(2))
    assert sorted(leaves(one)) == [number for _, number in attributes]
    assert one == other


@unhurried
@given(st.lists(keys, min_size=1, max_size=60), values)
def test_a_path_of_any_depth_gives_a_payload_of_bounded_depth(segments, value):
    tree: Any = rebuilt([(".".join(segments), value)])
    depth = 0
    while isinstance(tree, dict) and tree:
        [tree] = tree.values()
        depth += 1
    assert depth <= 16
    assert tree in ({}, value)


fields = st.sampled_from(["top_k", "since", "id", "memory_ids", "tags", "a.b", "password"])
int64s = st.integers(-(2**63), 2**63 - 1)
texts = (
    int64s
    | st.text(max_size=80)
    | st.binary(max_size=9)
    | st.sampled_from(["flu", "Calvin's blood pressure", "sk-Wn8vq2LpXz7TfKd4", "[redacted]"])
    | st.lists(int64s | st.floats(allow_nan=False), max_size=20)
    | st.lists(st.text(max_size=9), max_size=3)
)
others = scalars | texts | st.uuids() | st.datetimes(timezones=st.none() | st.just(UTC)) | st.dates()
#: As applications hand them in: keys of every rule, and values of every kind. Not a date or an object under a key
#: that holds text: what stands there as a string later can't be told from a text.
of_text = st.dictionaries(
    st.sampled_from(["query", "messages", "what is it", "my password"]),
    texts | st.dictionaries(fields, texts, max_size=3) | st.lists(st.dictionaries(fields, texts), max_size=3),
    max_size=4,
)
flat = st.dictionaries(fields, others, max_size=6)
of_anything = flat | of_text | st.dictionaries(fields, flat | of_text | st.lists(flat, max_size=3), max_size=4)


@unhurried
@given(of_anything)
def test_what_has_passed_the_normalizer_passes_it_unchanged(payload):
    once = Normalizer().payload(payload)
    assert Normalizer(max_depth=16, max_attributes=1024).payload(once) == once


@unhurried
@given(of_anything, of_anything, of_anything)
def test_attributes_that_have_passed_the_normalizer_are_captured_of_another_emitter_unchanged(
    request, response, metadata
):
    made: dict[str, Any] = {}
    for prefix, payload in ((REQUEST, request), (RESPONSE, response), (METADATA, metadata)):
        made.update(Normalizer().attributes(payload, prefix))
    assert normalized(made) == made


numbers_by_token = st.dictionaries(
    st.text("abcxyz_./-:019", min_size=1, max_size=10).map("k{}".format), st.integers(-(2**63), 2**63 - 1), max_size=8
)


@unhurried
@given(st.recursive(numbers_by_token, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3)))
def test_a_payload_of_numbers_comes_out_of_the_normalizer_as_it_went_in(payload):
    normalizer = Normalizer(max_depth=15, max_attributes=10_000)
    assert (normalizer.payload(payload) or {}) == payload


def wire(request: dict[str, Any], response: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """The attributes of three payloads."""
    trees = ((REQUEST, request), (RESPONSE, response), (METADATA, metadata))
    return {prefix + path: value for prefix, tree in trees for path, value in flattened(tree)}


@unhurried
@given(payloads, payloads, payloads)
def test_each_payload_of_an_operation_is_in_its_place_in_the_record(request, response, metadata):
    record = to_record(full_captured()._replace(payload=wire(request, response, metadata)))
    assert (record.request or {}, record.response or {}, record.metadata) == (request, response, metadata)


@unhurried
@given(st.tuples(payloads, payloads, payloads), st.tuples(payloads, payloads, payloads))
def test_a_payload_is_filled_with_what_the_one_inside_it_has_and_it_does_not(outer, inner):
    one, other = (full_captured()._replace(payload=wire(*three)) for three in (outer, inner))
    record = to_record(filled(one, other))
    expected = tuple({**within, **own} for own, within in zip(outer, inner, strict=True))
    assert (record.request or {}, record.response or {}, record.metadata) == expected


operations = st.builds(
    full_captured()._replace,
    id=st.uuids().map(str),
    transport=st.sampled_from([None, "unknown", "http", "mcp"]),
    bank_id=st.none() | st.text(max_size=3),
    actor_id=st.none() | st.text(max_size=3),
    actor_type=st.sampled_from([None, "user", "system"]),
    outcome=st.sampled_from(["success", "failure", "unknown"]),
    error_type=st.none() | st.just("TimeoutError"),
    dropped=st.integers(0, 3),
    payload=st.dictionaries(st.sampled_from([f"{REQUEST}a", f"{REQUEST}a.b", f"{METADATA}c"]), st.integers()),
)


@unhurried
@given(operations, operations)
def test_an_operation_is_filled_where_it_is_empty_and_stays_itself(outer, inner):
    one = filled(outer, inner)
    for name in ("id", "action", "schema", "outcome", "start_ns", "end_ns", "span_id", "parent_span_id", "replaces"):
        assert getattr(one, name) == getattr(outer, name)
    for name in ("bank_id", "actor_id", "actor_type"):
        own = getattr(outer, name)
        assert getattr(one, name) == (getattr(inner, name) if own is None else own)
    assert one.transport == (inner.transport if outer.transport in (None, "unknown") else outer.transport)
    assert one.error_type in (outer.error_type, inner.error_type if outer.outcome == "failure" else None)
    assert one.dropped == outer.dropped + inner.dropped
    assert to_record(one).metadata.get("dropped_attributes", 0) == one.dropped


@unhurried
@given(operations, operations, operations)
def test_three_levels_become_the_same_one_in_whichever_order_but_for_whose_error_it_is(outermost, middle, innermost):
    one, other = filled(filled(outermost, middle), innermost), filled(outermost, filled(middle, innermost))
    assert one._replace(error_type=None) == other._replace(error_type=None)


#: What JSON holds exactly.
exact = st.booleans() | int64s | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
exactly = st.dictionaries(st.text(max_size=6).map(METADATA.__add__), exact | st.lists(exact, max_size=3), max_size=5)
said = st.none() | exact


@unhurried
@given(
    payload=exactly,
    texts=st.lists(st.text(max_size=8), min_size=2, max_size=2),
    dropped=st.integers(0, 128),
    said=st.lists(said, min_size=5, max_size=5),
    times=st.tuples(int64s, st.none() | int64s),
    kind=st.sampled_from([RECORD, PROVISIONAL]),
)
def test_an_operation_survives_the_way_through_the_spool(payload, texts, dropped, said, times, kind):
    (action, replaces), (transport, bank_id, actor_id, actor_type, error_type) = texts, said
    captured = full_captured()._replace(
        action=action, replaces=replaces or None, transport=transport, bank_id=bank_id, actor_id=actor_id,
        actor_type=actor_type, error_type=error_type, start_ns=times[0], end_ns=times[1], payload=payload,
        dropped=dropped,
    )  # fmt: skip
    [line] = frames(captured_frame(kind, captured))
    read = parse_captured(line.content)
    assert (line.kind, read) == (kind, captured)
    assert to_record(read) == to_record(captured)


any_time = int64s | st.integers(-(10**40), 10**40) | st.sampled_from([2**63, -(2**63) - 1, 10**30, -(10**30)])


@unhurried
@given(start_ns=any_time, end_ns=st.none() | any_time, kind=st.sampled_from([RECORD, PROVISIONAL]))
def test_times_that_json_holds_come_out_of_the_spool_as_they_are_and_others_as_the_last_there_are(
    start_ns, end_ns, kind
):
    captured = full_captured()._replace(start_ns=start_ns, end_ns=end_ns)
    [line] = frames(captured_frame(kind, captured))
    read = parse_captured(line.content)
    expected = [start_ns, end_ns]
    if any(time is not None and not -(2**63) <= time < 2**64 for time in expected):
        expected = [None if time is None else sorted((-(2**63), time, 2**63 - 1))[1] for time in expected]
    assert (line.kind, read) == (kind, captured._replace(start_ns=expected[0], end_ns=expected[1]))
    assert to_record(read).id == captured.id


unstorable = st.sampled_from(
    [float("nan"), float("inf"), 10**400, -(2**70), b"raw", "\ud800", "a\x00\n", object(), ("a",)]
)


@unhurried
@given(
    ids=st.lists(unstorable, min_size=4, max_size=4),
    payload=st.dictionaries(st.sampled_from(["a", "a.b", "\udfff", "\x00\n", ""]), unstorable, max_size=4),
    times=st.tuples(any_time, any_time),
)
def test_whatever_an_operation_holds_it_is_one_line_of_the_spool_that_is_read_again(ids, payload, times):
    captured = full_captured()._replace(
        action="re\x00call\ud800", transport=ids[0], bank_id=ids[1], actor_id=ids[2], error_type=ids[3],
        payload={REQUEST + key: value for key, value in payload.items()}, start_ns=times[0], end_ns=times[1],
    )  # fmt: skip
    line = captured_frame(RECORD, captured)
    [found] = frames(line)
    read = parse_captured(found.content)
    assert line.count(b"\n") == 1
    assert read is not None
    assert (read.id, len(read.payload)) == (captured.id, len(captured.payload))
    record = to_record(read)
    assert all(isinstance(text, str | None) for text in (record.transport, record.bank_id, record.actor_id))
