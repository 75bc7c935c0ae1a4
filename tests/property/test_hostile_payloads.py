"""Nothing that is handed to an audited function can change what it does, or keep its record out of the log."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import sys
import threading
from collections import UserDict, deque
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple

import psycopg
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from astrocyte_otel_audit import Normalizer, audit_operation
from astrocyte_otel_audit import audited as audited_globally

unhurried = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])

MEGABYTE = "a megabyte of text. " * 52_429


class HostileError(Exception):
    """What hostile objects raise when they are asked for anything."""


def refuse(*args: object, **kwargs: object) -> Any:
    raise HostileError


def with_hostile(*names: str, base: type = object) -> Callable[[], object]:
    """Make a maker of objects that raise where Python asks for any of these."""
    properties = {"__class__", "__dict__"}
    return type("Raises", (base,), {name: property(refuse) if name in properties else refuse for name in names})


class UnprintableError(Exception):
    """An error that can be raised and nothing else."""

    __str__ = __repr__ = __getattr__ = __eq__ = refuse
    __hash__ = Exception.__hash__


class Metaclass(type):
    __getattr__ = refuse
    __instancecheck__ = refuse
    __subclasscheck__ = refuse
    __eq__ = refuse
    __str__ = __repr__ = refuse
    __hash__ = type.__hash__


class OfHostileClass(metaclass=Metaclass):
    __getattribute__ = refuse


class Clock(tzinfo):
    utcoffset = tzname = dst = refuse


class Broken(enum.Enum):
    MEMBER = "member"
    value = name = property(refuse)


class Changing(dict):
    """A dict that changes whenever it is looked at by its own methods."""

    def _look(self, *args: object) -> Any:
        dict.__setitem__(self, f"key-{len(self)}", object())
        return dict.__iter__(self)

    __iter__ = keys = items = values = __contains__ = _look


class ChangingMapping(Mapping[str, object]):
    """A mapping that changes while it is iterated over."""

    def __init__(self) -> None:
        self._entries: dict[str, object] = {"first": 1}

    def __getitem__(self, key: str) -> object:
        self._entries[f"key-{len(self._entries)}"] = 1
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Endless(Mapping[str, object]):
    """A mapping that never ends, of mappings that never end."""

    def __getitem__(self, key: str) -> object:
        return Endless()

    def __iter__(self) -> Iterator[str]:
        number = 0
        while True:
            yield f"key-{(number := number + 1)}"

    def __len__(self) -> int:
        return sys.maxsize


class Lying(list[object]):
    """A list that says that it is long, and is asked for items without end."""

    def __len__(self) -> int:
        return sys.maxsize

    def __iter__(self) -> Iterator[object]:
        while True:
            yield self


@dataclasses.dataclass
class Record:
    text: object = None
    id: object = None


@dataclasses.dataclass
class Trap:
    id: int = 1


Trap.id = property(refuse, lambda self, value: None)  # type: ignore[assignment]


class Model(pydantic.BaseModel):
    value: object = None


class Pair(NamedTuple):
    one: object
    other: object


def cyclic_dict() -> object:
    cycle: dict[str, object] = {}
    cycle.update(self=cycle, list=[cycle], record=Record(cycle))
    return cycle


def cyclic_list() -> object:
    cycle: list[object] = []
    cycle.append(cycle)
    return cycle


def deep(levels: int) -> object:
    value: object = "bottom"
    for level in range(levels):
        value = [value] if level % 2 else {"deeper": value}
    return value


#: What nobody would pass, by name: how to make it.
NASTY: dict[str, Callable[[], object]] = {
    "nul": lambda: "a\x00b",
    "surrogate": lambda: "\ud800 \udfff",
    "megabyte": lambda: MEGABYTE,
    "long token": lambda: "a" * 2**20,
    "nan": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "minus infinity": lambda: float("-inf"),
    "huge int": lambda: 10**10_000,
    "minus huge int": lambda: -(10**400),
    "huge decimal": lambda: Decimal(10) ** 9_999,
    "decimal nan": lambda: Decimal("sNaN"),
    "complex": lambda: complex("nan"),
    "megabyte of bytes": lambda: b"\x00" * 2**20,
    "released memoryview": lambda: (view := memoryview(b"abc"), view.release())[0],
    "time at the end of time": lambda: datetime.max.replace(tzinfo=UTC),
    "hostile clock": lambda: datetime(2024, 1, 1, tzinfo=Clock()),
    "longest time": lambda: timedelta.max,
    "generator": lambda: (1 for _ in range(3)),
    "lock": threading.Lock,
    "module": lambda: sys,
    "class": lambda: OfHostileClass,
    "cyclic dict": cyclic_dict,
    "cyclic list": cyclic_list,
    "deep": lambda: deep(5_000),
    "wide": lambda: {f"key {n}": n for n in range(5_000)},
    "wide and deep": lambda: {f"k{n}": {f"k{m}": {"a": {}, "b": [{}]} for m in range(40)} for n in range(40)},
    "long list": lambda: [{"id": n} for n in range(5_000)],
    "lying list": lambda: Lying([1]),
    "changing dict": lambda: Changing(a=1),
    "changing mapping": ChangingMapping,
    "endless mapping": Endless,
    "trap": Trap,
    "model without fields": Model.model_construct,
    "broken enum": lambda: Broken.MEMBER,
    "of hostile class": OfHostileClass,
    "str": with_hostile("__str__", "__repr__", "__format__"),
    "iter": with_hostile("__iter__", "__next__", "__len__", "__getitem__", "__contains__"),
    "getattr": with_hostile("__getattr__", "__dir__"),
    "getattribute": with_hostile("__getattribute__"),
    "class property": with_hostile("__class__", "__dict__"),
    "eq": with_hostile("__eq__", "__hash__", "__bool__", "__lt__"),
    "number": with_hostile("__int__", "__index__", "__float__", "__round__", "__trunc__"),
    "copy": with_hostile("__copy__", "__deepcopy__", "__reduce_ex__", "__getstate__", "__sizeof__"),
    "hostile dict": lambda: with_hostile(
        "__iter__", "__len__", "__getitem__", "__contains__", "__bool__", "keys", "items", "get", "copy", base=dict
    )(),
    "hostile list": lambda: with_hostile("__iter__", "__len__", "__getitem__", "__bool__", "__eq__", base=list)(),
    "hostile tuple": lambda: with_hostile("__iter__", "__len__", "__getitem__", "__hash__", base=tuple)(),
    "hostile set": lambda: with_hostile("__iter__", "__len__", "__contains__", base=set)(),
    "hostile string": lambda: with_hostile(
        "__str__", "__repr__", "__len__", "__iter__", "__eq__", "__hash__", "encode", "replace", base=str
    )(),
    "hostile int": lambda: with_hostile("__index__", "__int__", "__str__", "__eq__", "__lt__", "__bool__", base=int)(),
    "hostile float": lambda: with_hostile("__float__", "__str__", "__eq__", "__lt__", "is_integer", base=float)(),
    "hostile bytes": lambda: with_hostile("__len__", "__iter__", "__eq__", base=bytes)(),
    "unprintable error": UnprintableError,
    "hostile mapping": lambda: with_hostile("__getitem__", "__iter__", "__len__", base=Mapping)(),
    "key of hostile class": lambda: {OfHostileClass(): 1},
    "broken enum as key": lambda: {Broken.MEMBER: 1},
}


class Make(NamedTuple):
    """Stands in a recipe for an object that Hypothesis could neither print nor compare."""

    name: str


nasty_text = st.text(st.characters(codec=None), max_size=20) | st.sampled_from(["\x00", "\ud800", "%empty", "."])
leaves = st.sampled_from(sorted(NASTY)).map(Make) | nasty_text | st.floats() | st.integers() | st.none()


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["query", "memory_id", "limit", "password", "tags", "filters"]) | nasty_text
    wrapped = st.sampled_from([tuple, deque, UserDict, Record, Model])
    return (
        st.lists(inner, max_size=4)
        | st.dictionaries(names, inner, max_size=4)
        | st.tuples(wrapped, inner).map(lambda pair: Pair(*pair))
    )


recipes = st.recursive(leaves, containers, max_leaves=8)


def cooked(recipe: object) -> object:
    """Return the object that a recipe describes."""
    if isinstance(recipe, Make):
        return NASTY[recipe.name]()
    if isinstance(recipe, Pair):
        kind, inner = recipe.one, cooked(recipe.other)
        if kind is UserDict:
            return UserDict({"inner": inner})
        if kind is Model:
            return Model.model_construct(value=inner)
        return Record(text=inner, id=inner) if kind is Record else kind([inner])  # type: ignore[operator]
    if isinstance(recipe, list):
        return [cooked(item) for item in recipe]
    if isinstance(recipe, dict):
        return {key: cooked(value) for key, value in recipe.items()}
    return recipe


@pytest.fixture
def audited(provider):
    return partial(audited_globally, tracer_provider=provider)


@pytest.fixture
def recorded(audit, storage):
    """A function that returns the one record since it was last asked."""
    processor = audit(storage=storage)

    def record():
        assert processor.force_flush()
        [found] = storage.records
        storage.records.clear()
        return found

    return record


class Calls:
    """A function of each kind that takes anything, and returns or raises what it is told to."""

    def __init__(self, audited: Callable[..., Any]) -> None:
        @audited("recall")
        def sync(query, outcome, *rest, **filters):
            return outcome()

        @audited("recall")
        async def coroutine(query, outcome, *rest, **filters):
            return outcome()

        @audited("recall")
        def generator(query, outcome, *rest, **filters):
            yield outcome()

        @audited("recall")
        async def async_generator(query, outcome, *rest, **filters):
            yield outcome()

        # A plain loop: asyncio's runner prints its task, and so the error, on its way to the signal handlers.
        self._loop = asyncio.new_event_loop()
        run = self._loop.run_until_complete
        self.sync = sync
        self.coroutine = lambda *args, **kwargs: run(coroutine(*args, **kwargs))
        self.generator = lambda *args, **kwargs: self._only(generator(*args, **kwargs))
        self.async_generator = lambda *args, **kwargs: run(self._only_of(async_generator(*args, **kwargs)))

    @staticmethod
    def _only(items):
        [item] = items
        return item

    @staticmethod
    async def _only_of(items):
        [item] = [item async for item in items]
        return item

    def close(self) -> None:
        self._loop.close()


@pytest.fixture
def calls(audited):
    with contextlib.closing(Calls(audited)) as calls:
        yield calls


KINDS = ["sync", "coroutine", "generator", "async_generator"]


@pytest.mark.parametrize("kind", KINDS)
@unhurried
@given(asked=recipes, answered=recipes)
def test_an_audited_function_returns_its_own_result_and_is_recorded(calls, recorded, kind, asked, answered):
    payload, result = cooked(asked), cooked(answered)

    assert getattr(calls, kind)(payload, lambda: result, payload, limit=payload) is result

    record = recorded()
    assert (record.action, record.outcome, record.error_type) == ("recall", "success", None)


def raised_by(call: Callable[[], object]) -> BaseException | None:
    """What a call raises. Beyond its own block: an error that can't be printed breaks the report of a failed test."""
    try:
        call()
    except BaseException as error:
        return error
    return None


