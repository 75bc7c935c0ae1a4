"""The normalizer, rule by rule: what of a payload may be written down, and what becomes of the rest."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import numbers
import string
import tracemalloc
import types
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from uuid import UUID

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrocyte_otel_audit import ConfigurationError, Normalizer

SENTENCE = "Calvin's blood pressure is rising"
UUID_TEXT = "550e8400-e29b-41d4-a716-446655440000"
DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
CREDENTIAL = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
HASH_KEY = b"sixteen bytes or more"

DEFAULT = Normalizer()
HASHING = Normalizer(hash_key=HASH_KEY)
STRICT = Normalizer(strict=True)


def normal(payload: object, normalizer: Normalizer = DEFAULT, action: str = "recall") -> Any:
    """The payload as it will stand in the row."""
    return normalizer.payload(payload, action)


def value_of(value: object, key: str = "field", normalizer: Normalizer = DEFAULT) -> Any:
    return (normal({key: value}, normalizer) or {}).get(key)


def kind_of(value: object) -> str:
    return type(value).__name__


class Color(enum.Enum):
    RED = "red"
    LONG = "the colour of a long summer evening"
    NUMBER = 7
    PAIR = (1, 2)


class Level(enum.IntEnum):
    HIGH = 3


class Mode(enum.StrEnum):
    FAST = "fast"
    WORDY = "as fast as it can be"


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Text(str):
    """A string that says something else than it is."""

    __slots__ = ()

    def __str__(self) -> str:
        return "innocent"

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        return iter("innocent")


class Whole(numbers.Integral):
    """An integer of another library, as numpy's are; all but the value is left out."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __int__(self) -> int:
        return self._value


Whole.__abstractmethods__ = frozenset()


class Opaque:
    def __str__(self) -> str:
        raise AssertionError("asked for its text")

    __repr__ = __str__


@dataclasses.dataclass
class Hit:
    id: str
    content: str
    score: float
    tags: tuple[str, ...] = ()


class Memory(pydantic.BaseModel):
    memory_id: str
    text: str
    score: float | None = None


class Span(NamedTuple):
    start: int
    text: str


class AttrsLike:
    """What `attrs` makes of a class."""

    __slots__ = ("limit", "query")
    __attrs_attrs__ = (types.SimpleNamespace(name="limit"), types.SimpleNamespace(name="query"))

    def __init__(self, limit: int, query: str) -> None:
        self.limit = limit
        self.query = query


class TestNumbersTimesAndTokensStay:
    @pytest.mark.parametrize("value", [True, False, 0, -1, 2**63 - 1, -(2**63), 0.5, -0.0, 1e308])
    def test_a_number_or_boolean(self, value):
        assert value_of(value) == value
        assert type(value_of(value)) is type(value)

    @pytest.mark.parametrize(
        "token",
        ["a", "mcp", "en-US", "semantic.v2", "user:42", "docs/2024/q3", "x" * 64, UUID_TEXT, DIGEST, "2024-01-01"],
    )
    def test_a_short_token(self, token):
        assert value_of(token) == token

    @pytest.mark.parametrize(
        ("value", "stored"),
        [
            (Whole(5), 5),
            (Level.HIGH, 3),
            (Fraction(1, 4), 0.25),
            (Decimal("12.50"), "12.50"),
            (Decimal("NaN"), "NaN"),
            (float("nan"), "nan"),
            (float("inf"), "inf"),
            (float("-inf"), "-inf"),
            (2**63, str(2**63)),
            (-(2**63) - 1, str(-(2**63) - 1)),
            (2**128, str(2**128)),
        ],
        ids=repr,
    )
    def test_a_number_that_json_or_a_span_does_not_know_becomes_one_or_its_digits(self, value, stored):
        assert value_of(value) == stored
        assert type(value_of(value)) is type(stored)

    @pytest.mark.parametrize("value", [10**5000, -(10**5000), Decimal("1" * 100_000), Whole(10**5000)], ids=kind_of)
    def test_a_giant_number_becomes_its_size(self, value):
        assert len(value_of(value)) <= 64

    @pytest.mark.parametrize("kind", [int, float])
    def test_a_subclass_of_a_number_is_the_number(self, kind):
        class Odd(kind):
            def __repr__(self) -> str:
                return SENTENCE

            __str__ = __repr__
            __index__ = __int__ = __float__ = lambda self: 99

        assert value_of(Odd(5)) == 5
        assert type(value_of(Odd(5))) is kind

    @pytest.mark.parametrize(
        ("value", "stored"),
        [
            (datetime(2024, 2, 29, 12, 30, tzinfo=UTC), "2024-02-29T12:30:00+00:00"),
            (datetime(2024, 2, 29, 12, 30, 0, 5), "2024-02-29T12:30:00.000005"),
            (datetime.max.replace(tzinfo=timezone(timedelta(hours=14))), "9999-12-31T23:59:59.999999+14:00"),
            (datetime.min, "0001-01-01T00:00:00"),
            (date(2024, 2, 29), "2024-02-29"),
            (time(12, 30, tzinfo=UTC), "12:30:00+00:00"),
            (timedelta(minutes=1.5), 90.0),
            (UUID(UUID_TEXT), UUID_TEXT),
        ],
        ids=str,
    )
    def test_times_and_uuids_are_written_as_iso_8601_says(self, value, stored):
        assert value_of(value) == stored

    @pytest.mark.parametrize(
        ("member", "stored"),
        [
            (Color.RED, "red"),
            (Color.LONG, "LONG"),
            (Color.NUMBER, 7),
            (Color.PAIR, "PAIR"),
            (Level.HIGH, 3),
            (Mode.FAST, "fast"),
            (Mode.WORDY, "WORDY"),
            (Rights.READ | Rights.WRITE, 3),
        ],
    )
    def test_an_enum_is_its_value_where_that_is_a_number_or_a_token_else_its_name(self, member, stored):
        assert value_of(member) == stored

    def test_a_path_is_judged_like_a_string(self):
        assert value_of(PurePosixPath("/data/memories.db")) == "/data/memories.db"
        assert value_of(PureWindowsPath("data\\memories.db")) == "data/memories.db"
        assert value_of(PurePosixPath(f"/home/{SENTENCE}")) == {"length": len(SENTENCE) + 6}

    def test_none_leaves_no_trace(self):
        assert normal({"bank": None, "limit": 1}) == {"limit": 1}
        assert normal({"bank": None}) is None


