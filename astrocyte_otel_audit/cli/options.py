"""What the commands share: their options, the way to the table, and how they speak."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, NamedTuple, NoReturn, TypeVar

import typer
from rich.console import Console, RenderableType

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.embedded import SCHEME, embedded_postgres
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.postgres import AuditReader, OwnConnection
from astrocyte_otel_audit.view.records import as_json

#: Exit codes beside 0; a usage error is 2, as everywhere.
NOT_FOUND, WRONG_USAGE, UNAVAILABLE = 1, 2, 3
#: A person has said no.
NOT_DONE = 1

_Log = TypeVar("_Log", bound=AuditReader)
_Row = TypeVar("_Row", bound=NamedTuple)

Dsn = Annotated[
    str | None,
    typer.Option(
        envvar=settings.PREFIX + "DSN",
        show_envvar=True,
        metavar="DSN",
        help="Connection string: postgresql://…, key=value pairs, or embedded:DIR for a server of one's own on a "
        "directory (embedded: alone is the demo's).",
    ),
]
Schema = Annotated[str, typer.Option(envvar=settings.PREFIX + "SCHEMA", help="Schema of the tenant.")]
TableName = Annotated[str, typer.Option("--table", envvar=settings.PREFIX + "TABLE", help="Name of the table.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for other programs.")]


@contextmanager
def database(dsn: str | None) -> Iterator[str]:
    """Give the connection string that a person has named, running an embedded server for as long as it is used."""
    if dsn is None:
        raise ConfigurationError("--dsn", f"no database named; give --dsn or set {settings.PREFIX}DSN")
    if not dsn.startswith(SCHEME):
        yield dsn
        return
    directory = dsn.removeprefix(SCHEME)
    with embedded_postgres(Path(directory) if directory else None) as running:
        yield running


@contextmanager
def opened(kind: type[_Log], dsn: str | None, schema: str, table: str) -> Iterator[_Log]:
    """Give the log that a person has named, as what reads or changes it, closed afterwards."""
    schema = settings.SETTINGS["schema"].accept(schema, "--schema")
    table = settings.SETTINGS["table"].accept(table, "--table")
    with ExitStack() as stack:
        log = kind(OwnConnection(stack.enter_context(database(dsn))), schema=schema, table=table)
        stack.callback(log.close)
        yield log


_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def instant(text: str | None, option: str) -> datetime | None:
    """Return the instant that an option names, or None where it isn't given.

    Raises:
        ConfigurationError: a text that names none.
    """
    if text is None:
        return None
    try:
        if ago := re.fullmatch(r"(\d+)([smhdw])", text):
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ConfigurationError(option, f"got {text!r}; accepted is 2026-01-31T12:00, or 24h or 7d for ago") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def new_console() -> Console:
    """Return a console for output."""
    # A pipe has no width of its own: rich would take 80 columns and fold what another program reads by lines.
    return Console() if sys.stdout.isatty() else Console(width=200)


def show_found(
    found: Sequence[_Row], as_table: Callable[[Sequence[_Row]], RenderableType], nothing: str, *, json: bool
) -> None:
    """Show what was found: a line of JSON each, or as a table; where there is nothing, that is said."""
    if json:
        for row in found:
            print(as_json(row))
    elif found:
        new_console().print(as_table(found))
    else:
        say(nothing)


def say(remark: str) -> None:
    """Say something about the output, where it isn't taken for output."""
    Console(stderr=True).print(remark, highlight=False, markup=False, soft_wrap=True)


def fail(message: str, code: int) -> NoReturn:
    """End with one line on standard error and an exit code."""
    say(f"error: {message}")
    sys.exit(code)
