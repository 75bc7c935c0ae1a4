"""An enriched Astrocyte brain, sampled at 0, 10 and 100 %, on a real Postgres: a row a call, with what it answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from astrocyte_otel_audit import AuditRecord
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection

PROGRAM = Path(__file__).with_name("astrocyte_enriched_program.py")
EXAMPLE = Path(__file__).parents[2] / "examples" / "astrocyte_enriched.py"
DENIED = "astrocyte.errors.AccessDenied"
#: Whatever is said, asked for, or a reason that is given.
TEXTS = ("Calvin likes", "coffee", "dark", "a case", "no answer")


def _run(program: Path, *arguments: str, **environment: str) -> str:
    outside = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(program), *arguments],
        env={**outside, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    return finished.stdout


def _rows(dsn: str) -> list[AuditRecord]:
    """The rows, oldest operation first; the table is empty afterwards."""
    table = AuditTable(OwnConnection(dsn))
    records = table.search(limit=1000).records[::-1]
    table.close()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("TRUNCATE astrocyte_audit_log")
    return records


class Run:
    """What the brain answered, and the rows."""

    def __init__(self, dsn: str, ratio: float) -> None:
        self.answers: dict[str, Any] = json.loads(_run(PROGRAM, dsn, str(ratio)))
        self.rows = _rows(dsn)
        *self.alone, self.merged, self.outer, self.inner, _, _ = self.rows
        self.at_once = self.rows[-2:]


@pytest.fixture(scope="module")
def runs(module_database: str) -> dict[float, Run]:
    table = AuditTable(OwnConnection(module_database))
    table.migrate()
    table.close()
    return {ratio: Run(module_database, ratio) for ratio in (0.0, 0.1, 1.0)}


@pytest.fixture(params=[0.0, 1.0])
def run(request: pytest.FixtureRequest, runs: dict[float, Run]) -> Run:
    """One that samples nothing, and one that samples all."""
    return runs[request.param]


def _ids(*found: str) -> dict[str, object]:
    return {"count": len(found), "ids": [*found]}


class TestEveryCall:
    def test_is_one_row(self, run):
        assert [(row.action, row.bank_id, row.outcome, row.error_type) for row in run.alone] == [
            ("retain", "bank-1", "success", None),
            ("retain", "bank-2", "success", None),
            ("retain", "bank-1", "failure", "empty_content"),
            ("recall", "bank-1", "success", None),
            ("recall", "bank-1+1", "success", None),
            ("reflect", "bank-1", "success", None),
            ("reflect", "bank-1+1", "success", None),
            ("forget", "bank-1", "success", None),
            ("retain", "bank-1", "failure", DENIED),
            ("recall", "bank-1+1", "failure", DENIED),
            ("forget", "bank-1", "failure", DENIED),
            ("compile", "bank-1", "failure", DENIED),
            ("retain", "failing", "failure", "ConnectionError"),
            ("forget", "held", "failure", "astrocyte.errors.LegalHoldActive"),
        ]
        assert [(row.action, row.outcome) for row in run.at_once] == [("recall", "success")] * 2
        assert {(row.parent_span_id, row.transport) for row in (*run.alone, *run.at_once)} == {(None, "bench")}

    def test_says_who_called(self, run):
        actors = [(row.actor_id, row.actor_type) for row in run.alone]
        calvin, stranger = ("user:calvin", "user"), ("service:stranger", "service")
        assert actors == [*[calvin] * 4, ("agent:assistant", "service"), *[calvin] * 3, *[stranger] * 4, *[calvin] * 2]
        assert run.alone[4].metadata == {"tenant_id": "acme", "on_behalf_of": "user:calvin", "bank_count": 2}
        assert run.alone[0].metadata == {"tenant_id": "acme"}

    def test_leaves_no_text(self, run):
        assert [text for text in TEXTS if text in str(run.rows)] == []


class TestAnAnswer:
    def test_to_a_retain_says_whether_it_was_stored_and_as_what(self, run):
        first, second, refused, *_ = run.alone
        for row, memory_id in zip((first, second), run.answers["kept"], strict=True):
            assert row.response == {"stored": True, "deduplicated": False, "memory_id": memory_id}
        assert refused.response == {"stored": False, "deduplicated": False}
        assert refused.request == {"content": {"length": 0}, "content_type": "text"}

    def test_to_a_recall_is_the_hits(self, run):
        one, several = run.alone[3:5]
        assert one.response == {"hits": _ids(*run.answers["recalled"]), "total_available": 1, "truncated": False}
        assert several.request["banks"] == ["bank-1", "bank-2"]
        assert several.response["hits"] == _ids(*run.answers["of_both"])
        assert len(run.answers["of_both"]) == 2

    def test_to_a_reflect_is_its_sources(self, run):
        one, several = run.alone[5:7]
        assert one.response["sources"] == _ids(*run.answers["reflected"])
        assert several.response["sources"] == _ids(*run.answers["of_both_reflected"])
        assert several.response["answer"]["length"] > 0

    def test_to_a_forget_is_how_many_were_deleted(self, run):
        row = run.alone[7]
        assert row.request["memory_ids"] == [run.answers["kept"][0], "no-such-memory"]
        assert row.response == {"deleted_count": run.answers["deleted"], "archived_count": 0}

    def test_is_none_where_it_was_denied_or_failed(self, run):
        assert [row.response for row in run.alone if row.error_type not in (None, "empty_content")] == [None] * 6

    def test_to_calls_at_once_is_each_ones_own(self, run):
        rows = {row.bank_id: row for row in run.at_once}
        for bank, found in zip(("bank-1", "bank-2"), run.answers["at_once"], strict=True):
            assert rows[bank].metadata["tenant_id"] == bank
            assert rows[bank].response["hits"].get("ids", []) == found


class TestADecoratedFunctionAroundACall:
    def test_is_one_row_with_it_where_both_name_the_same_actor(self, run):
        row = run.merged
        assert (row.action, row.bank_id, row.parent_span_id) == ("recall", "bank-2", None)
        assert (row.actor_id, row.actor_type) == ("calvin", "user")
        assert row.response["answers"] == row.response["hits"]["count"] == run.answers["decorated"] == 1

    def test_keeps_a_row_of_its_own_where_somebody_else_calls_it(self, run):
        assert (run.outer.actor_id, run.outer.response) == ("gateway", {"answers": 1})
        assert (run.inner.actor_id, run.inner.response["hits"]["count"]) == ("user:calvin", 1)
        assert run.inner.parent_span_id == run.outer.span_id


class TestSampling:
    def test_makes_no_difference_to_the_rows(self, runs):
        def comparable(row: AuditRecord) -> tuple[object, ...]:
            # Ids are drawn anew in each run: those of the answers are compared above.
            shape = {key: value for key, value in (row.response or {}).items() if key != "memory_id"}
            for key in shape.keys() & {"hits", "sources"}:
                shape[key] = shape[key]["count"]
            request = {**(row.request or {}), "memory_ids": None}
            said = row.outcome, row.error_type, row.actor_id, row.actor_type, request, shape, row.metadata
            return row.action, row.transport, row.bank_id, row.parent_span_id is None, said

        never, seldom, always = ([comparable(row) for row in run.rows[:-2]] for run in runs.values())
        assert never == seldom == always
        assert [{row.sampled for row in runs[ratio].rows} for ratio in (0.0, 1.0)] == [{False}, {True}]


def test_the_example_leaves_its_rows(database):
    assert _run(EXAMPLE, OTEL_ASTROCYTE_AUDIT_DSN=database) == "all written: True\n"
    rows = _rows(database)
    assert [(row.action, row.outcome, row.error_type) for row in rows] == [
        ("retain", "success", None),
        ("retain", "failure", "empty_content"),
        ("recall", "success", None),
        ("forget", "success", None),
    ]
    assert {(row.actor_id, row.actor_type, row.metadata["tenant_id"]) for row in rows} == {
        ("user:calvin", "user", "acme")
    }
    memory_id = rows[0].response["memory_id"]
    assert rows[2].response["hits"] == _ids(memory_id)
    assert rows[3].response["deleted_count"] == 1
    assert "dark mode" not in str(rows)
