"""The wire's codec: how keys are escaped, and how flat attributes become a nested payload again."""

from __future__ import annotations

from typing import Any

import pytest

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit.attributes import escape, unflatten


def nested(*pairs: tuple[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in pairs:
        unflatten(path, value, tree)
    return tree


@pytest.mark.parametrize(
    ("segment", "written"),
    [
        ("query", "query"),
        ("", ""),
        ("a.b", "a%2Eb"),
        ("100%", "100%25"),
        ("%2E", "%252E"),
        (".%.", "%2E%25%2E"),
        ("%empty", "%25empty"),
        ("größe", "größe"),
    ],
)
def test_a_key_is_escaped_where_it_would_be_taken_for_a_path(segment, written):
    assert escape(segment) == written
    assert nested((written, 1)) == {segment: 1}
    assert nested((f"outer.{written}.inner", 1)) == {"outer": {segment: {"inner": 1}}}


def test_dots_become_nesting():
    assert nested(("query.length", 12), ("query.hash", "ab"), ("top_k", 3)) == {
        "query": {"length": 12, "hash": "ab"},
        "top_k": 3,
    }


@pytest.mark.parametrize(
    ("path", "tree"),
    [
        ("", {"": 1}),
        (".", {"": {"": 1}}),
        ("a.", {"a": {"": 1}}),
        (".a", {"": {"a": 1}}),
        ("a..b", {"a": {"": {"b": 1}}}),
    ],
)
def test_an_empty_segment_is_an_empty_key(path, tree):
    assert nested((path, 1)) == tree


@pytest.mark.parametrize(
    ("pairs", "tree"),
    [
        ([("a.%empty", True)], {"a": {}}),
        ([("a.b.%empty", True)], {"a": {"b": {}}}),
        ([("a.%empty", True), ("b", 1)], {"a": {}, "b": 1}),
        ([(".%empty", True)], {"": {}}),
        ([("%empty", True)], {}),
    ],
)
def test_an_empty_object_has_a_marker_of_its_own(pairs, tree):
    assert nested(*pairs) == tree


def test_a_percent_sign_of_another_emitter_is_left_alone():
    assert nested(("100%", 1), ("a%20b", 2)) == {"100%": 1, "a%20b": 2}


def test_a_tuple_becomes_a_list():
    assert nested(("ids", ("a", "b")), ("outer.scores", (0.5,)), ("none", ())) == {
        "ids": ["a", "b"],
        "outer": {"scores": [0.5]},
        "none": [],
    }


@pytest.mark.parametrize("value", [True, 0, -1.5, "", "text", None])
def test_a_scalar_is_put_back_as_it_is(value):
    assert nested(("key", value))["key"] is value


@pytest.mark.parametrize(
    ("one", "other", "tree"),
    [
        (("a", 1), ("a.b", 2), {"a": {"": 1, "b": 2}}),
        (("a", 0), ("a.b.c", 2), {"a": {"": 0, "b": {"c": 2}}}),
        (("a.b", None), ("a.b.c", 2), {"a": {"b": {"": None, "c": 2}}}),
        (("a", (1, 2)), ("a.b", 3), {"a": {"": [1, 2], "b": 3}}),
        (("a", 1), ("a.%empty", True), {"a": 1}),
        (("a.b", 1), ("a.%empty", True), {"a": {"b": 1}}),
    ],
)
def test_a_value_and_an_object_under_one_key_are_both_kept_in_either_order(one, other, tree):
    assert nested(one, other) == tree
    assert nested(other, one) == tree


def test_three_levels_that_contradict_each_other_are_all_kept():
    assert nested(("a.b.c", 3), ("a", 1), ("a.b", 2)) == {"a": {"": 1, "b": {"": 2, "c": 3}}}


@pytest.mark.parametrize("segments", [16, 17, 1000, 100_000])
def test_a_very_deep_path_keeps_its_tail_as_one_key(segments):
    tree = nested((".".join(["a"] * segments), 1))

    depth = 1
    while isinstance(tree := tree.get("a", tree.get(".".join(["a"] * (segments - 15)))), dict):
        depth += 1
    assert tree == 1
    assert depth == 16


def test_payload_prefixes_end_in_a_dot_and_none_begins_another():
    prefixes = [attributes.REQUEST, attributes.RESPONSE, attributes.METADATA]
    assert all(prefix.endswith(".") for prefix in prefixes)
    assert not [(a, b) for a in prefixes for b in prefixes if a != b and a.startswith(b)]
    assert not [prefix for prefix in prefixes if attributes.REQUIRED.startswith(prefix)]
