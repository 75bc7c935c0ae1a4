"""`AuditStorage`: what one schema's log takes of the server, and what of it is about to expire."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres.holds import Hold
from astrocyte_otel_audit.postgres.reader import AuditReader
from astrocyte_otel_audit.postgres.sweep import as_cutoff, exceptions
from astrocyte_otel_audit.retention import Cutoffs, RetentionPolicy

#: Rows that are counted; of more, it is said that they are more.
CAP: Final = 1_000_000
#: Days from now for which is said what will be expired by then.
HORIZONS: Final = (0, 1, 7, 30)
#: The table beside the log isn't there, or isn't to be seen: no reason to say nothing of the log.
_NOT_TO_BE_SEEN: Final = frozenset({"42P01", "42501"})


class Count(NamedTuple):
    """A number of rows that isn't always known to the row."""

    rows: int
    #: ``exact``; ``estimate``, by the server's statistics; or ``at least``, where counting ended.
    how: str = "exact"


class Partition(NamedTuple):
    """A part of a partitioned table."""

    name: str
    #: As Postgres writes them, such as ``FOR VALUES FROM … TO …`` or ``DEFAULT``.
    bounds: str
    rows: Count
    #: Table, indexes and TOAST.
    bytes: int


class Storage(NamedTuple):
    """What one schema's log takes."""

    schema: str
    table: str
    rows: Count
    #: On disk, of all partitions together.
    table_bytes: int
    index_bytes: int
    toast_bytes: int
    #: Start of the oldest and of the newest record; None where there is none.
    oldest: datetime | None
    newest: datetime | None
    #: Rows that were deleted and whose room is not free yet, and when it was last freed by the server itself.
    dead_rows: int
    last_autovacuum: datetime | None
    #: By days from now, 0 included: records that the policy lets go by then and no hold keeps. Empty without a policy.
    expired: dict[int, Count]
    #: Records that the table refused; None where they can't be seen.
    set_aside: Count | None
    #: Holds that are not released; None where they can't be seen, and then nothing is taken for held.
    holds: int | None
    #: By their bounds; empty where the table has none.
    partitions: list[Partition]


class _Relation(NamedTuple):
    """What holds rows: the table itself, or one of its partitions."""

    name: str
    bounds: str | None
    estimated_rows: int
    table_bytes: int
    index_bytes: int
    toast_bytes: int
    dead_rows: int
    last_autovacuum: datetime | None
    oid: int


class AuditStorage(AuditReader):
    """The audit log in one database, to be measured. Needs SELECT on the table. Thread-safe.

    Args:
        connections, schema, table, statement_timeout_seconds: as in `AuditReader`.
    """

    def storage(self, policy: RetentionPolicy | None = None, schema: str | None = None) -> Storage:
        """Measure one schema's log.

        Args:
            policy: what says which records expire; without one, `Storage.expired` is empty.
            schema: tenant's schema; the table's default one otherwise.

        Raises:
            DatabaseUnavailableError: the table can't be read; the reason says what to do.
        """
        schema = schema or self.schema
        relations = [_Relation(*row) for row in self._read("storage/relations", {}, schema)]
        counted = dict(self._read("storage/count", {"cap": CAP}, schema))
        is_exact = sum(counted.values()) <= CAP
        counts = [
            Count(counted.get(each.oid, 0)) if is_exact else Count(each.estimated_rows, "estimate")
            for each in relations
        ]
        [(oldest, newest, now)] = self._read("storage/span", {}, schema)
        held = self._held(schema)
        expired: dict[int, Count] = {}
        if policy is not None and policy.expires:
            for days in HORIZONS:
                expired[days] = self._expired(policy.cutoffs(now + timedelta(days=days)), held or (), schema)
        return Storage(
            schema=schema,
            table=self.table,
            rows=Count(sum(count.rows for count in counts), "exact" if is_exact else "estimate"),
            table_bytes=sum(each.table_bytes for each in relations),
            index_bytes=sum(each.index_bytes for each in relations),
            toast_bytes=sum(each.toast_bytes for each in relations),
            oldest=oldest,
            newest=newest,
            dead_rows=sum(each.dead_rows for each in relations),
            last_autovacuum=max((each.last_autovacuum for each in relations if each.last_autovacuum), default=None),
            expired=expired,
            set_aside=self._refused(schema),
            holds=None if held is None else len(held),
            partitions=[
                Partition(each.name, each.bounds, count, each.table_bytes + each.index_bytes + each.toast_bytes)
                for each, count in zip(relations, counts, strict=True)
                if each.bounds is not None
            ],
        )

    def _expired(self, cutoffs: Cutoffs, held: Sequence[Hold], schema: str) -> Count:
        parameters: dict[str, Any] = {
            "cap": CAP, "newest": cutoffs.newest, "default": as_cutoff(cutoffs.default), **exceptions(cutoffs),
            "held_banks": [hold.bank_id for hold in held], "held_actors": [hold.actor_id for hold in held],
            "held_traces": [hold.trace_id for hold in held],
        }  # fmt: skip
        return _capped(self._read("storage/expiring", parameters, schema))

    def _held(self, schema: str) -> list[Hold] | None:
        try:
            return [Hold(*row) for row in self._read("holds/list", {"include_released": False}, schema)]
        except DatabaseUnavailableError as error:
            if error.sqlstate in _NOT_TO_BE_SEEN:
                return None
            raise

    def _refused(self, schema: str) -> Count | None:
        try:
            return _capped(self._read("storage/set_aside", {"cap": CAP}, schema))
        except DatabaseUnavailableError as error:
            if error.sqlstate in _NOT_TO_BE_SEEN:
                return None
            raise


def _capped(rows: list[tuple[Any, ...]]) -> Count:
    [(count,)] = rows
    return Count(count) if count <= CAP else Count(CAP, "at least")
