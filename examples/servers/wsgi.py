"""A WSGI application: gunicorn's workers run exit handlers, and the tracer provider's own is one.

Run it with OTEL_ASTROCYTE_AUDIT_DSN set: gunicorn --chdir examples/servers wsgi:app --workers 2 --preload
"""

import json
import os
from collections.abc import Callable, Iterable

from astrocyte_otel_audit import audit_scope, audited, configure_audit

configure_audit(actions=["recall"])


@audited("recall")
def recall(query: str, bank_id: str) -> dict[str, object]:
    return {"hits": [{"id": "m-42", "text": "Calvin prefers dark mode"}]}


def app(environ: dict[str, str], start_response: Callable[..., object]) -> Iterable[bytes]:
    with audit_scope(actor_id="calvin", actor_type="user", transport="http"):
        found = recall("What does Calvin like?", bank_id=environ["PATH_INFO"].strip("/"))
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({**found, "process": os.getpid()}).encode()]
