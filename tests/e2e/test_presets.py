"""The presets on what real libraries emit, at any sampling rate, on a real Postgres: the same rows, and no text."""

import importlib
from collections import Counter

import psycopg
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from psycopg.rows import dict_row

from astrocyte_otel_audit import configure_audit

#: Whatever the emitters say, ask for, or are told in words.
TEXTS = ("Calvin likes", "dark roast", "coffee", "Answer in one sentence", "broken by", "refused:", "ask otherwise")
RATIOS = (0.0, 0.1, 1.0)


@pytest.fixture(scope="module")
def rows(module_database):
    """The rows of an emitter and some presets, by sampling rate, the oldest first; each is run once."""
    known = {}

    def of(emitter, *presets):
        if emitter == "hindsight":
            pytest.importorskip("hindsight_api", reason="runs with make test-hindsight")
        if (emitter, presets) not in known:
            known[emitter, presets] = {ratio: _run(module_database, emitter, presets, ratio) for ratio in RATIOS}
        return known[emitter, presets]

    return of


def _run(dsn, emitter, presets, ratio):
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(ratio)), shutdown_on_exit=False)
    processor = configure_audit(dsn=dsn, actions="*", mappings=presets, tracer_provider=provider, migrate=True)
    importlib.import_module(f"tests.emitters.{emitter}").emit(provider)
    assert processor.force_flush(30_000)
    provider.shutdown()
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        found = connection.execute("SELECT * FROM astrocyte_audit_log ORDER BY started_at, ended_at").fetchall()
        connection.execute("TRUNCATE astrocyte_audit_log")
    return found


def counted(rows, *columns):
    return Counter(tuple(row[column] for column in columns) for row in rows)


EMITTERS = [
    ("astrocyte", "astrocyte"),
    ("genai_openai", "gen_ai"),
    ("traceloop_openai", "gen_ai"),
    ("pydantic_agent", "gen_ai"),
    ("mcp", "mcp", "gen_ai", "astrocyte"),
    ("hindsight", "hindsight"),
]


@pytest.mark.parametrize("emitted", EMITTERS, ids=lambda emitted: emitted[0])
class TestEveryPreset:
    def test_makes_the_same_rows_at_any_sampling_rate(self, rows, emitted):
        columns = ("action", "outcome", "error_type", "bank_id", "transport", "actor_id")
        never, seldom, always = (counted(found, *columns) for found in rows(*emitted).values())
        assert never == seldom == always
        assert never

    def test_stores_no_text(self, rows, emitted):
        for row in rows(*emitted)[1.0]:
            assert [text for text in TEXTS if text in str(row)] == []


class TestAstrocyte:
    def test_has_a_row_for_each_of_its_operations(self, rows):
        found = rows("astrocyte", "astrocyte")[0.0]
        actions = {"retain", "recall", "reflect", "forget", "sync_push", "proxy_recall", "compile"}
        assert {row["action"] for row in found} == actions

    def test_says_of_several_banks_how_many(self, rows):
        several = [row for row in rows("astrocyte", "astrocyte")[0.0] if row["bank_id"] == "bank-1+1"]
        assert {row["metadata"]["bank_count"] for row in several} == {2}


class TestGenAI:
    @pytest.mark.parametrize("emitter", ["genai_openai", "traceloop_openai"])
    def test_a_chat_has_its_model_and_its_tokens_and_no_messages(self, rows, emitter):
        first = rows(emitter, "gen_ai")[0.0][0]
        assert (first["action"], first["outcome"]) == ("chat", "success")
        assert first["request"]["model"] == "gpt-4o-mini"
        assert first["request"]["provider"] == "openai"
        response = first["response"]
        assert response.pop("id").startswith("chatcmpl-")
        assert response == {
            "model": "gpt-4o-mini", "finish_reasons": ["stop"], "input_tokens": 12, "output_tokens": 5,
        }  # fmt: skip

    @pytest.mark.parametrize("emitter", ["genai_openai", "traceloop_openai"])
    def test_embeddings_are_an_action_of_their_own(self, rows, emitter):
        [stored] = [
            row for row in rows(emitter, "gen_ai")[0.0] if row["action"] == "embeddings" and not row["error_type"]
        ]
        assert (stored["request"]["model"], stored["response"]["input_tokens"]) == ("text-embedding-3-small", 4)

    def test_errors_and_cancellations_are_failures(self, rows):
        failures = [row["error_type"] for row in rows("genai_openai", "gen_ai")[0.0] if row["outcome"] == "failure"]
        assert {
            "openai.InternalServerError", "openai.RateLimitError", "openai.APIConnectionError",
            "asyncio.exceptions.CancelledError",
        } <= set(failures)  # fmt: skip

    def test_an_agent_its_model_and_its_tools_are_rows_of_one_trace(self, rows):
        found = rows("pydantic_agent", "gen_ai")[0.0]
        agent = found[0]
        assert (agent["action"], agent["metadata"]["agent"]) == ("invoke_agent", "librarian")
        inside = [row for row in found if row["parent_span_id"] == agent["span_id"]]
        assert [row["action"] for row in inside] == ["chat", "execute_tool", "chat"]
        assert inside[1]["request"]["tool"] == "recall"


