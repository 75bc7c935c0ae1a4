"""Which actions the allowlist lets through."""

from __future__ import annotations

import sys

import pytest

from astrocyte_otel_audit.allowlist import Allowlist

ACTIONS = ["retain", "recall", "Recall", "recall.deep", "", "*", "[", "two\nlines", "größe", "a" * 10_000]


@pytest.mark.parametrize("action", ACTIONS)
def test_an_empty_list_allows_nothing(action):
    assert not Allowlist([]).allows(action)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_star_allows_everything(action):
    assert Allowlist(["*"]).allows(action)


@pytest.mark.parametrize(
    ("patterns", "allowed", "refused"),
    [
        (["retain"], ["retain"], ["retain2", "pretain", "retain\n", "reta", "Retain", ""]),
        (["retain", "recall"], ["retain", "recall"], ["retainrecall", "retain|recall", "classify"]),
        (["recall.*"], ["recall.", "recall.deep", "recall.deep.er", "recall.two\nlines"], ["recall", "recallXdeep"]),
        (["*.deep"], ["recall.deep", ".deep"], ["recall.deeper", "deep"]),
        (["re????"], ["retain", "recall", "re.all"], ["reca", "recalls"]),
        (["v[12]"], ["v1", "v2"], ["v3", "v12", "v[12]"]),
        (["v[!12]"], ["v3"], ["v1", "v"]),
        (["a*", "b?"], ["a", "abc", "b1"], ["b", "b12"]),
        (["[["], ["[["], ["["]),
        (["re(call|tain)"], ["re(call|tain)"], ["recall", "retain"]),
        (["re.all"], ["re.all"], ["recall"]),
        ([""], [""], ["a"]),
    ],
    ids=lambda value: ",".join(value)[:20] if isinstance(value, list) else None,
)
def test_a_pattern_is_an_action_or_a_glob_and_matches_the_whole_of_it(patterns, allowed, refused):
    allowlist = Allowlist(patterns)
    assert [action for action in allowed if not allowlist.allows(action)] == []
    assert [action for action in refused if allowlist.allows(action)] == []


def test_the_answer_is_the_same_the_second_time():
    allowlist = Allowlist(["recall"])
    assert [allowlist.allows(action) for action in ["recall", "retain"] * 2] == [True, False] * 2


def test_more_actions_than_it_remembers_get_the_right_answer():
    allowlist = Allowlist(["*7"])
    assert [n for n in range(10_000) if allowlist.allows(f"action-{n}") != (n % 10 == 7)] == []


def test_an_action_of_any_length_is_decided_on_and_not_kept():
    action = "x" * 1_000_000
    references = sys.getrefcount(action)
    assert Allowlist(["x*"]).allows(action)
    allowlist = Allowlist(["x*"])
    assert allowlist.allows(action)
    assert sys.getrefcount(action) == references


def test_the_list_is_taken_as_it_was_given():
    given = ["recall"]
    allowlist = Allowlist(iter(given))
    given.append("retain")
    assert allowlist.actions == ("recall",)
    assert not allowlist.allows("retain")
