"""From records to the arrays that the append statement takes, with everything in them made storable."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import orjson

from astrocyte_otel_audit.record import AuditRecord

#: A payload bigger than this is described instead of stored: jsonb and its readers both suffer from giants.
_MAX_JSON_BYTES = 256 * 1024
#: Characters in a text column. An index entry may have 2,704 bytes, and a character up to four.
_MAX_TEXT = 512
#: What Postgres or UTF-8 can't hold: NUL and lone surrogates.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_TEXT_COLUMNS = frozenset(map(AuditRecord._fields.index, (
    "action", "transport", "bank_id", "error_type", "actor_id", "actor_type", "trace_id", "span_id", "parent_span_id",
    "service_name",
)))  # fmt: skip
_JSON_COLUMNS = frozenset(map(AuditRecord._fields.index, ("request", "response", "metadata")))
_ORJSON = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS
#: An escaped NUL, the one thing that is valid JSON and no jsonb.
_NUL = b"\\u0000"


def columns(records: Sequence[AuditRecord]) -> list[list[Any]]:
    """Return one list a column of the append statement, in its order."""
    if not records:
        return [[] for _ in range(18)]
    given = list(zip(*records, strict=True))
    return [
        _texts(values) if column in _TEXT_COLUMNS
        else [None if value is None else json_text(value) for value in values] if column in _JSON_COLUMNS
        else list(values)
        for column, values in enumerate(given[:18])
    ]  # fmt: skip


def _texts(values: Sequence[str | None]) -> list[str | None]:
    return [
        value
        if value is None or (len(value) <= _MAX_TEXT and value.isascii() and "\x00" not in value)
        else _UNSTORABLE.sub("\ufffd", value[:_MAX_TEXT])
        for value in values
    ]


def json_text(payload: Any) -> str:
    """Return a payload as JSON that jsonb takes; never raises.

    NaN and infinities become null, NUL and lone surrogates U+FFFD, what is no JSON the name of its type, and a
    giant its size.
    """
    encoded = _encoded(payload)
    if len(encoded) > _MAX_JSON_BYTES:
        return orjson.dumps({"[truncated]": True, "bytes": len(encoded)}).decode()
    return encoded.decode()


def record_text(record: AuditRecord) -> str:
    """Return a whole record as JSON, for the side table and for a person."""
    return _encoded(record._asdict()).decode()


def _encoded(payload: Any) -> bytes:
    try:
        encoded = orjson.dumps(payload, default=_described, option=_ORJSON)
    except (orjson.JSONEncodeError, RecursionError):
        encoded = _NUL
    return orjson.dumps(_storable(payload, 0), default=_described, option=_ORJSON) if _NUL in encoded else encoded


def _described(value: object) -> Any:
    return {"length": len(value)} if isinstance(value, (bytes, bytearray, memoryview)) else type(value).__name__


def _storable(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, bool) or value is None or isinstance(value, float):
        return value
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 64 else float(value) if value.bit_length() < 1000 else "int"
    if depth >= 32:
        return type(value).__name__
    if isinstance(value, dict):
        return {_storable(str(key), 0): _storable(member, depth + 1) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(member, depth + 1) for member in value]
    return value
