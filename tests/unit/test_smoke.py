from astrocyte_otel_audit import audited


def test_smoke(audit, provider, storage):
    processor = audit(storage=storage)

    @audited("recall", tracer_provider=provider)
    def recall(query, bank_id):
        return {"hits": 3}

    recall("what?", "b")
    assert processor.force_flush()
    assert [r.bank_id for r in storage.records] == ["b"]


def test_table(audit, provider, database):
    processor = audit(dsn=database)

    @audited("recall", tracer_provider=provider)
    def recall(query, bank_id):
        return {"hits": 3}

    recall("what?", "b")
    assert processor.force_flush()