class TestTextBecomesItsLength:
    @pytest.mark.parametrize(
        "text",
        [SENTENCE, "two words", "calvin@example.com", "+49 170 1234567", "", "größe", "a\x00b", "\ud800", "x" * 65,
         "token\n", "a,b", "50%", "https://example.com/?q=calvin", "postgresql://me:pw@host/db", "<b>", "日本"],
        ids=ascii,
    )  # fmt: skip
    def test_what_is_no_token(self, text):
        assert value_of(text) == {"length": len(text)}

    @pytest.mark.parametrize(
        "key",
        ["query", "content", "text", "prompt", "messages", "answer", "body", "name", "email", "user_name", "fileName",
         "QUERY", "raw-query", "memory.content", "q", "query_2", "message1", "phone", "title", "firstName"],
    )  # fmt: skip
    def test_even_a_token_under_a_key_that_holds_text(self, key):
        assert value_of("Calvin", key) == {"length": 6}

    @pytest.mark.parametrize(
        "key", ["query_id", "text_type", "named", "message_count", "context", "queryable", "nameid"]
    )
    def test_a_key_that_only_mentions_text_holds_tokens(self, key):
        assert value_of("semantic", key) == "semantic"

    def test_numbers_under_a_key_that_holds_text_stay(self):
        assert value_of(42, "query") == 42

    @pytest.mark.parametrize("credential", [CREDENTIAL, "ghp_16C7e42F292c6912E7", "sk-abc", "eyJhbGciOi.eyJzdWIi.sig"])
    def test_a_token_that_looks_like_a_credential(self, credential):
        assert value_of(credential) == {"length": len(credential)}

    def test_a_random_token_stays_under_the_key_of_an_id_unless_its_prefix_is_known(self):
        assert value_of(CREDENTIAL, "memory_id") == CREDENTIAL
        assert value_of("sk-abc", "memory_id") == {"length": 6}

    def test_a_string_of_a_class_that_pretends_is_taken_for_what_it_is(self):
        assert value_of(Text(SENTENCE)) == {"length": len(SENTENCE)}
        assert value_of(Text("token")) == "token"
        assert type(value_of(Text("token"))) is str

    def test_a_megabyte_is_its_length(self):
        assert value_of("x" * 2**20) == {"length": 2**20}

    @pytest.mark.parametrize("value", [b"secret", bytearray(b"secret"), memoryview(b"secret")], ids=kind_of)
    def test_bytes_become_their_length(self, value):
        assert value_of(value) == {"length": 6}

    @pytest.mark.parametrize("nested", [{"kind": "Calvin"}, {"deep": {"kind": "Calvin"}}, Span(1, "Calvin")])
    def test_what_lies_below_a_key_that_holds_text_is_text(self, nested):
        assert "Calvin" not in json.dumps(normal({"message": nested}))

    def test_ids_below_a_key_that_holds_text_stay(self):
        assert value_of({"id": "m-1", "role": "user"}, "message") == {"id": "m-1", "role": {"length": 4}}


class TestSecretsAreRedacted:
    @pytest.mark.parametrize(
        "key",
        [
            "password", "PASSWORD", "db_password", "passwordHash", "PGPASSWORD", "passwd", "db_pass", "token",
            "token_2", "access_token", "accessToken", "authToken", "authtoken", "refresh_tokens", "api_key", "apiKey",
            "apikey", "X-API-Key", "APIKey", "Authorization", "Proxy-Authorization", "cookie", "Set-Cookie", "secret",
            "jwt", "client_secret", "clientsecret", "AWS_SECRET_ACCESS_KEY", "aws_access_key_id", "private_key",
            "privatekey", "credentials", "auth", "x-auth", "bearer", "session_key", "dsn", "passphrase", "otp", "ssn",
            "openai.api_key",
        ],
    )  # fmt: skip
    def test_under_a_key_that_names_one(self, key):
        assert value_of("hunter2", key) == "[redacted]"

    @pytest.mark.parametrize("value", [1234, "", {"user": "me"}, ["hunter2"], b"hunter2", Opaque(), True], ids=kind_of)
    def test_whatever_kind_of_value_they_are(self, value):
        assert value_of(value, "password") == "[redacted]"

    @pytest.mark.parametrize(
        "key", ["token_count", "tokens", "max_tokens", "author", "keyboard", "key", "passive", "pinned"]
    )
    def test_a_key_that_only_sounds_like_one_is_not(self, key):
        assert value_of(5, key) == 5

    @pytest.mark.parametrize("outer", ["config", "query", "headers", "user_id", "x", "message"])
    def test_at_any_nesting(self, outer):
        payload = {outer: {"inner": {"password": "hunter2", "limit": 1}}}
        assert normal(payload) == {outer: {"inner": {"password": "[redacted]", "limit": 1}}}

    def test_in_fields_of_objects_too(self):
        class Login(pydantic.BaseModel):
            user_id: str
            password: str

        @dataclasses.dataclass
        class Client:
            login: Login
            api_key: str

        stored = value_of(Client(Login(user_id="u-1", password="hunter2"), "hunter3"), "client")
        assert stored == {"login": {"user_id": "u-1", "password": "[redacted]"}, "api_key": "[redacted]"}

    def test_an_absent_secret_is_absent(self):
        assert normal({"password": None}) is None


