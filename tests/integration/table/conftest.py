"""One database a module, emptied for each test: a fresh one each would cost these many tests most of their time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from astrocyte_otel_audit.postgres import OwnConnection
from tests.servers import emptied_and_migrated


@pytest.fixture
def database(module_database: str) -> str:
    """DSN of the module's database, with a migrated table and nothing else."""
    return emptied_and_migrated(module_database)


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    """A superuser's connection, for looking on and for getting in the way."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def opened(database: str) -> Iterator[Callable[..., Any]]:
    """Opens what reads or changes the log, and closes it in the end."""
    made: list[Any] = []

    def open_(kind: Callable[..., Any], dsn: str = database, **arguments: Any) -> Any:
        made.append(kind(OwnConnection(dsn), **arguments))
        return made[-1]

    yield open_
    for each in made:
        each.close()
