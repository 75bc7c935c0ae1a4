"""Whatever a payload holds becomes JSON that a spool keeps and jsonb takes."""

import enum
import json
import uuid
from dataclasses import dataclass
from datetime import UTC, date, datetime
from types import MappingProxyType

import pytest

from astrocyte_otel_audit import storable
from astrocyte_otel_audit.storable import encode_payload
from tests.payloads import Hostile, cycle, nested

REPLACEMENT = "\ufffd"


class Colour(enum.Enum):
    RED = "red"
    BROKEN = "\ud800"
    ENDED = "a\x00b"


@dataclass
class Point:
    x: int = 1


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"text": "Zürich 東京 🧠", "empty": "", "quote": '"\\/\b\f\n\r\t'},
        {"zero": 0, "small": -(2**63), "large": 2**64 - 1, "half": 0.5, "tiny": 5e-324, "huge": 1.7976931348623157e308},
        {"yes": True, "no": False, "nothing": None},
        {"list": [1, "a", None, [2, {"deep": []}]], "map": {"a": {"b": {}}}},
        {"the escape of a NUL, as text": "\\u0000 and \\\\u0000"},
    ],
    ids=lambda payload: ", ".join(payload) or "nothing",
)
def test_what_json_can_say_comes_back_exactly(payload):
    assert json.loads(encode_payload(payload)) == payload


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        pytest.param(float("nan"), None, id="NaN"),
        pytest.param(float("inf"), None, id="infinity"),
        pytest.param(float("-inf"), None, id="negative infinity"),
        pytest.param("a\x00b", f"a{REPLACEMENT}b", id="NUL"),
        pytest.param("a\ud800b", f"a{REPLACEMENT}b", id="high surrogate alone"),
        pytest.param("a\udfffb", f"a{REPLACEMENT}b", id="low surrogate alone"),
        pytest.param("\ud83e\udde0", "🧠", id="a pair of surrogates"),
        pytest.param(2**64, float(2**64), id="more than 64 bits"),
        pytest.param(-(10**100), -1e100, id="a hundred digits"),
        pytest.param(10**5000, "int", id="five thousand digits"),
        pytest.param(b"raw", {"length": 3}, id="bytes"),
        pytest.param(bytearray(2), {"length": 2}, id="bytearray"),
        pytest.param(memoryview(b"four"), {"length": 4}, id="memoryview"),
        pytest.param((1, (2,)), [1, [2]], id="tuple"),
        pytest.param({1}, "set", id="set"),
        pytest.param(MappingProxyType({"a": 1}), "mappingproxy", id="mapping that is no dict"),
        pytest.param(Hostile(), "Hostile", id="object whose str raises"),
        pytest.param(Point(), "Point", id="dataclass"),
        pytest.param(Colour.RED, "red", id="enum"),
        pytest.param(Colour.BROKEN, REPLACEMENT, id="enum of a lone surrogate"),
        pytest.param(Colour.ENDED, f"a{REPLACEMENT}b", id="enum of a NUL"),
        pytest.param(datetime(2026, 1, 2, 3, 4, 5, 6, UTC), "2026-01-02T03:04:05.000006+00:00", id="datetime"),
        pytest.param(date(1, 1, 1), "0001-01-01", id="date"),
        pytest.param(uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001", id="UUID"),
    ],
)
def test_a_value_that_json_has_no_word_for_is_described(value, stored):
    assert json.loads(encode_payload({"value": value, "next": [value]})) == {"value": stored, "next": [stored]}


@pytest.mark.parametrize(
    ("key", "stored"),
    [
        pytest.param(1, "1", id="number"),
        pytest.param(None, "null", id="None"),
        pytest.param("a\x00", f"a{REPLACEMENT}", id="NUL"),
        pytest.param("a\udc00", f"a{REPLACEMENT}", id="lone surrogate"),
        pytest.param((1, 2), "(1, 2)", id="tuple"),
        pytest.param(10**5000, "int", id="five thousand digits"),
        pytest.param(Hostile(), "Hostile", id="object whose str raises"),
    ],
)
def test_a_key_that_is_no_text_becomes_one(key, stored):
    assert json.loads(encode_payload({key: "value"})) == {stored: "value"}


@pytest.mark.parametrize("depth", [100, 1_000, 100_000])
def test_deep_nesting_is_cut_at_some_depth(depth):
    assert encode_payload(nested(depth)).startswith(b'{"in":{"in":{')


@pytest.mark.parametrize("width", [1, 2, 10])
def test_a_cycle_ends_where_it_closes(width, monkeypatch):
    monkeypatch.setattr(storable, "_MAX_DEPTH", 4)  # so that without it the test fails instead of never ending

    assert json.loads(encode_payload(cycle(width))) == {"self": ["list"] * width}


def test_a_broken_value_costs_nothing_of_its_neighbours():
    payload = {"broken": "\ud800", "kept": "text", "deep": [{"broken": 10**400, "kept": 1.5}]}

    stored = json.loads(encode_payload(payload))

    assert stored["kept"] == "text"
    assert stored["deep"][0]["kept"] == 1.5


def test_a_giant_becomes_its_size():
    payload = {"text": "x" * 300_000}

    assert json.loads(encode_payload(payload)) == {"[truncated]": True, "bytes": len('{"text":""}') + 300_000}


def test_a_payload_below_the_limit_is_kept_whole():
    payload = {"text": "x" * 200_000}

    assert json.loads(encode_payload(payload)) == payload
