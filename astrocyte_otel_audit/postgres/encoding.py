"""From records to the arrays that the append statement takes, with everything in them made storable."""

from __future__ import annotations

import enum
import json
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Final

import orjson

from astrocyte_otel_audit.record import AuditRecord

#: A payload bigger than this is described instead of stored: jsonb and its readers both suffer from giants.
_MAX_JSON_BYTES = 256 * 1024
#: Characters in a text column. An index entry may have 2,704 bytes, and a character up to four.
_MAX_TEXT = 512
#: What Postgres or UTF-8 can't hold: NUL and lone surrogates.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
#: Containers in one another, where a payload has to be mended; orjson itself allows 254.
_MAX_DEPTH = 32
#: Columns of the append statement.
COLUMNS: Final = 18
_ORJSON = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_NAIVE_UTC
#: An escaped NUL, the one thing that is valid JSON and no jsonb.
_NUL = b"\\u0000"


def columns(records: Sequence[AuditRecord]) -> list[str]:
    """Return one array literal a column of the append statement, in its order.

    psycopg would render lists of values itself, element by element in Python, at ten times the cost of the rest of
    the way. Each literal is still bound as one value.
    """
    if not records:
        return ["{}"] * COLUMNS
    return [render(values) for render, values in zip(_RENDER, zip(*records, strict=True), strict=False)]


def _array(values: Sequence[Any]) -> str:
    """Render a column without control characters: JSON quotes as an array literal does, in C, for all rows at once."""
    return "{" + orjson.dumps(values, option=_ORJSON).decode()[1:-1] + "}"


def _texts(values: Sequence[str | None]) -> str:
    present = [value for value in values if value is not None]
    whole = "".join(present)
    if whole.isascii() and whole.isprintable() and len(max(present, key=len, default="")) <= _MAX_TEXT:
        return _array(values)
    mended = ("NULL" if value is None else _quoted(text(value)) for value in values)
    return "{" + ",".join(mended) + "}"


def _quoted(value: str) -> str:
    # A control character stands in an array literal as it is, where JSON would escape it.
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def text(value: str) -> str:
    """Return a text as a column takes it: cut, NUL and lone surrogates replaced."""
    return _UNSTORABLE.sub("\ufffd", value[:_MAX_TEXT])


def _payloads(values: Sequence[dict[str, Any] | None]) -> str:
    return _array([json_text(value) if value else None if value is None else "{}" for value in values])


_RENDERERS: dict[str, Callable[[Sequence[Any]], str]] = {
    # A naive datetime is taken as UTC, as `ns_from_datetime` does.
    "started_at": _array,
    "ended_at": _array,
    "request": _payloads,
    "response": _payloads,
    "metadata": _payloads,
    "sampled": _array,
}
#: How each column of the append statement is rendered: those of a record but `recorded_at` and `schema`.
_RENDER: Final = tuple(_RENDERERS.get(name, _texts) for name in AuditRecord._fields[:COLUMNS])


def json_text(payload: Any) -> str:
    """Return a payload as JSON that jsonb takes; never raises.

    NaN and infinities become null, NUL and lone surrogates U+FFFD, what is no JSON the name of its type, and a
    giant its size.
    """
    encoded = _encode(payload)
    if len(encoded) > _MAX_JSON_BYTES:
        return orjson.dumps({"[truncated]": True, "bytes": len(encoded)}).decode()
    return encoded.decode()


def side_row(record: AuditRecord, reason: str, sqlstate: str | None) -> tuple[str | None, ...]:
    """Return the row of the side table for a record that its table refuses. It takes whatever a record may hold.

    The record is JSON in ASCII, since what is refused may be a character that the database's encoding doesn't know.
    A record whose id is no UUID gets one that is made from it.
    """
    whole = json.dumps(orjson.loads(_encode(record._asdict())))
    action = record.action if isinstance(record.action, str) else type(record.action).__name__
    try:
        row_id = uuid.UUID(record.id)
    except Exception:  # whatever its type is
        row_id = uuid.uuid5(uuid.NAMESPACE_OID, whole)
    return str(row_id), text(action).encode("ascii", "replace").decode(), reason, sqlstate, whole


def _encode(payload: Any) -> bytes:
    try:
        encoded = orjson.dumps(payload, default=_described, option=_ORJSON)
        if _NUL not in encoded:
            return encoded
    except (orjson.JSONEncodeError, RecursionError):
        pass  # what orjson can't do is mended below, as is what it does and jsonb can't
    return orjson.dumps(_storable(payload), default=_described, option=_ORJSON)


def _described(value: object) -> Any:
    return {"length": len(value)} if isinstance(value, (bytes, bytearray, memoryview)) else type(value).__name__


def _storable(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Return what is left of a value; ``above`` are the ids of the containers it is in, so that a cycle ends."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, bool) or value is None or isinstance(value, float):
        return value
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 64 else float(value) if value.bit_length() < 1000 else "int"
    if len(above) >= _MAX_DEPTH or id(value) in above:
        return type(value).__name__
    inside = (*above, id(value))
    if isinstance(value, dict):
        return {_key(key): _storable(member, inside) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(member, inside) for member in value]
    try:
        orjson.dumps(value, default=_described, option=_ORJSON)
    except Exception:  # a time zone that orjson doesn't know, say
        return type(value).__name__
    return value


def _key(key: Any) -> str:
    try:
        return str(_storable(str(key)))
    except Exception:  # a number of too many digits, or a hostile __str__
        return type(key).__name__
