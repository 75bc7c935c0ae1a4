"""For tests of code that is audited: a table in memory, and what operations under test leave in it.

With pytest, the fixture `audit_log` needs no import. Nothing here is loaded before it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["AuditLog", "Columns", "Expectation", "InMemoryAuditTable", "record_audit"]

if TYPE_CHECKING:
    from astrocyte_otel_audit.testing.log import AuditLog, Columns, Expectation
    from astrocyte_otel_audit.testing.recording import record_audit
    from astrocyte_otel_audit.testing.table import InMemoryAuditTable
else:
    # Late, since pytest loads `plugin` in every run where the package is installed (PEP 562).
    _HOMES = {
        "AuditLog": "log",
        "Columns": "log",
        "Expectation": "log",
        "InMemoryAuditTable": "table",
        "record_audit": "recording",
    }

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