@pytest.mark.parametrize("kind", KINDS)
@unhurried
@given(asked=recipes, told=recipes)
def test_an_audited_function_raises_its_own_error_and_is_recorded(calls, recorded, kind, asked, told):
    payload, error = cooked(asked), UnprintableError(cooked(told))

    def fail():
        raise error

    raised = raised_by(lambda: getattr(calls, kind)(payload, fail, payload, limit=payload))

    assert (raised is error, error.__cause__, error.__context__) == (True, None, None)
    record = recorded()
    assert (record.outcome, record.error_type) == ("failure", f"{__name__}.UnprintableError")


@unhurried
@given(request=recipes, response=recipes, metadata=recipes)
def test_an_operation_block_runs_and_is_recorded(provider, recorded, request, response, metadata):
    payload, ran = cooked(request), False
    with audit_operation("retain", request=payload, tracer_provider=provider) as operation:
        operation.response = cooked(response)
        operation.metadata["seen"] = cooked(metadata)
        ran = True

    assert ran
    assert recorded().outcome == "success"


@unhurried
@given(recipe=recipes)
def test_every_payload_is_normalized_without_an_error_and_bounded(recipe):
    normalizer = Normalizer(hash_key=b"sixteen bytes or more", keep=["query"])
    attributes = normalizer.attributes(cooked(recipe), "request.", "recall")
    assert len(attributes) <= 32 + 1 + 5
    assert all(len(value) <= 1025 for value in attributes.values() if isinstance(value, (str, list)))


