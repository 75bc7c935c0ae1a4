"""One table a tenant: the schema is taken where an operation starts, however late it is written."""

from contextvars import ContextVar

from astrocyte_otel_audit import audit_scope, audited, configure_audit

tenant: ContextVar[str] = ContextVar("tenant", default="public")


@audited("recall")
def recall(query: str, bank_id: str) -> int:
    return 3


if __name__ == "__main__":
    # With migrate=True a tenant's schema and table are made when its first record comes.
    processor = configure_audit(actions=["recall"], schema=tenant.get, migrate=True)
    tenant.set("tenant_a")
    recall("What does Calvin like?", "user-calvin")
    with audit_scope(schema="Tenant_B"):  # an explicit scope goes before the function
        recall("What does Susie like?", "user-susie")
    print("all written:", processor.force_flush())
