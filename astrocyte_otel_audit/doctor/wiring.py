"""The check that an operation becomes a record: with the settings of this environment, and without Postgres."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from opentelemetry.sdk.trace import TracerProvider, sampling

from astrocyte_otel_audit.allowlist import Allowlist
from astrocyte_otel_audit.configure import configure_audit
from astrocyte_otel_audit.doctor.examination import Examination
from astrocyte_otel_audit.doctor.finding import Finding, failed, ok, skipped, warning
from astrocyte_otel_audit.emit import audit_operation
from astrocyte_otel_audit.pipeline import AuditSpanProcessor
from astrocyte_otel_audit.postgres import Appended, Fault
from astrocyte_otel_audit.record import AuditRecord

#: As long an id, and with the operation's own seven attributes as many, as set-up promises not to cut.
_BANK = "doctor".ljust(128, ".")
_PAYLOAD = {f"n{number}": number for number in range(25)}


class _InMemory:
    """Keeps records in a list, in place of a table."""

    def __init__(self) -> None:
        self.records: list[AuditRecord] = []

    def append(self, records: Sequence[AuditRecord]) -> Appended:
        """Keep records."""
        self.records += records
        return Appended(stored=len(records))

    def check(self) -> Fault | None:
        """Say that nothing keeps it from taking records."""
        return None

    def close(self) -> None:
        """Do nothing."""

    def after_fork(self) -> None:
        """Do nothing."""


def check_wiring(examination: Examination) -> Iterator[Finding]:
    """An operation that isn't sampled becomes a record: sampler, processor, allowlist and limits together."""
    actions = examination.value("actions")
    action = allowed_action(actions)
    if action is None:
        yield skipped(
            "wiring", "no action was found that the allowlist's globs allow", "name one beside them: --actions recall"
        )
        return
    provider = TracerProvider(sampler=sampling.ALWAYS_OFF, shutdown_on_exit=False)
    storage = _InMemory()
    try:
        processor = configure_audit(
            tracer_provider=provider, create_provider=False, storage=storage, actions=actions,
            schema=examination.value("schema"), table=examination.value("table"), spool_dir=False, writer="thread",
            retention=False,
        )  # fmt: skip
        yield _emit(action, provider, processor, storage, examination.timeout_seconds)
    finally:
        provider.shutdown()


def _emit(
    action: str, provider: TracerProvider, processor: AuditSpanProcessor, storage: _InMemory, seconds: float
) -> Finding:
    with audit_operation(
        action, bank_id=_BANK, transport="system", actor_id="doctor", actor_type="system", request=_PAYLOAD,
        tracer_provider=provider,
    ) as operation:  # fmt: skip
        pass
    if operation.record_id is None:
        return failed(
            "wiring", f"the pipeline did not take an operation {action}", "see the OTEL_ variables of this environment"
        )
    processor.force_flush(int(seconds * 1000))
    record = next((record for record in storage.records if record.id == operation.record_id), None)
    if record is None:
        return failed(
            "wiring", f"an operation {action} was taken and became no record", "see the OTEL_ variables, or report it"
        )
    if (record.bank_id, record.request) != (_BANK, _PAYLOAD):
        return warning("wiring", f"an operation {action} became a record, which was cut", "see the limits above")
    return ok("wiring", f"an operation {action}, not sampled, became a whole record")


def allowed_action(actions: Sequence[str]) -> str | None:
    """Return an action that an allowlist allows: one of its own, or one made of its globs; None if there is none."""
    globs = (re.sub(r"\[([^!\]])[^\]]*\]", r"\1", each).replace("*", "canary").replace("?", "x") for each in actions)
    allows = Allowlist(actions).allows
    return next((action for action in ("audit.canary", *globs) if allows(action)), None)