@pytest.mark.parametrize("name", NASTY)
def test_every_single_one_is_survived_at_each_place_of_a_payload(audited, recorded, name):
    result = NASTY[name]()

    @audited("recall", bank_id=lambda arguments: "bank")
    def recall(password, payload, text, items):
        return result

    assert recall(password=NASTY[name](), payload=NASTY[name](), text=NASTY[name](), items=[NASTY[name]()]) is result

    record = recorded()
    assert (record.bank_id, record.outcome) == ("bank", "success")
    assert record.request["password"] == "[redacted]"


#: Settings as careless as they can be.
KEEPING = Normalizer(keep=["text"], max_text=2**21, max_items=10_000, max_attributes=40, max_depth=40)


def test_the_row_of_each_is_in_postgres(audited, audit, database):
    processor = audit(dsn=database)
    names = {*NASTY, "everything at once"}

    def recall(bank_id, payload, text):
        return payload

    careful, careless = audited("recall")(recall), audited("recall", normalizer=KEEPING)(recall)
    for name in names:
        payload = {key: make() for key, make in NASTY.items()} if name not in NASTY else NASTY[name]()
        assert careful(name, payload, payload) is payload
        assert careless(f"{name}, kept", payload, payload) is payload

    assert processor.force_flush()
    assert processor.stats()["stored"] == 2 * len(names)
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT bank_id, outcome, request IS NOT NULL FROM astrocyte_audit_log").fetchall()
    assert sorted(rows) == sorted((row, "success", True) for name in names for row in (name, f"{name}, kept"))


def test_names_that_postgres_cannot_store_do_not_cost_the_row(audited, audit, database):
    processor = audit(dsn=database)
    broken = type("BrokenError", (Exception,), {"__qualname__": "\x00" * 3 + "\ud800" * 600})

    @audited("re\x00call\ud800", transport="\x00http")
    def recall(bank_id):
        raise broken

    with pytest.raises(broken):
        recall("bank\x00\udfff")

    assert processor.force_flush()
    with psycopg.connect(database) as connection:
        rows = connection.execute(
            "SELECT action, transport, bank_id, outcome, length(error_type) > 3 FROM astrocyte_audit_log"
        ).fetchall()
    assert rows == [("re\ufffdcall\ufffd", "\ufffdhttp", "bank\ufffd\ufffd", "failure", True)]
