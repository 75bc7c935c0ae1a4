"""The normalizer: what of a payload may be written down.

Audit rows live for years and are read by people who may not read the memories themselves. So text is
replaced by its length, a secret by ``[redacted]``, a big collection by its count, and an unknown object by
the name of its type. Nothing here calls ``__str__``, ``__repr__`` or an overridden ``__iter__`` of a
foreign object: a payload can't break, delay or change the call that it describes.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import hmac
import math
import numbers
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import islice, pairwise
from pathlib import PurePath
from typing import Any, Final
from uuid import UUID

from astrocyte_otel_audit.attributes import EMPTY, escape, unflatten
from astrocyte_otel_audit.credentials import looks_like_credential
from astrocyte_otel_audit.errors import ConfigurationError

REDACTED: Final = "[redacted]"
#: Actions and keys come from data: what is remembered of them must not grow without end.
_MAX_KNOWN: Final = 1024
#: Stands for the rest of a mapping that was cut at `max_attributes`.
TRUNCATED: Final = "[truncated]"

_TOKEN = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
#: What Postgres or UTF-8 can't hold: NUL and lone surrogates.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_INT64: Final = 1 << 63
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

#: A key whose last word is one of these holds text that people wrote or that names a person.
_TEXT_WORDS: Final = frozenset((
    "abstract", "address", "answer", "answers", "argument", "arguments", "body", "caption", "chunk", "chunks",
    "comment", "comments", "completion", "content", "contents", "conversation", "description", "detail",
    "details", "document", "documents", "email", "emails", "excerpt", "fact", "facts", "history", "input",
    "inputs", "instruction", "instructions", "memories", "memory", "message", "messages", "msg", "name", "names",
    "note", "notes", "observation", "observations", "output", "outputs", "passage", "passages", "phone", "prompt",
    "prompts", "q", "queries", "query", "question", "questions", "quote", "reason", "reasoning", "reply",
    "sentence", "sentences", "snippet", "subject", "summary", "text", "texts", "thought", "thoughts", "title",
    "titles", "transcript", "turn", "turns", "username", "utterance", "utterances",
))  # fmt: skip
#: A key that holds one of these words, anywhere, holds a secret, …
_SECRET_WORDS: Final = frozenset((
    "authorization", "authorisation", "bearer", "cookie", "cookies", "credential", "credentials", "passphrase",
    "passwd", "password", "passwords", "pwd", "secret", "secrets", "apikey", "apikeys", "dsn", "otp", "pin",
    "ssn",
))  # fmt: skip
_SECRET_PAIRS: Final = frozenset(
    [("api", "key"), ("api", "keys"), ("access", "key"), ("private", "key"), ("secret", "key"), ("signing", "key"),
     ("encryption", "key"), ("session", "key"), ("hash", "key")]
)  # fmt: skip
#: … and so does one that ends in one of these (``access_token``, but not ``token_count``).
_SECRET_LAST_WORDS: Final = frozenset(["auth", "jwt", "token"])
#: A key that ends in one of these names a thing: its value may look random without being a secret.
_ID_WORDS: Final = frozenset(["id", "ids", "uuid", "guid", "hash", "sha256", "digest", "fingerprint"])
#: Fields in which the items of a collection carry their id, the first that is there wins.
_ITEM_IDS: Final = ("id", "memory_id", "document_id", "chunk_id", "uuid")


class _Rule(enum.Enum):
    """What may become of the value under a key."""

    PLAIN = enum.auto()
    ID = enum.auto()
    TEXT = enum.auto()
    KEEP = enum.auto()
    HASH = enum.auto()
    REDACT = enum.auto()
    DROP = enum.auto()


#: What lies under a key that holds text, or that is kept or hashed, is of the same kind.
_INHERITED: Final = (_Rule.TEXT, _Rule.KEEP, _Rule.HASH)


class _Omitted(enum.Enum):
    OMITTED = enum.auto()


class Normalizer:
    """Turns any payload into a small JSON object without raw text. Thread-safe and immutable.

    A key setting is a key, as in ``"query"``, or an action and a key, as in ``"recall:query"``.

    Args:
        keep: keys whose text is stored as it is, cut at `max_text` characters. A deliberate choice:
            everyone who can read the audit table will read it.
        drop: keys that leave no trace at all.
        hash: keys whose strings and numbers are replaced by their keyed hash, so that equal values can
            be found without being read. Needs `hash_key`.
        hash_key: secret for HMAC-SHA256, 16 bytes at least. Where it is set, every text also gets a
            ``hash`` beside its ``length`` (32 hex digits). Never stored.
        strict: no string stays, short tokens and ids included, except under `keep`.
        max_items: a collection of at most this many scalars is kept, and a bigger one becomes its count.
        max_attributes: entries in one payload; where there were more, the last one is ``[truncated]: true``.
            The default leaves room for three payloads in a span's 128 attributes.
        max_depth: levels of nesting; what is deeper becomes the name of its type.
        max_text: characters of a kept text.

    Raises:
        ConfigurationError: a size below one, a key setting that isn't a collection of strings, `hash` without
            `hash_key`, or `keep` on a key that names a secret.
    """

    def __init__(
        self,
        *,
        keep: Collection[str] = (),
        drop: Collection[str] = (),
        hash: Collection[str] = (),
        hash_key: bytes | str | None = None,
        strict: bool = False,
        max_items: int = 16,
        max_attributes: int = 32,
        max_depth: int = 4,
        max_text: int = 1024,
    ) -> None:
        sizes = {"max_items": max_items, "max_attributes": max_attributes, "max_depth": max_depth, "max_text": max_text}
        for name, size in sizes.items():
            if type(size) is not int or size < 1:
                raise ConfigurationError(name, f"got {size!r}; accepted is a whole number of at least 1")
        self._keep, self._drop, self._hash = _keys("keep", keep), _keys("drop", drop), _keys("hash", hash)
        if isinstance(hash_key, str):
            hash_key = hash_key.encode()
        if hash_key is not None and (not isinstance(hash_key, bytes) or len(hash_key) < 16):
            raise ConfigurationError("hash_key", "too short or not bytes; accepted are 16 bytes or more, kept secret")
        if self._hash and hash_key is None:
            raise ConfigurationError("hash", "needs hash_key, the secret that the hashes are made with")
        for key in self._keep:
            if _classify(key.rpartition(":")[2]) is _Rule.REDACT:
                raise ConfigurationError("keep", f"{key!r} names a secret, and secrets are never stored")
        self._hash_key = hash_key
        self._strict = strict
        self._max_items = max_items
        self._max_attributes = max_attributes
        self._max_depth = max_depth
        self._max_text = max_text
        #: By action and key as it came: the key as it is written, and the rule. Computed once, asked at every call.
        self._known: dict[str, dict[str, tuple[str, _Rule]]] = {}

    def attributes(self, payload: object, prefix: str = "", action: str = "") -> dict[str, Any]:
        """Normalize a request, a response or metadata into flat attributes; never raises.

        Args:
            payload: a mapping, dataclass or pydantic model gives its fields, those that are None left out. A
                collection gives ``count``, with ``ids`` where its items have some. Any other value gives ``value``, a
                string ``length``: without a key to judge it by, it is text.
            prefix: begins every key, such as `attributes.REQUEST`.
            action: the action, for key settings that name one.

        Returns:
            A new dict of scalars and homogeneous lists; empty for None.
        """
        if payload is None:
            return {}
        walk = _Walk(self, action)
        if type(payload) is dict and len(payload) <= self._max_attributes:  # as most are: the short way
            walk.mapping(list(payload.items()), prefix, _Rule.PLAIN, 0)
        else:
            walk.top(payload, prefix)
        return walk.out

    def payload(self, payload: object, action: str = "") -> dict[str, Any] | None:
        """Normalize like `attributes`, into a nested JSON object as it will stand in the row; None for nothing."""
        tree: dict[str, Any] = {}
        for path, value in self.attributes(payload, "", action).items():
            unflatten(path, value, tree)
        return tree or None

    def _known_keys(self, action: str) -> dict[str, tuple[str, _Rule]]:
        known = self._known.get(action)
        if known is None or len(known) >= _MAX_KNOWN:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            known = self._known[action] = {}
        return known

    def _decide(self, key: str, action: str) -> _Rule:
        names = {key, f"{action}:{key}"}
        natural = _classify(key)
        if names & self._drop:
            return _Rule.DROP
        if natural is _Rule.REDACT:
            return natural
        if names & self._keep:
            return _Rule.KEEP
        if names & self._hash:
            return _Rule.HASH
        return natural

    def _digest(self, text: str) -> str:
        return hmac.new(self._hash_key or b"", text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


class _Walk:
    """One walk over one payload: the settings, the attributes so far, and how many entries may still be written."""

    __slots__ = ("_action", "_known", "_left", "_settings", "out")

    def __init__(self, settings: Normalizer, action: str) -> None:
        self._settings = settings
        self._action = action
        self._known = settings._known_keys(action)
        self._left = settings._max_attributes
        self.out: dict[str, Any] = {}

    def top(self, payload: object, prefix: str) -> None:
        kind = type(payload)
        try:
            if kind is str:
                self._text(payload, prefix)  # type: ignore[arg-type]
            elif issubclass(kind, _COLLECTION_TYPES) and not hasattr(kind, "_fields"):
                values = self._described(payload, prefix, _Rule.PLAIN, 0)
                if values is not None:
                    self.out[prefix + "count"] = len(values)
                    self.out[prefix + "values"] = values
            elif (fields := _fields(payload, kind, self._settings._max_attributes + 1)) is not None:
                self.mapping(fields, prefix, _Rule.PLAIN, 0)
            else:
                self._value(payload, prefix + "value", _Rule.PLAIN, 0)
        except Exception:
            self.out[prefix + "value"] = _type_name(payload)

    def mapping(self, pairs: Iterable[tuple[object, object]], prefix: str, rule: _Rule, depth: int) -> None:
        known, inherits = self._known, rule in _INHERITED
        written = len(self.out)
        for position, (raw_key, value) in enumerate(pairs):
            if value is None:  # says no more than the key's absence
                continue
            if self._left <= 0:
                self.out[prefix + TRUNCATED] = True
                break
            key, own = (type(raw_key) is str and known.get(raw_key)) or self._learn(raw_key, position)
            if own is _Rule.DROP:
                continue
            if inherits and own is not _Rule.REDACT and own is not _Rule.KEEP and own is not _Rule.ID:
                own = rule
            self._left -= 1
            try:
                self._value(value, prefix + key, own, depth + 1)
            except Exception:
                # An object that breaks Python's own protocols spoils its own entry, not its neighbours'.
                self.out[prefix + key] = _type_name(value)
        if depth and len(self.out) == written:
            self.out[prefix + EMPTY] = True

    def _value(self, value: object, path: str, rule: _Rule, depth: int) -> None:
        kind = type(value)
        if rule is _Rule.REDACT:
            self.out[path] = REDACTED
        elif kind is str:
            self._string(value, path, rule)  # type: ignore[arg-type]
        elif kind is bool or (kind is int and rule is not _Rule.HASH and -_INT64 <= value < _INT64):  # type: ignore[operator]
            self.out[path] = value
        elif issubclass(kind, _STRING_TYPES) and not issubclass(kind, enum.Enum):
            self._string(_plain_string(value), path, rule)
        elif (scalar := _scalar(value, kind)) is not _Omitted.OMITTED:
            if rule is _Rule.HASH:
                self.out[path + ".hash"] = self._settings._digest(str(scalar))
            else:
                self.out[path] = scalar
        elif issubclass(kind, (bytes, bytearray, memoryview)):
            self.out[path + ".length"] = len(value)  # type: ignore[arg-type]
        elif depth > self._settings._max_depth:
            self.out[path] = _type_name(value)
        elif issubclass(kind, _COLLECTION_TYPES) and not hasattr(kind, "_fields"):
            values = self._described(value, path + ".", rule, depth)
            if values is not None:
                self.out[path] = values
        elif (fields := _fields(value, kind, self._settings._max_attributes + 1)) is not None:
            self.mapping(fields, path + ".", rule, depth)
        else:
            self.out[path] = _type_name(value)

    def _string(self, text: str, path: str, rule: _Rule) -> None:
        settings = self._settings
        if rule is _Rule.KEEP:
            kept = _UNSTORABLE.sub("\ufffd", text[: settings._max_text])
            self.out[path] = kept + "…" if len(text) > settings._max_text else kept
        elif rule is _Rule.HASH:
            self.out[path + ".hash"] = settings._digest(text)
        elif rule is not _Rule.TEXT and self._stays(text, rule):
            self.out[path] = text
        else:
            self._text(text, path + ".")

    def _text(self, text: str, prefix: str) -> None:
        self.out[prefix + "length"] = len(text)
        if self._settings._hash_key is not None:
            self.out[prefix + "hash"] = self._settings._digest(text)

    def _stays(self, text: str, rule: _Rule) -> bool:
        if self._settings._strict or _TOKEN.fullmatch(text) is None:
            return False
        return not looks_like_credential(text, is_id=rule is _Rule.ID)

    def _described(self, items: Any, prefix: str, rule: _Rule, depth: int) -> list[Any] | None:
        """Return a small collection of like scalars as a list; describe any other one by attributes."""
        limit = self._settings._max_items
        count = len(items)
        head = list(islice(_iterate(items), limit))
        if 0 < count <= limit and rule is not _Rule.TEXT and all(map(_is_scalar, head)):
            walk = _Walk(self._settings, self._action)
            for position, item in enumerate(head):
                walk._value(item, str(position), rule, depth + 1)
            values = list(walk.out.values())
            kinds = {type(value) for value in values}
            if rule is _Rule.HASH:
                self.out[prefix + "count"] = count
                self.out[prefix + "hash"] = values
                return None
            as_they_are = len(walk.out) == count and all("." not in path for path in walk.out)
            if as_they_are and len(kinds) == 1:
                return sorted(values) if issubclass(type(items), (set, frozenset)) else values
            if as_they_are and kinds == {int, float}:  # an attribute's list holds one type
                return [float(value) for value in values]
        self.out[prefix + "count"] = count
        ids = [_scalar(found, type(found)) for item in head if (found := _item_id(item)) is not None]
        # Ids that turn out to be text say less than they would cost.
        if ids and all(type(found) is str and self._stays(found, _Rule.ID) for found in ids):
            self.out[prefix + "ids"] = ids
        return None

    def _learn(self, raw_key: object, position: int) -> tuple[str, _Rule]:
        """Return how a key is written, and its rule. A key may itself be a text or a secret: then its position is."""
        kind = type(raw_key)
        scalar = raw_key if kind is str else _scalar(raw_key, kind)
        if type(scalar) is not str:
            return (str(scalar), _Rule.PLAIN) if type(scalar) in (int, bool) else (f"#{position}", _Rule.PLAIN)
        rule = self._settings._decide(scalar[:128], self._action)
        if not _TOKEN.fullmatch(scalar) or looks_like_credential(scalar, is_id=False):
            return f"#{position}", rule
        if kind is str:
            self._known[scalar] = (escape(scalar), rule)
        return escape(scalar), rule


def _keys(argument: str, keys: Collection[str]) -> frozenset[str]:
    if isinstance(keys, str) or not all(isinstance(key, str) for key in keys):
        raise ConfigurationError(
            argument, f"got {keys!r}; accepted is a list of keys, such as ['query', 'recall:tags']"
        )
    return frozenset(keys)


def _classify(key: str) -> _Rule:
    words = [word.lower() for word in _WORD.findall(key)]
    if not words:
        return _Rule.PLAIN
    if not _SECRET_WORDS.isdisjoint(words) or words[-1] in _SECRET_LAST_WORDS:
        return _Rule.REDACT
    if not _SECRET_PAIRS.isdisjoint(pairwise(words)):
        return _Rule.REDACT
    if words[-1] in _TEXT_WORDS:
        return _Rule.TEXT
    return _Rule.ID if words[-1] in _ID_WORDS else _Rule.PLAIN


def _scalar(value: object, kind: type) -> Any:
    """Return the JSON scalar that a value is, or OMITTED. Overridden methods of subclasses are passed by."""
    if kind is bool or value is None:
        return value
    for base, convert in _SCALARS:
        if issubclass(kind, base):
            return convert(value)
    return _Omitted.OMITTED


def _integer(value: Any) -> int | str:
    number = int.__index__(value) if isinstance(value, int) else int(value)
    if -_INT64 <= number < _INT64:
        return number
    # JSON encoders and OTLP stop at 64 bits; a digest or a 128-bit id still reads as its digits.
    return str(number) if number.bit_length() <= 208 else f"int:{number.bit_length()}bits"


def _float(value: Any) -> float | str:
    number = float.__float__(value) if isinstance(value, float) else float(value)
    return number if math.isfinite(number) else repr(number)


def _enum(value: Any) -> Any:
    """An enum's value where that is a number or a token, else its name: both were written by a programmer."""
    member = value.value
    if type(member) in (bool, int, float) or (type(member) is str and _TOKEN.fullmatch(member)):
        return _scalar(member, type(member))
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
    (Decimal, Decimal.__str__),
    (numbers.Integral, _integer),
    (numbers.Real, _float),
)
#: What data may have filled with text, and what is therefore judged like a string. An enum of strings is not.
_STRING_TYPES: Final = (str, PurePath)
#: Collections that are in memory. A lazy one may cost a query to walk, and is left alone.
_COLLECTION_TYPES: Final = (list, tuple, set, frozenset, deque)


