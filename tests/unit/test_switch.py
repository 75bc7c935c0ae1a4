"""`enabled_for`: what a deployment audits of what it allows, by bank and tenant."""

import logging

import pytest

from astrocyte_otel_audit import ConfigurationError, SpanMapping, audit_operation, audit_scope
from astrocyte_otel_audit.pipeline.switch import Switch


@pytest.fixture
def rows(storage):
    """What the table holds, once all is written."""

    def read(processor):
        assert processor.force_flush(10_000)
        return [(row.action, row.bank_id) for row in storage.records]

    return read


@pytest.fixture
def operate(provider):
    def operate(action, bank=None, **arguments):
        with audit_operation(action, bank_id=bank, tracer_provider=provider, **arguments):
            pass

    return operate


def test_it_is_asked_for_what_is_allowed_and_decides(audit, storage, operate, rows):
    asked = []

    def enabled_for(action, bank):
        asked.append((action, bank))
        return {"off": False, "on": True}.get(bank)

    processor = audit(storage=storage, actions=["recall"], enabled_for=enabled_for)
    for bank in ("on", "off", None):
        operate("recall", bank)
    operate("forget", "on")
    assert rows(processor) == [("recall", "on"), ("recall", None)]
    assert asked == [("recall", "on"), ("recall", "off"), ("recall", None)]


def test_its_answers_are_kept_for_a_minute(audit, storage, operate, rows):
    asked, now = [], [100.0]

    def enabled_for(action, bank):
        asked.append(bank)
        return False

    switch = Switch(enabled_for, clock=lambda: now[0])
    assert [switch.is_on("recall", "b", None) for _ in range(3)] == [False] * 3
    assert [switch.is_on("recall", "b", "tenant_a"), switch.is_on("recall", "c", None)] == [False, False]
    assert asked == ["b", "b", "c"]
    now[0] += 61
    switch.is_on("recall", "b", None)
    assert asked == ["b", "b", "c", "b"]


@pytest.mark.parametrize(("answer", "said"), [(KeyError("where I live"), "KeyError"), ("no", "str"), (0, "int")])
def test_one_that_does_not_know_leaves_it_on_and_is_counted(audit, storage, operate, rows, caplog, answer, said):
    def enabled_for(action, bank):
        if isinstance(answer, Exception):
            raise answer
        return answer

    processor = audit(storage=storage, enabled_for=enabled_for)
    with caplog.at_level(logging.WARNING):
        operate("recall", "b")
        operate("recall", "c")
    assert rows(processor) == [("recall", "b"), ("recall", "c")]
    assert processor.stats()["enabled_for_failed"] == 2
    [message] = [record.getMessage() for record in caplog.records if "enabled_for" in record.getMessage()]
    assert said in message
    assert "where I live" not in message


def test_what_is_required_is_not_asked_for(audit, storage, operate, rows, tmp_path):
    processor = audit(storage=storage, actions=(), enabled_for=lambda action, bank: False, spool_dir=tmp_path)
    operate("forget", "b", required=True)
    assert rows(processor) == [("forget", "b")]


def test_a_mapped_span_is_asked_for_by_the_bank_it_names(audit, storage, provider, rows):
    processor = audit(
        storage=storage, mappings=[SpanMapping(span_name="memory.{action}", bank_id="memory.bank")],
        enabled_for=lambda action, bank: bank != "off",
    )  # fmt: skip
    for bank in ("on", "off"):
        provider.get_tracer("memory").start_span("memory.recall", attributes={"memory.bank": bank}).end()
    assert rows(processor) == [("recall", "on")]


def test_the_bank_may_be_that_of_the_scope(audit, storage, operate, rows):
    processor = audit(storage=storage, enabled_for=lambda action, bank: bank != "off")
    with audit_scope(bank_id="off"):
        operate("recall")
    assert rows(processor) == []


def test_what_is_remembered_does_not_grow_without_end():
    switch = Switch(lambda action, bank: True)
    for number in range(5000):
        switch.is_on("recall", f"bank-{number}", None)
    assert len(switch._answers) <= 4096
    switch = Switch(lambda action, bank: True)
    switch.is_on("recall", "x" * 1_000_000, None)
    assert switch._answers == {}


def test_what_is_no_function_is_refused(audit, storage):
    with pytest.raises(ConfigurationError, match=r"^enabled_for: got a dict; accepted is a function"):
        audit(storage=storage, enabled_for={"recall": True})