class TestCollections:
    @pytest.mark.parametrize(
        ("items", "stored"),
        [
            (["a", "b"], ["a", "b"]),
            (("a", "b"), ["a", "b"]),
            ({"b", "a"}, ["a", "b"]),
            (frozenset([3, 1]), [1, 3]),
            (deque([True]), [True]),
            ([1, 2.5], [1.0, 2.5]),
            ([Level.HIGH, 5], [3, 5]),
            ([UUID(UUID_TEXT)], [UUID_TEXT]),
            ([float("nan")], ["nan"]),
            ([Decimal("1.5"), "a"], ["1.5", "a"]),
            (list(range(16)), list(range(16))),
        ],
        ids=repr,
    )
    def test_a_small_one_of_like_scalars_stays(self, items, stored):
        assert value_of(items) == stored

    def test_ints_beside_floats_become_floats_since_a_span_holds_one_type(self):
        assert list(map(type, value_of([1, 2.5]))) == [float, float]

    @pytest.mark.parametrize(
        "items",
        [
            [], (), set(), [SENTENCE], ["a", SENTENCE], ["a", 1], [True, 1], [1, None], [b"x"], [[1], [2]],
            [CREDENTIAL], ["a", "sk-abc"], list(range(17)), ["a"] * 10_000, [Opaque()], [float("nan"), 1.0],
        ],
        ids=lambda items: repr(items)[:30] if Opaque not in map(type, items) else "opaque",
    )  # fmt: skip
    def test_any_other_becomes_its_count(self, items):
        assert value_of(items) == {"count": len(items)}

    def test_strings_under_a_key_that_holds_text_are_counted(self):
        assert value_of(["Calvin", "Hobbes"], "messages") == {"count": 2}

    @pytest.mark.parametrize(
        ("items", "ids"),
        [
            ([{"id": "m-1", "text": SENTENCE}, {"id": "m-2"}], ["m-1", "m-2"]),
            ([{"memory_id": "m-1"}], ["m-1"]),
            ([{"id": None, "document_id": "d-1"}], ["d-1"]),
            ([{"id": "m-1", "uuid": "u-1"}], ["m-1"]),
            ([{"id": 1}, {"id": 2}], [1, 2]),
            ([{"id": UUID(UUID_TEXT)}], [UUID_TEXT]),
            ([{"id": "m-1"}, {"other": 1}, None, "x"], ["m-1"]),
            ([{"chunk_id": CREDENTIAL}], [CREDENTIAL]),
            ([Hit("h-1", SENTENCE, 0.5)], ["h-1"]),
            ([Memory(memory_id="m-1", text=SENTENCE)], ["m-1"]),
            ([UserDict({"id": "m-1"})], ["m-1"]),
        ],
    )
    def test_ids_of_items_are_kept_beside_the_count(self, items, ids):
        assert value_of(items) == {"count": len(items), "ids": ids}
        assert value_of(items, "memories") == {"count": len(items), "ids": ids}

    @pytest.mark.parametrize(
        "items",
        [
            [{"id": SENTENCE}],
            [{"id": "m-1"}, {"id": "calvin@example.com"}],
            [{"id": "sk-abc"}],
            [{"id": "m-1"}, {"id": 2}],
            [{"id": {"password": "hunter2"}}],
            [{"text": "m-1"}],
        ],
    )
    def test_ids_that_are_texts_secrets_or_unlike_are_not(self, items):
        assert value_of(items) == {"count": len(items)}

    def test_of_a_big_one_the_first_ids_are_kept(self):
        assert value_of([{"id": n} for n in range(1000)]) == {"count": 1000, "ids": list(range(16))}

    def test_the_size_up_to_which_they_stay_is_a_setting(self):
        normalizer = Normalizer(max_items=2)
        assert value_of([1, 2], normalizer=normalizer) == [1, 2]
        assert value_of([1, 2, 3], normalizer=normalizer) == {"count": 3}

    def test_a_lazy_one_is_not_touched(self):
        def produce():
            raise AssertionError("was asked for an item")
            yield

        assert value_of(produce()) == "generator"
        assert value_of(range(10**9)) == "range"
        assert value_of({}.keys()) == "dict_keys"

    def test_a_list_is_read_by_its_own_rules(self):
        class Odd(list):
            def __iter__(self):
                return iter([SENTENCE])

        assert value_of(Odd([1, 2])) == [1, 2]


