"""Pydantic Logfire's tracer provider: configure Logfire, then the audit.

Run it with OTEL_ASTROCYTE_AUDIT_DSN set to a database in which it may create the table. Logfire's spans go where
OTEL_EXPORTER_OTLP_ENDPOINT says; give `logfire.configure` your token in place of `send_to_logfire=False`.
"""

import logfire

from astrocyte_otel_audit import audited, configure_audit


@audited("recall")
def recall(query: str, bank_id: str) -> list[str]:
    with logfire.span("search {bank_id}", bank_id=bank_id):
        return ["m-42"]


if __name__ == "__main__":
    logfire.configure(service_name="memory", send_to_logfire=False, console=False)
    processor = configure_audit(actions=["recall"], migrate=True)  # after, and again after another configure()
    recall("What does Calvin like?", bank_id="user-calvin")
    logfire.shutdown()
    print("all written:", processor.force_flush())
