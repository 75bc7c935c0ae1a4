"""The pytest plugin: the fixture `audit_log` and its marker. Loads nothing before a test asks for the fixture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from astrocyte_otel_audit.testing.log import AuditLog

_MARKER = "audit_log"


def pytest_configure(config: pytest.Config) -> None:
    """Say what the marker is, for ``--strict-markers``."""
    config.addinivalue_line(
        "markers", f"{_MARKER}(actions=…, mappings=…, …): what the fixture audit_log records, as record_audit takes it"
    )


@pytest.fixture
def audit_log(request: pytest.FixtureRequest) -> Iterator[AuditLog]:
    """The audit records that the test's operations leave, in memory: an `astrocyte_otel_audit.testing.AuditLog`.

    The marker of the same name takes the arguments of `astrocyte_otel_audit.testing.record_audit`.
    """
    from astrocyte_otel_audit.testing.recording import record_audit  # only here, see above

    marker = request.node.get_closest_marker(_MARKER)
    if marker is not None and marker.args:
        raise pytest.UsageError(f"the marker {_MARKER} takes arguments by name only, as in actions=['recall']")
    with record_audit(**(marker.kwargs if marker is not None else {})) as log:
        yield log