class TestObjects:
    @pytest.mark.parametrize(
        "mapping",
        [
            {"limit": 1, "query": SENTENCE},
            OrderedDict(limit=1, query=SENTENCE),
            defaultdict(int, limit=1, query=SENTENCE),
            UserDict(limit=1, query=SENTENCE),
            ChainMap({"limit": 1}, {"query": SENTENCE}),
            types.MappingProxyType({"limit": 1, "query": SENTENCE}),
            AttrsLike(1, SENTENCE),
        ],
        ids=kind_of,
    )
    def test_a_mapping_or_an_object_with_fields_is_walked(self, mapping):
        assert value_of(mapping) == {"limit": 1, "query": {"length": len(SENTENCE)}}
        assert normal(mapping) == {"limit": 1, "query": {"length": len(SENTENCE)}}

    def test_a_dataclass_is_walked(self):
        assert value_of(Hit("h-1", SENTENCE, 0.5, ("a",))) == {
            "id": "h-1",
            "content": {"length": len(SENTENCE)},
            "score": 0.5,
            "tags": ["a"],
        }

    def test_a_dataclass_with_slots_is_walked(self):
        point = dataclasses.make_dataclass("Point", ["x", "y"], slots=True, frozen=True)
        assert value_of(point(1, None)) == {"x": 1}

    def test_a_pydantic_model_is_walked(self):
        assert value_of(Memory(memory_id="m-1", text="Calvin")) == {"memory_id": "m-1", "text": {"length": 6}}
        assert normal(Memory(memory_id="m-1", text="Calvin", score=1)) == {
            "memory_id": "m-1", "text": {"length": 6}, "score": 1.0,
        }  # fmt: skip

    def test_a_named_tuple_is_walked(self):
        assert value_of(Span(3, SENTENCE)) == {"start": 3, "text": {"length": len(SENTENCE)}}
        assert normal(Span(3, SENTENCE)) == {"start": 3, "text": {"length": len(SENTENCE)}}

    @pytest.mark.parametrize(
        ("value", "name"),
        [
            (Opaque(), "Opaque"),
            (Opaque, "type"),
            (object(), "object"),
            (1 + 2j, "complex"),
            (ValueError(SENTENCE), "ValueError"),
            (len, "builtin_function_or_method"),
            (pydantic.SecretStr("hunter2"), "SecretStr"),
            (json, "module"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_any_other_object_is_the_name_of_its_type(self, value, name):
        assert value_of(value) == name

    def test_a_type_that_a_function_made_is_known_by_its_own_name(self):
        class Local:
            class Inner:
                pass

        assert [value_of(Local()), value_of(Local.Inner())] == ["Local", "Local.Inner"]

    def test_a_type_whose_name_is_a_text_is_an_object(self):
        assert value_of(type(SENTENCE, (), {})()) == "object"

    def test_an_empty_object_stays_empty(self):
        assert normal({"filters": {}, "inner": {"bank": None}}) == {"filters": {}, "inner": {}}

    def test_depth_is_bounded(self):
        payload: dict[str, Any] = {"level": "bottom"}
        for _ in range(50):
            payload = {"level": payload}
        assert normal(payload) == {"level": {"level": {"level": {"level": {"level": "dict"}}}}}
        assert normal({"a": {"b": {"c": 1}}, "d": 2}, Normalizer(max_depth=1)) == {"a": {"b": "dict"}, "d": 2}

    def test_a_cycle_ends_at_that_depth(self):
        cyclic: dict[str, Any] = {"limit": 1}
        cyclic["self"] = cyclic
        cyclic["all"] = [cyclic]
        stored = json.dumps(normal(cyclic))
        assert stored.count('"limit": 1') == 5
        assert stored.count('"all": {"count": 1}') == 4
        assert stored.count('"self": "dict"') == 1


class TestTheTopOfAPayload:
    def test_nothing_gives_nothing(self):
        assert DEFAULT.attributes(None) == {}
        assert DEFAULT.payload(None) is None
        assert DEFAULT.payload({}) is None

    @pytest.mark.parametrize("text", [SENTENCE, "token", "", Text("token"), PurePosixPath("token")], ids=ascii)
    def test_a_string_is_text_as_there_is_no_key_to_judge_it_by(self, text):
        assert list(normal(text)) == ["length"]

    @pytest.mark.parametrize(
        ("value", "stored"),
        [(5, 5), (True, True), (Color.RED, "red"), (date(2024, 1, 1), "2024-01-01"), (Opaque(), "Opaque"),
         (b"abc", {"length": 3})],
        ids=kind_of,
    )  # fmt: skip
    def test_any_other_value_is_called_value(self, value, stored):
        assert normal(value) == {"value": stored}

    def test_a_collection_gives_its_count_and_what_else_it_may(self):
        assert normal([]) == {"count": 0}
        assert normal([{"id": "m-1"}, {"id": "m-2"}]) == {"count": 2, "ids": ["m-1", "m-2"]}
        assert normal([0.5, 0.25]) == {"count": 2, "values": [0.5, 0.25]}
        assert normal([SENTENCE, "a"]) == {"count": 2}

    def test_every_key_begins_with_the_prefix(self):
        prefix = "astrocyte.audit.request."
        for payload in ({"a": 1, "b": {"c": {}}}, [1, "x"], SENTENCE, 5, Hit("h", "c", 1.0), Opaque()):
            attributes = DEFAULT.attributes(payload, prefix)
            assert attributes
            assert not [key for key in attributes if not key.startswith(prefix)]

    def test_the_payload_is_not_changed_and_not_kept(self):
        payload = {"tags": ["a"], "inner": {"limit": 1}}
        attributes = DEFAULT.attributes(payload)
        payload["tags"].append("b")
        payload["inner"]["limit"] = 2
        assert attributes == {"tags": ["a"], "inner.limit": 1}


class TestKeysOfMappings:
    @pytest.mark.parametrize(
        "key", [SENTENCE, "calvin@example.com", CREDENTIAL, "sk-abc", "", "größe", "a\x00", "\ud800", "x" * 65, "a b"],
        ids=ascii,
    )  # fmt: skip
    def test_a_key_that_is_a_text_or_a_secret_is_replaced_by_its_position(self, key):
        assert normal({"limit": 1, key: 5}) == {"limit": 1, "#1": 5}
        assert normal({"outer": {key: {"inner": 5}}}) == {"outer": {"#0": {"inner": 5}}}

    def test_what_lies_under_a_key_that_is_a_text_is_text(self):
        assert normal({"who was it?": "Calvin"}) == {"#0": {"length": 6}}

    def test_what_lies_under_a_text_that_names_a_secret_is_redacted(self):
        assert normal({"the password is": "hunter2"}) == {"#0": "[redacted]"}

    @pytest.mark.parametrize(
        ("key", "written"),
        [(5, "5"), (True, "True"), (2**70, str(2**70)), (Color.RED, "red"), (Level.HIGH, "3"),
         (UUID(UUID_TEXT), UUID_TEXT), (Text("limit"), "limit"), (date(2024, 1, 1), "2024-01-01"), ("a.b", "a.b")],
        ids=ascii,
    )  # fmt: skip
    def test_a_key_that_is_a_number_or_a_token_is_written(self, key, written):
        assert normal({key: 1}) == {written: 1}

    @pytest.mark.parametrize("key", [(1, 2), None, 0.5, b"key", frozenset(), Opaque(), Text(SENTENCE)], ids=kind_of)
    def test_any_other_key_is_its_position(self, key):
        assert normal({key: 1}) == {"#0": 1}

    def test_a_string_of_a_class_that_pretends_still_names_a_secret(self):
        assert normal({Text("password"): "hunter2"}) == {"password": "[redacted]"}

    def test_dots_in_keys_are_no_nesting(self):
        assert normal({"a.b": 1, "a": {"b": 2}}) == {"a.b": 1, "a": {"b": 2}}


class TestHashing:
    def test_text_gets_a_hash_beside_its_length(self):
        stored = value_of(SENTENCE, "query", HASHING)
        assert stored["length"] == len(SENTENCE)
        assert len(stored["hash"]) == 32
        assert set(stored["hash"]) <= set(string.hexdigits.lower())

    def test_equal_texts_have_equal_hashes_and_others_have_others(self):
        hashes = [value_of(text, "query", HASHING)["hash"] for text in (SENTENCE, SENTENCE, SENTENCE + "!")]
        assert hashes[0] == hashes[1] != hashes[2]

    def test_another_key_gives_another_hash(self):
        other = Normalizer(hash_key=b"another sixteen bytes or more")
        assert value_of(SENTENCE, normalizer=HASHING) != value_of(SENTENCE, normalizer=other)

    def test_the_key_may_be_text(self):
        assert value_of(SENTENCE, normalizer=Normalizer(hash_key=HASH_KEY.decode())) == value_of(
            SENTENCE, normalizer=HASHING
        )

    def test_a_lone_surrogate_can_be_hashed(self):
        assert len(value_of("\ud800 \x00", normalizer=HASHING)["hash"]) == 32

    def test_a_secret_gets_none(self):
        assert value_of("hunter2", "password", HASHING) == "[redacted]"

    def test_a_token_stays_and_gets_none(self):
        assert value_of("mcp", normalizer=HASHING) == "mcp"

    @pytest.mark.parametrize(
        "value", ["u-1", SENTENCE, 5, 2**70, 0.5, UUID(UUID_TEXT), Decimal(1), Color.RED], ids=ascii
    )
    def test_a_hashed_key_stores_nothing_else(self, value):
        normalizer = Normalizer(hash=["user"], hash_key=HASH_KEY)
        stored = value_of(value, "user", normalizer)
        assert list(stored) == ["hash"]
        assert len(stored["hash"]) == 32

    def test_a_number_and_its_digits_have_the_same_hash(self):
        normalizer = Normalizer(hash=["user"], hash_key=HASH_KEY)
        assert value_of(42, "user", normalizer) == value_of("42", "user", normalizer)

    def test_a_hashed_collection_is_a_count_and_hashes(self):
        normalizer = Normalizer(hash=["users", "user"], hash_key=HASH_KEY)
        stored = value_of(["ann", SENTENCE, 5], "users", normalizer)
        assert stored == {
            "count": 3,
            "hash": [value_of(value, "user", normalizer)["hash"] for value in ("ann", SENTENCE, 5)],
        }
        assert value_of(["ann"] * 17, "users", normalizer) == {"count": 17}
        assert value_of([True, "ann"], "users", normalizer) == {"count": 2}

    @pytest.mark.parametrize("inner", ["id", "role", "name", "n"])
    def test_what_lies_below_a_hashed_key_is_hashed(self, inner):
        normalizer = Normalizer(hash=["user"], hash_key=HASH_KEY)
        stored = value_of({inner: "ann", "password": "hunter2"}, "user", normalizer)
        assert list(stored[inner]) == ["hash"]
        assert stored["password"] == "[redacted]"

    def test_a_hashed_key_is_hashed_wherever_it_stands(self):
        normalizer = Normalizer(hash=["user", "n"], keep=["query"], hash_key=HASH_KEY)
        for outer in ("query", "message", "filters"):
            stored = value_of({"user": "ann", "n": 5}, outer, normalizer)
            assert [list(stored["user"]), list(stored["n"])] == [["hash"], ["hash"]]

    def test_ids_of_items_under_a_hashed_key_are_hashed(self):
        by_id = Normalizer(hash=["id"], hash_key=HASH_KEY)
        by_collection = Normalizer(hash=["documents"], hash_key=HASH_KEY)
        for normalizer in (by_id, by_collection):
            stored = value_of([{"id": "d-1"}], "documents", normalizer)
            assert stored == {"count": 1, "ids": {"hash": [normal({"id": "d-1"}, by_id)["id"]["hash"]]}}


class TestKeySettings:
    def test_a_kept_key_keeps_its_text(self):
        assert value_of(SENTENCE, "query", Normalizer(keep=["query"])) == SENTENCE

    def test_a_kept_text_is_cut(self):
        normalizer = Normalizer(keep=["query"], max_text=6)
        assert value_of("Calvin", "query", normalizer) == "Calvin"
        assert value_of("Calvin!", "query", normalizer) == "Calvin…"

    def test_what_postgres_cannot_hold_of_a_kept_text_is_replaced(self):
        assert value_of("a\x00b\ud800c", "query", Normalizer(keep=["query"])) == "a\ufffdb\ufffdc"

    def test_what_lies_below_a_kept_key_is_kept_but_for_secrets(self):
        normalizer = Normalizer(keep=["filters"])
        filters = {
            "name": SENTENCE,
            "user_id": SENTENCE,
            "tags": [SENTENCE],
            "deep": {"x": SENTENCE},
            "token": "hunter2",
        }
        assert value_of(filters, "filters", normalizer) == {**filters, "token": "[redacted]"}

    def test_a_kept_key_below_another_is_kept(self):
        assert value_of({"text": SENTENCE, "name": "x"}, "message", Normalizer(keep=["text"])) == {
            "text": SENTENCE, "name": {"length": 1},
        }  # fmt: skip

    def test_a_dropped_key_leaves_no_trace(self):
        normalizer = Normalizer(drop=["trace"])
        assert normal({"trace": 1, "inner": {"trace": 2, "limit": 3}}, normalizer) == {"inner": {"limit": 3}}

    def test_a_dropped_id_is_not_among_the_ids_of_items_either(self):
        assert value_of([{"id": "m-1"}], normalizer=Normalizer(drop=["id"])) == {"count": 1}

    def test_a_secret_is_not_even_hashed(self):
        normalizer = Normalizer(hash=["password", "recall:token"], hash_key=HASH_KEY)
        assert value_of("hunter2", "password", normalizer) == value_of("hunter2", "token", normalizer) == "[redacted]"

    def test_a_secret_may_be_dropped(self):
        assert normal({"password": "hunter2"}, Normalizer(drop=["password"])) is None

    def test_dropping_beats_keeping_and_keeping_beats_hashing(self):
        everywhere = Normalizer(keep=["query"], hash=["query"], drop=["query"], hash_key=HASH_KEY)
        assert normal({"query": SENTENCE}, everywhere) is None
        kept = Normalizer(keep=["query"], hash=["query"], hash_key=HASH_KEY)
        assert value_of(SENTENCE, "query", kept) == SENTENCE

    @pytest.mark.parametrize(
        ("setting", "stored"),
        [
            ("keep", {"query": SENTENCE}),
            ("drop", None),
            ("hash", {"query": {"hash": value_of(SENTENCE, "q", HASHING)["hash"]}}),
        ],
    )
    def test_may_name_one_action(self, setting, stored):
        normalizer = Normalizer(**{setting: ["recall:query"]}, hash_key=HASH_KEY)
        assert normal({"query": SENTENCE}, normalizer, "recall") == stored
        assert normal({"query": SENTENCE}, normalizer, "retain") == normal({"query": SENTENCE}, HASHING)
        assert normal({"query": SENTENCE}, normalizer, "recall") == stored

    def test_a_key_of_one_action_is_not_remembered_for_another(self):
        normalizer = Normalizer(keep=["b:query"])
        stored = [normal({"query": SENTENCE}, normalizer, action) for action in ("a", "b", "a")]
        assert stored == [
            {"query": {"length": len(SENTENCE)}},
            {"query": SENTENCE},
            {"query": {"length": len(SENTENCE)}},
        ]

    def test_more_actions_and_keys_than_it_remembers_are_judged_the_same(self):
        normalizer = Normalizer(keep=["query"])
        for n in range(3000):
            assert normal({f"query-{n}": n, "query": SENTENCE}, normalizer, f"a{n}")["query"] == SENTENCE
            assert normal({f"password-{n}": n, f"k{n}": "v"}, normalizer, "a") == {
                f"password-{n}": "[redacted]",
                f"k{n}": "v",
            }

    @pytest.mark.parametrize(("key", "action"), [("key-{}", "retain"), ("key", "action-{}")])
    def test_what_it_remembers_of_keys_and_actions_has_a_bound(self, key, action):
        normalizer = Normalizer()
        tracemalloc.start()
        try:
            for n in range(7_000):
                normalizer.attributes({key.format(n): 1}, "", action.format(n))
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert grown < 500_000


class TestStrictMode:
    @pytest.mark.parametrize("key", ["field", "memory_id", "query", "kind"])
    @pytest.mark.parametrize("text", ["mcp", UUID_TEXT, SENTENCE, "a"])
    def test_no_string_stays(self, key, text):
        assert value_of(text, key, STRICT) == {"length": len(text)}

    def test_neither_in_collections_nor_as_ids_of_their_items(self):
        assert value_of(["a", "b"], normalizer=STRICT) == {"count": 2}
        assert value_of([{"id": "m-1"}], normalizer=STRICT) == {"count": 1}

    def test_numbers_stay(self):
        assert normal({"limit": 5, "scores": [0.5], "deep": True}, STRICT) == {
            "limit": 5,
            "scores": [0.5],
            "deep": True,
        }

    def test_what_is_kept_stays(self):
        normalizer = Normalizer(strict=True, keep=["kind", "memory_id"])
        assert normal({"kind": "mcp", "other": "mcp", "memory_id": "m-1"}, normalizer) == {
            "kind": "mcp", "other": {"length": 3}, "memory_id": "m-1",
        }  # fmt: skip
        assert value_of({"id": "m-1"}, "kind", normalizer) == {"id": "m-1"}


class TestHowMuchIsWritten:
    def test_a_mapping_is_cut_and_says_so(self):
        stored = normal({f"k{n}": n for n in range(100)})
        assert stored == {**{f"k{n}": n for n in range(32)}, "[truncated]": True}

    def test_a_mapping_of_just_that_many_entries_is_not(self):
        assert normal({f"k{n}": n for n in range(32)}) == {f"k{n}": n for n in range(32)}

    def test_entries_that_are_none_or_dropped_take_no_room(self):
        entries = {f"k{n}": None for n in range(50)} | {f"d{n}": 1 for n in range(20)} | {"limit": 5}
        assert normal(entries, Normalizer(drop=[f"d{n}" for n in range(20)])) == {"limit": 5}

    def test_an_object_with_many_empty_fields_is_walked_to_its_end(self):
        wide = pydantic.create_model("Wide", **{f"f{n}": (int | None, None) for n in range(60)})
        assert value_of(wide(f59=5)) == {"f59": 5}

    @pytest.mark.parametrize("limit", [1, 2, 5, 32])
    def test_the_attributes_of_all_levels_count(self, limit):
        leaf = {f"k{n}": SENTENCE for n in range(40)}
        payload = {f"outer{n}": {"inner": leaf, "items": [{"id": "m-1"}] * 20} for n in range(40)}
        attributes = Normalizer(max_attributes=limit, hash_key=HASH_KEY).attributes(payload)
        truncations = [key for key in attributes if key.endswith("[truncated]")]
        assert attributes["[truncated]"] is True
        # The last entry may have two attributes, and every level says that it was cut.
        assert limit <= len(attributes) - len(truncations) <= limit + 1
        assert len(truncations) <= 3

    def test_three_payloads_fit_into_a_span(self):
        texts = {f"text{n}_text": SENTENCE for n in range(100)}
        items = {f"items{n}": [{"id": "m-1"}] * 20 for n in range(100)}
        mixed = {f"k{n}": {"text": SENTENCE, "items": [1, "a"]} for n in range(100)}
        own = 11
        assert sum(len(HASHING.attributes(payload)) for payload in (texts, items, mixed)) + own <= 128

    def test_a_huge_mapping_is_not_walked_to_its_end(self):
        class Endless(Mapping):
            asked = 0

            def __getitem__(self, key):
                return 1

            def __iter__(self):
                while True:
                    Endless.asked += 1
                    yield f"k{Endless.asked}"

            def __len__(self):
                return 5

        assert len(normal({"endless": Endless()})["endless"]) == 33
        assert Endless.asked < 100


class TestForeignObjectsCannotBreakIt:
    def test_an_entry_that_raises_spoils_itself_only(self):
        class Clock(tzinfo):
            def utcoffset(self, moment):
                raise RuntimeError(SENTENCE)

        assert normal({"a": 1, "at": datetime(2024, 1, 1, tzinfo=Clock()), "b": 2}) == {
            "a": 1,
            "at": "datetime",
            "b": 2,
        }

    def test_a_property_that_raises_is_the_class_of_its_error(self):
        class Model(pydantic.BaseModel):
            limit: int

        @dataclasses.dataclass
        class Broken:
            first: int
            second: int

        Broken.first = property(lambda self: 1 / 0, lambda self, value: None)
        assert value_of(Broken(1, 2)) == {"first": "ZeroDivisionError", "second": 2}
        assert value_of(Model.model_construct()) == {}

    def test_a_mapping_that_raises_on_the_way_keeps_what_came_before(self):
        class Breaks(Mapping):
            def __getitem__(self, key):
                if key == "b":
                    raise KeyError(SENTENCE)
                return 1

            def __iter__(self):
                return iter("abc")

            def __len__(self):
                return 3

        assert normal({"broken": Breaks(), "limit": 5}) == {"broken": {"": "Breaks", "a": 1}, "limit": 5}
        assert normal(Breaks()) == {"a": 1, "value": "Breaks"}

    def test_a_dict_is_read_by_its_own_rules(self):
        class Odd(dict):
            def items(self):
                raise AssertionError

            __iter__ = keys = __getitem__ = get = __len__ = items

        assert value_of(Odd(limit=5)) == {"limit": 5}
        assert normal(Odd(limit=5)) == {"limit": 5}

    def test_a_key_that_raises_is_its_position(self):
        class Broken(enum.Enum):
            A = "a"

            @property
            def value(self):
                raise RuntimeError(SENTENCE)

        assert normal({Broken.A: 1, "b": 2}) == {"#0": 1, "b": 2}
        assert value_of(Broken.A) == "Broken"

    def test_an_item_that_cannot_be_asked_for_its_id_has_none(self):
        class Broken(Mapping):
            def __getitem__(self, key):
                raise RuntimeError(SENTENCE)

            def __iter__(self):
                return iter(["id"])

            def __len__(self):
                return 1

        assert value_of([Broken(), {"id": "m-1"}]) == {"count": 2, "ids": ["m-1"]}

    def test_a_class_that_answers_every_question_with_an_error_is_its_name(self):
        class Meta(type):
            def __getattr__(cls, name):
                raise RuntimeError(SENTENCE)

        class Hostile(metaclass=Meta):
            def __getattribute__(self, name):
                raise RuntimeError(SENTENCE)

        assert normal({"x": Hostile(), "y": [Hostile()]}) == {"x": "Hostile", "y": {"count": 1}}
        assert normal(Hostile()) == {"value": "Hostile"}


class TestRefusedSettings:
    @pytest.mark.parametrize("name", ["max_items", "max_attributes", "max_depth", "max_text"])
    @pytest.mark.parametrize("size", [0, -1, True, 1.0, "5", None])
    def test_a_size_that_is_no_whole_number_above_zero(self, name, size):
        with pytest.raises(ConfigurationError, match=f"^{name}: got {size!r}"):
            Normalizer(**{name: size})

    @pytest.mark.parametrize("name", ["keep", "drop", "hash"])
    @pytest.mark.parametrize("keys", ["query", b"query", ["query", 5], None, 5, iter(["query"])], ids=kind_of)
    def test_keys_that_are_no_collection_of_strings(self, name, keys):
        with pytest.raises(ConfigurationError, match=f"^{name}: got "):
            Normalizer(**{name: keys}, hash_key=HASH_KEY)

    @pytest.mark.parametrize("key", ["password", "recall:password", "apiKey", "Authorization", "access_token"])
    def test_keeping_a_secret(self, key):
        with pytest.raises(ConfigurationError, match=f"^keep: '{key}' names a secret"):
            Normalizer(keep=["query", key])

    def test_hashing_without_a_key(self):
        with pytest.raises(ConfigurationError, match=r"^hash: needs hash_key"):
            Normalizer(hash=["user"])

    @pytest.mark.parametrize("key", [b"", b"fifteen bytes..", "fifteen bytes..", 5, bytearray(16)], ids=kind_of)
    def test_a_hash_key_that_is_too_short_is_refused_without_showing_it(self, key):
        with pytest.raises(ConfigurationError, match=r"^hash_key: ") as refused:
            Normalizer(hash_key=key)
        assert "fifteen" not in str(refused.value)


#: Part of every text and secret that is hidden in a payload, and of nothing else.
MARK = "Planted"

words = st.text(string.ascii_letters, min_size=1, max_size=8)
#: What is a text or a secret wherever it stands, as a key too …
anywhere = (
    st.builds("{} {} {}".format, words, st.just(MARK), words)
    | st.builds("{}{}@{}.example".format, words, st.just(MARK), words)
    | st.builds("postgresql://{}:{}@host/db".format, words, st.just(MARK))
    | st.builds("{}{}{}".format, st.sampled_from(["sk-", "ghp_", "xoxb-", "AKIA", "eyJ"]), st.just(MARK), words)
)
#: … and what is one by the key that it stands under.
by_key = st.dictionaries(
    st.sampled_from(["query", "content", "user_name", "messages", "password", "api_key", "x-auth-token", "Cookie"]),
    st.sampled_from([MARK, [MARK], {"role": MARK}, [{"text": MARK}], PurePosixPath(MARK), {"deep": {"deeper": MARK}}]),
    min_size=1,
    max_size=3,
)
random_tokens = st.builds("q8Zr3vLw9s{}Nc{}dFg7Kx2".format, st.just(MARK), st.integers(0, 9)).map(
    lambda token: {"kind": token}
)
disguised = anywhere.map(str) | anywhere.map(str.encode) | anywhere.map(PurePosixPath) | anywhere.map(ValueError)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.uuids() | st.sampled_from(Color)
keys = (
    st.sampled_from(["query", "memory_id", "kind", "tags", "messages", "config", "headers", "a.b", "password", "id"])
    | st.text(string.ascii_lowercase + "_-.", min_size=1, max_size=10)
    | st.integers()
    | anywhere
)


def containers(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists, mappings = st.lists(items, max_size=4), st.dictionaries(keys, items, max_size=4)
    return (
        lists
        | lists.map(tuple)
        | lists.map(deque)
        | mappings
        | mappings.map(UserDict)
        | st.builds(Hit, items, items, items, items)
        | st.builds(Span, items, items)
        | st.builds(AttrsLike, items, items)
        | st.builds(Memory.model_construct, memory_id=items, text=items)
    )


payloads = st.recursive(
    anywhere | anywhere.map(Text) | disguised | by_key | random_tokens | st.frozensets(anywhere, max_size=3) | scalars,
    containers,
    max_leaves=12,
)


def strings_in(attributes: dict[str, Any]) -> Iterator[str]:
    for key, value in attributes.items():
        yield key
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))


@pytest.mark.parametrize("normalizer", [DEFAULT, HASHING, STRICT], ids=["default", "hashing", "strict"])
@settings(deadline=None, max_examples=150)
@given(payload=payloads)
def test_no_text_and_no_secret_gets_through_wherever_it_is_hidden(normalizer, payload):
    attributes = normalizer.attributes(payload, "astrocyte.audit.request.", "recall")
    assert [text for text in strings_in(attributes) if MARK in text] == []


@settings(deadline=None, max_examples=150)
@given(payload=payloads)
def test_every_attribute_is_one_that_any_sdk_keeps(payload):
    for key, value in DEFAULT.attributes(payload).items():
        values = value if isinstance(value, list) else [value]
        assert type(key) is str
        assert len({type(item) for item in values}) == 1
        assert type(values[0]) in (str, bool, int, float)
        assert type(values[0]) is not float or all(map(math.isfinite, values))
        assert type(values[0]) is not int or all(-(2**63) <= item < 2**63 for item in values)


def test_what_a_normalizer_has_left_in_place_of_something_stays_as_it_is():
    left = {
        "a": {"b": 1, "[truncated]": True},
        "#3": {"length": 5},
        "x": "[redacted]",
        "since": "2024-01-01T00:00:00+00:00",
    }
    assert normal(left) == left
    assert value_of("[redacted]", "query") == "[redacted]"
    assert value_of("2024-01-01T00:00:00+00:00", "query") == {"length": 25}
    assert value_of("2024-01-01T00:00:00+00:00", "since", STRICT) == {"length": 25}
