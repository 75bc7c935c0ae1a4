"""Does the service audit what it must? Tests with the fixture `audit_log`, without Postgres.

Run it with ``pytest examples/testing``; the fixture comes with the package.
"""

import pytest

from astrocyte_otel_audit import audit_scope, audited


@audited("recall", response=lambda hits: {"hits": hits})
async def recall(query: str, bank_id: str) -> list[dict[str, object]]:
    return [{"id": "m-42", "text": "Calvin prefers dark mode"}]


@audited("forget", required=True)
def forget(memory_id: str, bank_id: str) -> None:
    raise PermissionError("Calvin's memories are on legal hold")


async def test_a_recall_says_who_asked_and_not_what(audit_log):
    with audit_scope(actor_id="calvin", actor_type="user", transport="http"):
        await recall("What does Calvin like?", bank_id="user-calvin")
    record = audit_log.one("recall", bank_id="user-calvin", actor_id="calvin", outcome="success")
    assert record.response == {"hits": {"count": 1, "ids": ["m-42"]}}
    assert "Calvin" not in str(record)


def test_what_is_refused_is_on_record(audit_log):
    with audit_log.expect("forget", outcome="failure") as expected, pytest.raises(PermissionError):
        forget("m-42", bank_id="user-calvin")
    assert expected.record.error_type == "PermissionError"
    assert expected.record.request == {"memory_id": "m-42"}


@pytest.mark.audit_log(actions=["forget"])
async def test_what_is_not_allowlisted_leaves_nothing(audit_log):
    await recall("What does Calvin like?", bank_id="user-calvin")
    audit_log.none()
