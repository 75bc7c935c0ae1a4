"""A real Astrocyte, sampled at 0, 10 and 100 %, on a real Postgres: every operation is one row."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from astrocyte_otel_audit import AuditRecord
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection

PROGRAM = Path(__file__).with_name("astrocyte_program.py")
TEXT = "Calvin likes dark roast coffee"
DENIED = "astrocyte.errors.AccessDenied"

_numbers = count()


def _rows(server_dsn: str, template: str, ratio: float) -> list[AuditRecord]:
    """What the program leaves in a database of its own, oldest operation first."""
    name = f"audit_astrocyte_{os.getpid()}_{next(_numbers)}"
    dsn = make_conninfo(server_dsn, dbname=name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
        )
        try:
            finished = subprocess.run(
                [sys.executable, "-W", "error", str(PROGRAM), dsn, str(ratio)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
            table = AuditTable(OwnConnection(dsn))
            records = table.search(limit=1000).records
            table.close()
            return records[::-1]
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="module")
def rows_by_ratio(server_dsn: str, template_database: str) -> dict[float, list[AuditRecord]]:
    return {ratio: _rows(server_dsn, template_database, ratio) for ratio in (0.0, 0.1, 1.0)}


@pytest.fixture
def rows(rows_by_ratio: dict[float, list[AuditRecord]]) -> list[AuditRecord]:
    """All rows of a program that samples one trace in ten."""
    return rows_by_ratio[0.1]


@pytest.fixture
def plain(rows: list[AuditRecord]) -> list[AuditRecord]:
    """The rows of Astrocyte's own spans."""
    return [row for row in rows if row.transport == "bench"]


@pytest.fixture
def decorated(rows: list[AuditRecord]) -> list[AuditRecord]:
    """The rows of decorated functions around Astrocyte."""
    return [row for row in rows if row.transport == "http"]


class TestAstrocyteAlone:
    def test_has_one_row_for_every_operation(self, plain):
        assert [(row.action, row.bank_id, row.outcome, row.error_type) for row in plain] == [
            ("retain", "bank-1", "success", None),
            ("retain", "bank-2", "success", None),
            # Refused in Astrocyte's answer only: its span ends like that of any other retain.
            ("retain", "rejected", "success", None),
            ("recall", "bank-1", "success", None),
            # Several banks are the first one and the number of the others, as Astrocyte writes them.
            ("recall", "bank-1+1", "success", None),
            ("reflect", "bank-1", "success", None),
            ("retain", "denied", "failure", DENIED),
            ("recall", "denied", "failure", DENIED),
            ("forget", "denied", "failure", DENIED),
            ("retain", "crowded", "success", None),
            ("retain", "crowded", "failure", "astrocyte.errors.RateLimited"),
            ("forget", "bank-1", "success", None),
        ]

    def test_says_who_acted_and_where_to_find_the_trace(self, plain):
        for row in plain:
            assert (row.actor_id, row.actor_type, row.service_name) == ("user:ann", "user", "memory")
            assert (len(row.trace_id), len(row.span_id), row.parent_span_id) == (32, 16, None)
            assert row.ended_at >= row.started_at
        assert len({row.trace_id for row in plain}) == len(plain)


class TestADecoratedFunctionAroundAstrocyte:
    def test_is_one_row_with_what_both_have_to_say(self, decorated):
        row = decorated[0]
        assert (row.action, row.bank_id, row.outcome) == ("recall", "bank-2", "success")
        assert row.request == {"query": {"length": len("coffee")}, "context": {"principal": "user:ann"}}
        assert row.response == {"memories": 1}
        assert row.metadata == {"hits": 1, "bank_count": 1}, "a hook has put it on Astrocyte's own span"
        assert [other for other in decorated if other.parent_span_id == row.span_id] == []

    def test_is_one_row_where_it_is_denied(self, decorated):
        row = decorated[1]
        assert (row.action, row.bank_id, row.outcome, row.error_type) == ("recall", "denied", "failure", DENIED)
        assert row.request["context"] == {"principal": "user:eve"}
        assert row.response is None

    def test_shows_that_a_retain_was_rejected(self, decorated):
        row = decorated[2]
        assert (row.action, row.bank_id) == ("retain", "rejected")
        assert row.response["stored"] is False

    def test_of_another_action_is_a_row_of_its_own(self, decorated):
        outer, inner = decorated[3:]
        assert (outer.action, outer.bank_id, outer.parent_span_id) == ("answer", "answered", None)
        assert (inner.action, inner.bank_id, inner.metadata) == ("recall", "bank-2", {"hits": 1, "bank_count": 1})
        assert (inner.trace_id, inner.parent_span_id) == (outer.trace_id, outer.span_id)


class TestSampling:
    def test_makes_no_difference_to_the_rows(self, rows_by_ratio):
        def comparable(row: AuditRecord) -> tuple[object, ...]:
            names = row.request, row.metadata, sorted(row.response or ())
            return row[1:4], row.outcome, row.error_type, row.actor_id, row.actor_type, row.service_name, names

        contents = {ratio: [comparable(row) for row in rows] for ratio, rows in rows_by_ratio.items()}
        assert contents[0.0] == contents[0.1] == contents[1.0]

    def test_is_what_the_rows_say_of_their_traces(self, rows_by_ratio):
        assert {row.sampled for row in rows_by_ratio[0.0]} == {False}
        assert {row.sampled for row in rows_by_ratio[1.0]} == {True}
        by_trace: dict[str | None, set[bool | None]] = {}
        for row in rows_by_ratio[0.1]:
            by_trace.setdefault(row.trace_id, set()).add(row.sampled)
        assert all(len(sampled) == 1 for sampled in by_trace.values())


def test_no_text_is_stored(rows_by_ratio):
    assert [row for rows in rows_by_ratio.values() for row in rows if TEXT in str(row) or "coffee" in str(row)] == []
