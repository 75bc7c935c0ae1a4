"""What `migrate --partition-by` does and says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast, get_args

import psycopg

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.cli.options import UNAVAILABLE, database, fail
from astrocyte_otel_audit.postgres import OwnConnection
from astrocyte_otel_audit.postgres.conversion import convert, plan
from astrocyte_otel_audit.postgres.layout import Unit
from astrocyte_otel_audit.view.inert import inert
from astrocyte_otel_audit.view.storage import size


def unit_of(given: str) -> Unit:
    """Return how long a partition shall be.

    Raises:
        ConfigurationError: what isn't a unit.
    """
    return cast("Unit", settings.one_of(*get_args(Unit))(given, "--partition-by"))


def show_plan(dsn: str | None, schema: str, table: str, unit: Unit) -> None:
    """Say what `partition` would do, and who would wait how long. Ends with an error where it would do nothing."""
    with _connection(dsn, schema, table) as connection:
        found = plan(connection, schema, table, unit)
    name = f"{schema}.{table}"
    if found.is_partitioned:
        print(f"{name} is partitioned already")
        return
    if found.obstacles:
        fail(inert(f"{name} can't be partitioned: {'; '.join(found.obstacles)}"), UNAVAILABLE)
    print(f"{name} has about {found.rows:,} rows, in {size(found.bytes)}")
    for number, step in enumerate(found.steps, 1):
        print(inert(f"{number}. {step.does}; who waits: {step.waits}"))
    print("nothing was done; leave out --dry-run to do it")


def partition(dsn: str | None, schema: str, table: str, unit: Unit) -> None:
    """Make the table a partitioned one, and say each step as it is done."""
    with _connection(dsn, schema, table) as connection:
        steps = convert(connection, schema, table, unit, progress=lambda step: print(inert(step), flush=True))
    print(f"{schema}.{table} is partitioned by the {unit}" if steps else f"{schema}.{table} was partitioned before")


@contextmanager
def _connection(dsn: str | None, schema: str, table: str) -> Iterator[psycopg.Connection[Any]]:
    settings.SETTINGS["schema"].accept(schema, "--schema")
    settings.SETTINGS["table"].accept(table, "--table")
    with ExitStack() as stack:
        connections = OwnConnection(stack.enter_context(database(dsn)))
        stack.callback(connections.close)
        yield stack.enter_context(connections.connection())
