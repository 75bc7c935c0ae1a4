"""The gap: one operation that stands for all that could not be accepted, and says how many, of what time and why."""

from __future__ import annotations

import os
from typing import Final

from astrocyte_otel_audit import attributes
from astrocyte_otel_audit.pipeline.captured import Captured
from astrocyte_otel_audit.record import record_id
from astrocyte_otel_audit.storable import MAX_TEXT

#: Action of its row.
GAP_ACTION: Final = "audit.gap"
_MISSING: Final = attributes.METADATA + "missing"
_REASON: Final = attributes.METADATA + "reason"


def widened(gap: Captured | None, refused: Captured, reason: str) -> Captured:
    """Return a gap that covers one operation more.

    Args:
        gap: what was refused since the last one became a record, if anything was.
        refused: the operation.
        reason: why it was refused.
    """
    end_ns = refused.start_ns if refused.end_ns is None else refused.end_ns
    if gap is None:
        gap = Captured(
            record_id(int.from_bytes(os.urandom(16)), 1, refused.start_ns), GAP_ACTION, None, "system", None,
            "astrocyte-otel-audit", "system", "unknown", None, refused.start_ns, end_ns, None, None, None, None,
            refused.service_name and refused.service_name[:MAX_TEXT], 0, {_MISSING: 0},
        )  # fmt: skip
    return gap._replace(
        start_ns=min(gap.start_ns, refused.start_ns),
        end_ns=max(gap.end_ns or end_ns, end_ns),
        payload={_MISSING: gap.payload[_MISSING] + 1, _REASON: reason},
    )
