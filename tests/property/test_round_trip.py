"""Whatever a payload is, its flat attributes give back exactly that."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from astrocyte_otel_audit.attributes import EMPTY, escape, unflatten
from astrocyte_otel_audit.normalize import Normalizer

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


numbers_by_token = st.dictionaries(
    st.text("abcxyz_./-:019", min_size=1, max_size=10).map("k{}".format), st.integers(-(2**63), 2**63 - 1), max_size=8
)


@unhurried
@given(st.recursive(numbers_by_token, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3)))
def test_a_payload_of_numbers_comes_out_of_the_normalizer_as_it_went_in(payload):
    normalizer = Normalizer(max_depth=15, max_attributes=10_000)
    assert (normalizer.payload(payload) or {}) == payload
