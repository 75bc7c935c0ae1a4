"""The normalizer: what of a payload may be written down.

Audit rows live for years and are read by people who may not read the memories themselves. So text is
replaced by its length, a secret by ``[redacted]``, a big collection by its count, and an unknown object by
the name of its type. Nothing here calls ``__str__``, ``__repr__`` or an overridden ``__iter__`` of a
foreign object: a payload can't break, delay or change the call that it describes.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any, Final

from astrocyte_otel_audit.attributes import EMPTY, escape, unflatten
from astrocyte_otel_audit.credentials import looks_like_credential
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.payload_keys import Rule, classify, inherited
from astrocyte_otel_audit.payload_values import (
    COLLECTION_TYPES,
    INT64,
    OMITTED,
    STRING_TYPES,
    TOKEN,
    as_scalar,
    as_string,
    fields_of,
    id_of,
    is_scalar,
    iterate,
    type_name,
)

REDACTED: Final = "[redacted]"
#: Actions and keys come from data: what is remembered of them must not grow without end.
_MAX_KNOWN: Final = 1024
#: Stands for the rest of a mapping that was cut at `max_attributes`.
TRUNCATED: Final = "[truncated]"

#: Keys that a normalizer has written in place of others, and the one string of its that is no token: a payload that
#: passes twice, as another emitter's may, is to stay what it is.
_OWN_KEY = re.compile(r"#[0-9]{1,4}|" + re.escape(TRUNCATED))
_TIMESTAMP = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{5,15}[+-][0-9]{2}:[0-9]{2}")

#: What Postgres or UTF-8 can't hold: NUL and lone surrogates.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
# As globals: looking a member up on its enum costs more than all else that is done to a number (CPython 3.11).
_PLAIN, _ID, _TEXT, _KEEP, _HASH, _REDACT, _DROP = Rule


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
        max_attributes: attributes of one payload; where there were more, the last one is ``[truncated]: true``.
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
            hash_key = hash_key.encode("utf-8", "surrogatepass")
        if hash_key is not None and (not isinstance(hash_key, bytes) or len(hash_key) < 16):
            raise ConfigurationError("hash_key", "too short or not bytes; accepted are 16 bytes or more, kept secret")
        if self._hash and hash_key is None:
            raise ConfigurationError("hash", "needs hash_key, the secret that the hashes are made with")
        for key in self._keep:
            if classify(key.rpartition(":")[2]) is _REDACT:
                raise ConfigurationError("keep", f"{key!r} names a secret, and secrets are never stored")
        self._hash_key = hash_key
        self._strict = strict
        self._max_items = max_items
        self._max_attributes = max_attributes
        self._max_depth = max_depth
        self._max_text = max_text
        #: By action and key as it came: the key as it is written, and the rule. Computed once, asked at every call.
        self._known: dict[str, dict[str, tuple[str, Rule]]] = {}

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
            walk.mapping(list(payload.items()), prefix, _PLAIN, 0)
        else:
            walk.top(payload, prefix)
        return walk.out

    def payload(self, payload: object, action: str = "") -> dict[str, Any] | None:
        """Normalize like `attributes`, into a nested JSON object as it will stand in the row; None for nothing."""
        tree: dict[str, Any] = {}
        for path, value in self.attributes(payload, "", action).items():
            unflatten(path, value, tree)
        return tree or None

    def _known_keys(self, action: str) -> dict[str, tuple[str, Rule]]:
        known = self._known.get(action)
        if known is None or len(known) >= _MAX_KNOWN:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            known = self._known[action] = {}
        return known

    def _decide(self, key: str, action: str) -> Rule:
        names = {key, f"{action}:{key}"}
        natural = classify(key)
        if names & self._drop:
            return _DROP
        if natural is _REDACT:
            return natural
        if names & self._keep:
            return _KEEP
        if names & self._hash:
            return _HASH
        return natural

    def _digest(self, text: str) -> str:
        return hmac.new(self._hash_key or b"", text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


class _Walk:
    """One walk over one payload: the settings, and the attributes so far."""

    __slots__ = ("_action", "_known", "_settings", "out")

    def __init__(self, settings: Normalizer, action: str) -> None:
        self._settings = settings
        self._action = action
        self._known = settings._known_keys(action)
        self.out: dict[str, Any] = {}

    def top(self, payload: object, prefix: str) -> None:
        kind = type(payload)
        try:
            if issubclass(kind, STRING_TYPES) and not issubclass(kind, enum.Enum):
                self._text(as_string(payload), prefix)
            elif issubclass(kind, COLLECTION_TYPES) and not hasattr(kind, "_fields"):
                values = self._described(payload, prefix, _PLAIN, 0)
                if values is not None:
                    self.out[prefix + "count"] = len(values)
                    self.out[prefix + "values"] = values
            elif (fields := fields_of(payload, kind, self._settings._max_attributes + 1)) is not None:
                self.mapping(fields, prefix, _PLAIN, 0)
            else:
                self._value(payload, prefix + "value", _PLAIN, 0)
        except Exception:
            self.out[prefix + "value"] = type_name(payload)

    def mapping(self, pairs: Iterable[tuple[object, object]], prefix: str, rule: Rule, depth: int) -> None:
        known, limit = self._known, self._settings._max_attributes
        written = len(self.out)
        for position, (raw_key, value) in enumerate(pairs):
            if value is None:  # says no more than the key's absence
                continue
            if len(self.out) >= limit:
                self.out[prefix + TRUNCATED] = True
                break
            key, own = (type(raw_key) is str and known.get(raw_key)) or self._learn(raw_key, position)
            if own is _DROP:
                continue
            try:
                self._value(value, prefix + key, own if rule is _PLAIN else inherited(rule, own), depth + 1)
            except Exception:
                # An object that breaks Python's own protocols spoils its own entry, not its neighbours'.
                self.out[prefix + key] = type_name(value)
        if depth and len(self.out) == written:
            self.out[prefix + EMPTY] = True

    def _value(self, value: object, path: str, rule: Rule, depth: int) -> None:
        kind = type(value)
        if rule is _REDACT:
            self.out[path] = REDACTED
        elif kind is str:
            self._string(value, path, rule)  # type: ignore[arg-type]
        elif kind is bool or (kind is int and rule is not _HASH and -INT64 <= value < INT64):  # type: ignore[operator]
            self.out[path] = value
        elif issubclass(kind, STRING_TYPES) and not issubclass(kind, enum.Enum):
            self._string(as_string(value), path, rule)
        elif (scalar := as_scalar(value, kind)) is not OMITTED:
            if rule is _HASH:
                self.out[path + ".hash"] = self._settings._digest(str(scalar))
            else:
                self.out[path] = scalar
        elif issubclass(kind, (bytes, bytearray, memoryview)):
            self.out[path + ".length"] = len(value)  # type: ignore[arg-type]
        elif depth > self._settings._max_depth:
            self.out[path] = type_name(value)
        elif issubclass(kind, COLLECTION_TYPES) and not hasattr(kind, "_fields"):
            values = self._described(value, path + ".", rule, depth)
            if values is not None:
                self.out[path] = values
        elif (fields := fields_of(value, kind, self._settings._max_attributes + 1)) is not None:
            self.mapping(fields, path + ".", rule, depth)
        else:
            self.out[path] = type_name(value)

    def _string(self, text: str, path: str, rule: Rule) -> None:
        settings = self._settings
        if rule is _KEEP:
            kept = _UNSTORABLE.sub("\ufffd", text[: settings._max_text])
            self.out[path] = kept + "…" if len(text) > settings._max_text else kept
        elif rule is _HASH:
            self.out[path + ".hash"] = settings._digest(text)
        elif text == REDACTED or (rule is not _TEXT and self._stays(text, rule)):
            self.out[path] = text
        else:
            self._text(text, path + ".")

    def _text(self, text: str, prefix: str) -> None:
        self.out[prefix + "length"] = len(text)
        if self._settings._hash_key is not None:
            self.out[prefix + "hash"] = self._settings._digest(text)

    def _stays(self, text: str, rule: Rule) -> bool:
        if self._settings._strict:
            return False
        if TOKEN.fullmatch(text) is None:
            return _TIMESTAMP.fullmatch(text) is not None
        return not looks_like_credential(text, is_id=rule is _ID)

    def _described(self, items: Any, prefix: str, rule: Rule, depth: int) -> list[Any] | None:
        """Return a small collection of like scalars as a list; describe any other one by attributes."""
        limit = self._settings._max_items
        count = len(items)
        head = list(islice(iterate(items), limit))
        if 0 < count <= limit and rule is not _TEXT and all(map(is_scalar, head)):
            like = self._alike([(item, rule) for item in head], depth)
            if like is not None:
                suffix, values = like
                if issubclass(type(items), (set, frozenset)):
                    values.sort()
                if not suffix:
                    return values
                self.out[prefix + suffix] = values
        else:
            like = self._alike(self._ids(head, rule), depth)
            # Ids that turn out to be text say less than they would cost.
            if like is not None:
                suffix, values = like
                self.out[f"{prefix}ids.{suffix}" if suffix else prefix + "ids"] = values
        self.out[prefix + "count"] = count
        return None

    def _alike(self, items: list[tuple[object, Rule]], depth: int) -> tuple[str, list[Any]] | None:
        """Return what is stored of some scalars, if they fit into one list, as an attribute's values are of one type.

        Returns:
            How their key ends (``hash``, or nothing where they stay as they are), and the list.
        """
        walk = _Walk(self._settings, self._action)
        for position, (item, rule) in enumerate(items):
            walk._value(item, str(position), rule, depth + 1)
        values = list(walk.out.values())
        suffixes = {path.partition(".")[2] for path in walk.out}
        if len(values) != len(items) or suffixes not in ({""}, {"hash"}):
            return None
        kinds = {type(value) for value in values}
        if kinds == {int, float}:
            values = [float(value) for value in values]
        return (suffixes.pop(), values) if len(kinds) == 1 or kinds == {int, float} else None

    def _ids(self, items: list[object], outer: Rule) -> list[tuple[object, Rule]]:
        ids = []
        for item in items:
            if (found := id_of(item)) is not None:
                key, id = found
                rule = (self._known.get(key) or self._learn(key, 0))[1]
                if rule is not _DROP:
                    ids.append((id, inherited(outer, rule)))
        return ids

    def _learn(self, raw_key: object, position: int) -> tuple[str, Rule]:
        """Return how a key is written, and its rule. A key may itself be a text or a secret: then its position is."""
        kind = type(raw_key)
        try:
            scalar = raw_key if kind is str else as_scalar(raw_key, kind)
        except Exception:  # a key of a class that breaks Python's own protocols
            scalar = OMITTED
        if type(scalar) is not str:
            return (str(scalar), _PLAIN) if type(scalar) in (int, bool) else (f"#{position}", _PLAIN)
        if _OWN_KEY.fullmatch(scalar):
            return scalar, _PLAIN
        rule = self._settings._decide(scalar[:128], self._action)
        if not TOKEN.fullmatch(scalar) or looks_like_credential(scalar, is_id=False):
            # Where the keys are data, such as questions, the values are too.
            return f"#{position}", _TEXT if rule is _PLAIN else rule
        if kind is str:
            self._known[scalar] = (escape(scalar), rule)
        return escape(scalar), rule


def _keys(argument: str, keys: Collection[str]) -> frozenset[str]:
    if isinstance(keys, str) or not isinstance(keys, Collection) or not all(isinstance(key, str) for key in keys):
        raise ConfigurationError(
            argument, f"got {keys!r}; accepted is a list of keys, such as ['query', 'recall:tags']"
        )
    return frozenset(keys)
