"""What an audited call costs its caller, against two peers that export nowhere through a stock processor.

One peer is the same decorated call: the ratio is what the pipeline costs. The other is a span written by hand, with
the same name and eight attributes, five when it starts and three when the result is known: the ratio is what it
costs to be audited instead of traced, with binding and normalization. The pipeline is measured without a spool, and
with the default one, which is what surviving a killed process costs. Bursts alternate, so drift of the machine
hits all alike. The thread's own CPU time is counted: what other threads do to the clock on a small machine is not
the call's cost.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from astrocyte_otel_audit import audited, configure_audit
from astrocyte_otel_audit.postgres import Appended

BURST, ROUNDS = 1_000, 41


class _NoExporter(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


class _NoStorage:
    def append(self, records: Sequence[Any]) -> Appended:
        return Appended(stored=len(records))

    def check(self) -> None:
        return None

    def close(self) -> None:
        return None

    def after_fork(self) -> None:
        return None


def _recall(query: str, bank_id: str, top_k: int = 10) -> dict[str, object]:
    return {"count": 3, "truncated": False}


def _burst(function: Callable[..., Any]) -> float:
    """Return the caller's CPU time of one call, in microseconds."""
    begin = time.thread_time()
    for _ in range(BURST):
        function("what does Calvin like?", "user-calvin")
    return (time.thread_time() - begin) / BURST * 1e6


def measure() -> list[tuple[str, ...]]:
    ours_provider, in_memory_provider, stock_provider = TracerProvider(), TracerProvider(), TracerProvider()
    processor = configure_audit(storage=_NoStorage(), actions="*", tracer_provider=ours_provider)
    in_memory_processor = configure_audit(
        storage=_NoStorage(), actions="*", tracer_provider=in_memory_provider, spool_dir=False
    )
    stock = BatchSpanProcessor(_NoExporter())
    stock_provider.add_span_processor(stock)
    tracer = stock_provider.get_tracer(__name__)
    ours = audited("recall", transport="http", tracer_provider=ours_provider)(_recall)
    in_memory = audited("recall", transport="http", tracer_provider=in_memory_provider)(_recall)
    same_call = audited("recall", transport="http", tracer_provider=stock_provider)(_recall)

    def by_hand(query: str, bank_id: str, top_k: int = 10) -> dict[str, object]:
        given = {
            "audit.action": "recall",
            "astrocyte.bank_id": bank_id,
            "astrocyte.transport": "http",
            "astrocyte.audit.request.query.length": len(query),
            "astrocyte.audit.request.top_k": top_k,
        }
        with tracer.start_as_current_span("audit recall", attributes=given) as span:
            result = _recall(query, bank_id, top_k)
            span.set_attributes(
                {
                    "audit.outcome": "success",
                    "astrocyte.audit.response.count": 3,
                    "astrocyte.audit.response.truncated": False,
                }
            )
            return result

    rounds = []
    for _ in range(ROUNDS):
        rounds.append((_burst(ours), _burst(in_memory), _burst(same_call), _burst(by_hand)))
        processor.force_flush()
        in_memory_processor.force_flush()
        stock.force_flush()
    for provider in (ours_provider, in_memory_provider, stock_provider):
        provider.shutdown()
    return [
        (
            what,
            f"{statistics.median(burst[mine] for burst in rounds):.1f} µs",
            f"{statistics.median(burst[theirs] for burst in rounds):.1f} µs",
            f"{statistics.median(burst[mine] / burst[theirs] for burst in rounds[1:]):.2f}",
            aim,
        )
        for what, mine, theirs, aim in (
            ("audited call, spool off / same call, stock batch processor", 1, 2, "≤ 1.6"),
            ("audited call / same call, stock batch processor", 0, 2, "–"),
            ("audited call / audited call, spool off", 0, 1, "–"),
            ("audited call / span by hand, stock batch processor", 0, 3, "–"),
        )
    ]
