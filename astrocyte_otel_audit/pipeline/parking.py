"""Parking: tenants whose table can't take records for now wait here, so that the others can go on."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from astrocyte_otel_audit.pipeline.backlog import Entry


class Backoff(NamedTuple):
    """Exponential backoff, capped, with jitter so that many processes don't come back at the same instant."""

    initial_seconds: float
    maximum_seconds: float

    def delay(self, attempt: int) -> float:
        """Return the seconds to wait after the given failed attempt, counted from 1."""
        longest = min(self.maximum_seconds, self.initial_seconds * 2.0 ** min(attempt - 1, 30))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret


@dataclass(slots=True)
class _Lane:
    """One parked tenant."""

    waiting: deque[Entry] = field(default_factory=deque)
    failures: int = 0
    next_attempt: float = 0.0
    #: Number of the last `flush` that was waiting when an attempt failed.
    failed_for_flush: int = 0


class Parking:
    """The parked tenants, by their schema. Not thread-safe: the writer's lock is held around every call."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._lanes: dict[str | None, _Lane] = {}

    def __len__(self) -> int:
        return sum(len(lane.waiting) for lane in self._lanes.values())

    def divert(
        self, items: list[Entry], capacity: int, drop: Callable[[Entry], bool]
    ) -> tuple[list[Entry], list[Entry]]:
        """Let the entries of parked tenants join their lanes.

        Args:
            items: entries of any tenants.
            capacity: entries that may wait here in memory.
            drop: keeps an entry beyond that on disk only, or says that it can't.

        Returns:
            The entries of the other tenants, and those that found no place.
        """
        if not self._lanes:
            return items, []
        others: list[Entry] = []
        overflow: list[Entry] = []
        room = capacity - len(self)
        for item in items:
            lane = self._lanes.get(item.schema)
            if lane is None:
                others.append(item)
            elif room > 0 or drop(item):
                lane.waiting.append(item)
                room -= 1
            else:
                overflow.append(item)
        return others, overflow

    def due(self, now: float, limit: int) -> list[Entry]:
        """Take the oldest entries of one tenant whose next attempt has come; nothing if there is none.

        Half as many with every failure: a batch that takes the server too long is in time once it is small enough,
        and whoever holds a lock is asked for less. The attempt's end must be told: by `park` for what has failed
        again, by `release` for a tenant of which nothing has.
        """
        for lane in self._lanes.values():
            if lane.next_attempt <= now and lane.waiting:
                lane.next_attempt = float("inf")
                limit = max(1, limit >> lane.failures)
                return [lane.waiting.popleft() for _ in range(min(limit, len(lane.waiting)))]
        return []

    def park(self, items: Sequence[Entry], now: float, flush: int, *, others_passed: bool = False) -> None:
        """Park a tenant's entries, in front of those that wait already.

        Args:
            items: they are all of one schema.
            now: monotonic seconds.
            flush: number of the last flush before the attempt that failed.
            others_passed: others of the same tenant could be written, so it needn't wait long.
        """
        lane = self._lanes.setdefault(items[0].schema, _Lane())
        lane.waiting.extendleft(reversed(items))
        lane.failures = 1 if others_passed else lane.failures + 1
        lane.next_attempt = now + self._backoff.delay(lane.failures)
        lane.failed_for_flush = flush

    def release(self, schema: str | None) -> None:
        """A tenant's entries could be written: what still waits is due at once, and a tenant without any is free."""
        lane = self._lanes.get(schema)
        if lane is not None:
            lane.next_attempt = 0.0
            lane.failures = max(0, lane.failures - 1)
            if not lane.waiting:
                del self._lanes[schema]

    def expedite(self) -> None:
        """Make every tenant's next attempt due, unless one is under way."""
        for lane in self._lanes.values():
            if lane.waiting:
                lane.next_attempt = 0.0

    def next_attempt(self) -> float:
        """Return when the next attempt is due, or infinity."""
        return min((lane.next_attempt for lane in self._lanes.values() if lane.waiting), default=float("inf"))

    def oldest(self) -> int | None:
        """Return the lowest number that waits here."""
        return min((lane.waiting[0].number for lane in self._lanes.values() if lane.waiting), default=None)

    def all_failed_for(self, flush: int, goal: int) -> bool:
        """Say whether each tenant with an entry below `goal` has failed an attempt made for that flush."""
        lanes = (lane for lane in self._lanes.values() if lane.waiting and lane.waiting[0].number < goal)
        return all(lane.failed_for_flush >= flush for lane in lanes)
