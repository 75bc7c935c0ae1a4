"""From records to the arrays that the append statement takes, with everything in them made storable."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Final

import orjson

from astrocyte_otel_audit.record import AuditRecord
from astrocyte_otel_audit.storable import MAX_TEXT, OPTIONS, encode, encode_payload

#: What Postgres or UTF-8 can't hold: NUL and lone surrogates.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
#: Columns of the append statement.
COLUMNS: Final = 18


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
    return "{" + orjson.dumps(values, option=OPTIONS).decode()[1:-1] + "}"


def _texts(values: Sequence[str | None]) -> str:
    present = [value for value in values if value is not None]
    whole = "".join(present)
    if whole.isascii() and whole.isprintable() and len(max(present, key=len, default="")) <= MAX_TEXT:
        return _array(values)
    mended = ("NULL" if value is None else _quoted(text(value)) for value in values)
    return "{" + ",".join(mended) + "}"


def _quoted(value: str) -> str:
    # A control character stands in an array literal as it is, where JSON would escape it.
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def text(value: str) -> str:
    """Return a text as a column takes it: cut, NUL and lone surrogates replaced."""
    return _UNSTORABLE.sub("\ufffd", value[:MAX_TEXT])


def _payloads(values: Sequence[dict[str, Any] | None]) -> str:
    return _array([encode_payload(value).decode() if value else None if value is None else "{}" for value in values])


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


def side_row(record: AuditRecord, reason: str, sqlstate: str | None) -> tuple[str | None, ...]:
    """Return the row of the side table for a record that its table refuses. It takes whatever a record may hold.

    The record is JSON in ASCII, since what is refused may be a character that the database's encoding doesn't know.
    A record whose id is no UUID gets one that is made from it.
    """
    whole = json.dumps(orjson.loads(encode(record._asdict())))
    action = record.action if isinstance(record.action, str) else type(record.action).__name__
    try:
        row_id = uuid.UUID(record.id)
    except Exception:  # whatever its type is
        row_id = uuid.uuid5(uuid.NAMESPACE_OID, whole)
    return str(row_id), text(action).encode("ascii", "replace").decode(), reason, sqlstate, whole
