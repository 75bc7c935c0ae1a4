"""What a payload's value is, found out without calling anything that it could have overridden."""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import PurePath
from typing import Any, Final
from uuid import UUID

#: A short token: what may stand in a row as it came, if nothing speaks against it.
TOKEN: Final = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
#: Entries of one mapping that are looked at, those that are None or dropped included.
MAX_SCANNED: Final = 1024
#: The first integer that JSON encoders and OTLP don't take.
INT64: Final = 1 << 63
#: Fields in which the items of a collection carry their id, the first that is there wins.
_ITEM_IDS: Final = ("id", "memory_id", "document_id", "chunk_id", "uuid")


class Omitted(enum.Enum):
    """Stands for the scalar of a value that is none."""

    OMITTED = enum.auto()


OMITTED: Final = Omitted.OMITTED


def as_scalar(value: object, kind: type) -> Any:
    """Return the JSON scalar that a value is, or OMITTED. Overridden methods of subclasses are passed by."""
    if kind is bool or value is None:
        return value
    for base, convert in _SCALARS:
        if issubclass(kind, base):
            return convert(value)
    return OMITTED


def _integer(value: Any) -> int | str:
    number = int.__index__(value) if isinstance(value, int) else int(value)
    if -INT64 <= number < INT64:
        return number
    # JSON encoders and OTLP stop at 64 bits; a digest or a 128-bit id still reads as its digits.
    return str(number) if number.bit_length() <= 208 else f"int:{number.bit_length()}bits"


def _decimal(value: Any) -> str:
    text = Decimal.__str__(value)
    return text if len(text) <= 64 else f"decimal:{len(text)}digits"


def _float(value: Any) -> float | str:
    number = float.__float__(value) if isinstance(value, float) else float(value)
    return number if math.isfinite(number) else repr(number)


def _enum(value: Any) -> Any:
    """An enum's value where that is a number or a token, else its name: both were written by a programmer."""
    member = value.value
    if type(member) in (bool, int, float) or (type(member) is str and TOKEN.fullmatch(member)):
        return as_scalar(member, type(member))
    return value.name


#: In this order, since an IntEnum is an int and a datetime is a date.
_SCALARS: Final[tuple[tuple[type, Callable[[Any], Any]], ...]] = (
    (enum.Enum, _enum),
    (str, str.__str__),
    (int, _integer),
    (float, _float),
    (UUID, UUID.__str__),
    (datetime, datetime.isoformat),
    (date, date.isoformat),
    (time, time.isoformat),
    (timedelta, timedelta.total_seconds),
    (Decimal, _decimal),
    (numbers.Integral, _integer),
    (numbers.Real, _float),
)
#: What data may have filled with text, and what is therefore judged like a string. An enum of strings is not.
STRING_TYPES: Final = (str, PurePath)
_SCALAR_TYPES: Final = (*(base for base, _ in _SCALARS), PurePath)
#: Collections that are in memory. A lazy one may cost a query to walk, and is left alone.
COLLECTION_TYPES: Final = (list, tuple, set, frozenset, deque)


def as_string(value: object) -> str:
    """Return what one of `STRING_TYPES` says."""
    return str.__str__(value) if isinstance(value, str) else PurePath.as_posix(value)  # type: ignore[arg-type]


def is_scalar(value: object) -> bool:
    """Say whether a value is a scalar or a string, by its type alone."""
    return issubclass(type(value), _SCALAR_TYPES)


def iterate(items: Any) -> Iterable[object]:
    """Iterate over a built-in collection by its own rules, whatever a subclass overrides."""
    base = next(base for base in COLLECTION_TYPES if issubclass(type(items), base))
    return base.__iter__(items)


def fields_of(value: Any, kind: type, limit: int) -> Iterable[tuple[object, object]] | None:
    """Return the pairs of a mapping, dataclass, pydantic model, attrs class or named tuple; else None.

    Of a dict, `limit` pairs that aren't None. A foreign mapping may have no end, so all are asked for so many only.
    """
    if issubclass(kind, dict):
        if dict.__len__(value) <= limit:  # as most are
            return list(dict.items(value))
        looked_at = islice(dict.items(value), MAX_SCANNED)
        return list(islice((pair for pair in looked_at if pair[1] is not None), limit))
    if issubclass(kind, Mapping):
        return ((key, value[key]) for key in islice(value, MAX_SCANNED))
    names: Iterable[str]
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    elif isinstance(models := getattr(kind, "model_fields", None), dict):
        names = list(models)
    elif isinstance(attrs := getattr(kind, "__attrs_attrs__", None), tuple):
        names = [attribute.name for attribute in attrs]
    elif isinstance(fields := getattr(kind, "_fields", None), tuple):
        names = fields
    else:
        return None
    return ((name, _attribute(value, name)) for name in names)


def _attribute(value: object, name: str) -> object:
    try:
        return getattr(value, name, None)
    except Exception as error:  # a property of foreign code: the class of what it raised stands for it
        return error


def id_of(item: object) -> tuple[str, object] | None:
    """Return the first field of an item that holds its id, with its name; None for an item without."""
    kind = type(item)
    try:
        if issubclass(kind, Mapping):
            for key in _ITEM_IDS:
                if key in item and is_scalar(found := item[key]):  # type: ignore[index,operator]
                    return key, found
        elif fields_of(item, kind, 1) is not None:
            for key in _ITEM_IDS:
                if is_scalar(found := getattr(item, key, None)):
                    return key, found
    except Exception:  # an item that can't be asked for its id has none, as far as the audit goes
        return None
    return None


def type_name(value: object) -> str:
    """Return the name of a value's type, if it is a plain name."""
    name = str.__str__(type.__getattribute__(type(value), "__qualname__")).rpartition("<locals>.")[2]
    return name if TOKEN.fullmatch(name) else "object"
