"""A function of a serverless runtime, which freezes the process, or ends it, as soon as the handler has returned.

Set OTEL_ASTROCYTE_AUDIT_DSN, and OTEL_ASTROCYTE_AUDIT_SPOOL_DIR=/tmp/audit where only /tmp can be written.
"""

from astrocyte_otel_audit import audit_scope, audited, configure_audit

FLUSH_MILLIS = 2_000  # what is not written by then is in the spool, for the next invocation

processor = configure_audit(actions=["recall"])


@audited("recall")
def recall(query: str, bank_id: str) -> dict[str, object]:
    return {"hits": [{"id": "m-42", "text": "Calvin prefers dark mode"}]}


def handler(event: dict[str, str], context: object) -> dict[str, object]:
    try:
        with audit_scope(actor_id="calvin", actor_type="user", transport="http"):
            return recall(event["query"], event["bank_id"])
    finally:
        processor.force_flush(FLUSH_MILLIS)
