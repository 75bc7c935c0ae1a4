"""Where accepted operations wait for the writer. The seam for a write-ahead spool: same three methods, on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol, TypeAlias

from astrocyte_otel_audit.pipeline.captured import Captured
from astrocyte_otel_audit.record import AuditRecord

#: What is accepted: the facts of a span, or a record that is made already.
Operation: TypeAlias = Captured | AuditRecord


class Backlog(Protocol):
    """A first-in, first-out queue of operations. Its callers hold the writer's lock."""

    def append(self, operation: Operation) -> None:
        """Keep an operation. MUST: once it returns, it survives whatever this backlog claims to survive."""

    def take(self, limit: int) -> list[Operation]:
        """Return the oldest operations that were not taken yet, at most `limit`. They stay the backlog's concern."""

    def settle(self, operations: Sequence[Operation]) -> None:
        """Forget operations that were taken. MUST only be called once each is in the table, or counted as lost."""

    def __len__(self) -> int:
        """Return how many were not taken yet."""


class MemoryBacklog:
    """A backlog that survives an absent database, and not the end of its process."""

    def __init__(self) -> None:
        self._waiting: deque[Operation] = deque()

    def append(self, operation: Operation) -> None:
        """Keep an operation in memory."""
        self._waiting.append(operation)

    def take(self, limit: int) -> list[Operation]:
        """Return the oldest operations, at most `limit`."""
        waiting = self._waiting
        return [waiting.popleft() for _ in range(min(limit, len(waiting)))]

    def settle(self, operations: Sequence[Operation]) -> None:
        """Do nothing: what was taken is in nobody's memory but the taker's."""

    def __len__(self) -> int:
        return len(self._waiting)
