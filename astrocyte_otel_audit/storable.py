"""From whatever a record may hold to JSON that a spool keeps and jsonb takes. Never raises."""

from __future__ import annotations

import enum
from typing import Any, Final

import orjson

#: A payload bigger than this is described instead of stored: jsonb and its readers both suffer from giants.
MAX_PAYLOAD_BYTES: Final = 256 * 1024
#: Characters in a text column. An index entry may have 2,704 bytes, and a character up to four.
MAX_TEXT: Final = 512
#: Containers in one another, where a payload has to be mended; orjson itself allows 254.
_MAX_DEPTH = 32
OPTIONS: Final = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_NAIVE_UTC
#: An escaped NUL, the one thing that is valid JSON and no jsonb.
_NUL = b"\\u0000"


def encode(payload: Any) -> bytes:
    """Return a payload as JSON in UTF-8, without a NUL.

    NaN and infinities become null, NUL and lone surrogates U+FFFD, and what is no JSON the name of its type.
    """
    try:
        encoded = orjson.dumps(payload, default=_described, option=OPTIONS)
        if _NUL not in encoded:
            return encoded
    except (orjson.JSONEncodeError, RecursionError):
        pass  # what orjson can't do is mended below, as is what it does and jsonb can't
    return orjson.dumps(_storable(payload), default=_described, option=OPTIONS)


def encode_payload(payload: Any) -> bytes:
    """Return a payload as `encode` does, and a giant as a description of its size."""
    encoded = encode(payload)
    if len(encoded) <= MAX_PAYLOAD_BYTES:
        return encoded
    return orjson.dumps({"[truncated]": True, "bytes": len(encoded)})


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
        orjson.dumps(value, default=_described, option=OPTIONS)
    except Exception:  # a time zone that orjson doesn't know, say
        return type(value).__name__
    return value


def _key(key: Any) -> str:
    try:
        return str(_storable(str(key)))
    except Exception:  # a number of too many digits, or a hostile __str__
        return type(key).__name__
