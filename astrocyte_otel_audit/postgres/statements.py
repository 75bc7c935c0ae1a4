"""The SQL files, with the names of a schema's tables filled in, quoted."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources

from psycopg import sql

_FILES = resources.files("astrocyte_otel_audit.postgres") / "sql"


@lru_cache(maxsize=1024)
def statement(name: str, schema: str, table: str, **names: str) -> sql.Composed:
    """Return the statement of ``sql/<name>.sql`` for one schema's table.

    Args:
        name: of the file.
        schema, table: whose names are filled in.
        names: others that it is about, such as a role's ``writer``: ``{writer}`` is that as an identifier, and
            ``{writer_name}`` as a text.
    """
    return sql.SQL(_text(name)).format(**_names(schema, table), **_both(names))


def migrations() -> list[tuple[int, str]]:
    """Return version and name of every migration, in order."""
    names = sorted(entry.name for entry in (_FILES / "migrations").iterdir() if entry.name.endswith(".sql"))
    return [(int(name[:3]), f"migrations/{name.removesuffix('.sql')}") for name in names]


@lru_cache
def _text(name: str) -> str:
    # A comment's % or { would be taken for a placeholder, and the server needs no comments.
    lines = (_FILES / f"{name}.sql").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("--"))


def _names(schema: str, table: str) -> dict[str, sql.Composable]:
    names: dict[str, sql.Composable] = {"schema": sql.Identifier(schema), "schema_name": sql.Literal(schema)}
    for relation in ("log", "set_aside", "migrations", "holds"):
        names[relation] = sql.Identifier(schema, table if relation == "log" else f"{table}_{relation}")
        # The same as a text, for functions that look it up.
        names[f"{relation}_name"] = sql.Literal(names[relation].as_string(None))
    # An index lives in its table's schema; for the default table the names are upstream's own.
    for index in ("bank_started_idx", "action_started_idx", "started_idx", "trace_idx", "recorded_idx"):
        names[index] = sql.Identifier(f"{table}_{index}")
    # What several statements share.
    for part in ("override", "fits", "kept", "due"):
        names[part] = sql.SQL(_text(f"retention/{part}")).format(**names)
    return names


def _both(names: dict[str, str]) -> dict[str, sql.Composable]:
    filled: dict[str, sql.Composable] = {key: sql.Identifier(name) for key, name in names.items()}
    return filled | {f"{key}_name": sql.Literal(name) for key, name in names.items()}
