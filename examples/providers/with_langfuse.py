"""Langfuse's tracer provider: make the client, then configure the audit.

Run it with OTEL_ASTROCYTE_AUDIT_DSN set to a database in which it may create the table, and LANGFUSE_BASE_URL,
LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY as Langfuse wants them.
"""

from langfuse import Langfuse

from astrocyte_otel_audit import audited, configure_audit

langfuse = Langfuse()


@audited("recall")
def recall(query: str, bank_id: str) -> list[str]:
    with langfuse.start_as_current_observation(name="search", as_type="retriever"):
        return ["m-42"]


if __name__ == "__main__":
    processor = configure_audit(actions=["recall"], migrate=True)
    recall("What does Calvin like?", bank_id="user-calvin")
    langfuse.shutdown()
    print("all written:", processor.force_flush())