class TestMCP:
    def test_a_call_is_one_row_though_three_spans_tell_of_it(self, rows):
        found = rows("mcp", "mcp", "gen_ai", "astrocyte")[0.0]
        answered = [row for row in found if row["action"] == "tool.answer"]
        assert [(row["outcome"], row["transport"]) for row in answered] == [("success", "mcp")]

    def test_what_fails_is_a_failure_and_what_was_turned_away_is_not_known(self, rows):
        found = rows("mcp", "mcp", "gen_ai", "astrocyte")[0.0]
        outcomes = counted(found, "action", "outcome", "error_type")
        assert outcomes["tool.fail", "failure", "tool_error"] == 3  # on fastmcp, and twice on the official SDK
        assert outcomes["tool.refuse", "failure", "tool_error"] == 2
        assert outcomes["tool", "unknown", None] == 1

    def test_an_operation_that_a_tool_does_has_the_tools_transport(self, rows):
        found = rows("mcp", "mcp", "gen_ai", "astrocyte")[0.0]
        by_span = {row["span_id"]: row for row in found}
        inside = [row for row in found if row["action"] in ("retain", "recall", "reflect")]
        assert len(inside) == 4
        for row in inside:
            assert row["transport"] == "mcp"
            assert by_span[row["parent_span_id"]]["action"] == f"tool.memory_{row['action']}"

    def test_no_other_method_is_a_tool(self, rows):
        found = rows("mcp", "mcp", "gen_ai", "astrocyte")[0.0]
        assert {row["action"] for row in found if "tool" in row["action"]} == {
            "tool", "tool.answer", "tool.fail", "tool.memory_recall", "tool.memory_reflect", "tool.memory_retain",
            "tool.no-such-tool", "tool.recall", "tool.refuse", "tool.wait",
        }  # fmt: skip


class TestHindsight:
    def test_has_one_row_for_a_request_whatever_it_does_inside(self, rows):
        found = [row for row in rows("hindsight", "hindsight")[0.0] if row["transport"] == "http"]
        assert counted(found, "action", "outcome", "error_type") == {
            ("retain", "success", None): 2,
            ("recall", "success", None): 2,
            ("reflect", "success", None): 1,
            ("recall", "failure", "401"): 1,
            ("recall", "failure", "422"): 1,
            ("retain", "failure", "422"): 1,
            ("recall", "failure", None): 1,
            ("retain", "failure", "Exception"): 1,
            ("recall", "failure", "499"): 1,
        }
        assert {row["bank_id"] for row in found} == {"bank-1"}

    def test_says_how_much_was_asked_for_and_not_what(self, rows):
        recalled = [row for row in rows("hindsight", "hindsight")[0.0] if row["action"] == "recall"]
        assert recalled[0]["request"] == {"max_tokens": 4096, "thinking_budget": 300}

    def test_does_not_claim_to_know_how_it_ended_where_nobody_says_it(self, rows):
        others = [row for row in rows("hindsight", "hindsight")[0.0] if row["transport"] != "http"]
        assert {row["outcome"] for row in others} == {"unknown"}
        assert counted(others, "action", "transport") == {
            ("retain", "unknown"): 1,
            ("consolidation_recall", "unknown"): 8,
            ("consolidation", "unknown"): 1,
            ("recall", "mcp"): 1,
            ("recall", "unknown"): 1,
        }
