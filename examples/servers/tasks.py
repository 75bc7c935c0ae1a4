"""Celery tasks: a child of the prefork pool ends by `os._exit`, but sends a signal before that.

Run it with OTEL_ASTROCYTE_AUDIT_DSN and CELERY_BROKER_URL set: celery --workdir examples/servers --app tasks worker
"""

from celery import Celery
from celery.signals import worker_process_shutdown

from astrocyte_otel_audit import audit_scope, audited, configure_audit

app = Celery("memories")
processor = configure_audit(actions=["recall"])


@worker_process_shutdown.connect
def write_what_waits(**_: object) -> None:
    processor.force_flush(10_000)


@audited("recall")
def find(query: str, bank_id: str) -> dict[str, object]:
    return {"hits": [{"id": "m-42", "text": "Calvin prefers dark mode"}]}


@app.task
def recall(bank_id: str) -> dict[str, object]:
    with audit_scope(actor_id="calvin", actor_type="user", transport="queue"):
        return find("What does Calvin like?", bank_id)