def _plain_string(value: object) -> str:
    return str.__str__(value) if isinstance(value, str) else PurePath.as_posix(value)  # type: ignore[arg-type]


def _is_scalar(value: object) -> bool:
    kind = type(value)
    return issubclass(kind, PurePath) or any(issubclass(kind, base) for base, _ in _SCALARS)


def _iterate(items: Any) -> Iterable[object]:
    """Iterate over a built-in collection by its own rules, whatever a subclass overrides."""
    base = next(base for base in _COLLECTION_TYPES if issubclass(type(items), base))
    return base.__iter__(items)


def _fields(value: Any, kind: type, limit: int) -> Iterable[tuple[object, object]] | None:
    """At most `limit` pairs of a mapping, dataclass, pydantic model, attrs class or named tuple; else None."""
    if issubclass(kind, dict):
        return list(islice(dict.items(value), limit))
    if issubclass(kind, Mapping):
        return ((key, value[key]) for key in islice(value, limit))
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
    return ((name, _attribute(value, name)) for name in islice(names, limit))


def _attribute(value: object, name: str) -> object:
    try:
        return getattr(value, name, None)
    except Exception as error:  # a property of foreign code: what it raised stands for it
        return type(error)


def _item_id(item: object) -> object:
    kind = type(item)
    try:
        if issubclass(kind, Mapping):
            return next((item[key] for key in _ITEM_IDS if key in item), None)  # type: ignore[index,operator]
        if _fields(item, kind, 1) is None:
            return None
        return next((found for key in _ITEM_IDS if (found := getattr(item, key, None)) is not None), None)
    except Exception:  # an item that can't be asked for its id has none, as far as the audit goes
        return None


def _type_name(value: object) -> str:
    name = type.__getattribute__(type(value), "__qualname__")
    return name if type(name) is str and _TOKEN.fullmatch(name) else "object"
