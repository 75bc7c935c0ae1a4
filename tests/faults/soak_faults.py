"""The faults of the soak, at random: each is a generator that does it, yields for how many seconds, and undoes it."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import psycopg

from tests.faults.proxy import can_drop_packets

if TYPE_CHECKING:
    from tests.faults.soak import Soak

LOG = "astrocyte_audit_log"
SCHEMAS = ("public", "tenant_a", "tenant_b")

#: May yield more than once. What yields nothing has found nothing that it could be done to.
Course: TypeAlias = Generator[float, None, None]


class Fault(NamedTuple):
    """There is one of a kind at a time: that is the name up to the colon."""

    name: str
    weight: float
    do: Callable[[], Course]


class Faults:
    """Lets faults come, and go again."""

    def __init__(self, soak: Soak) -> None:
        self.counts: Counter[str] = Counter()
        self._soak, self._chance = soak, soak.chance
        self._faults = self._list()
        self._under_way: dict[str, tuple[float, Course]] = {}
        self._next_at = 0.0

    def go_on(self) -> None:
        """Undo those that have lasted, and begin another one, if it is time for it."""
        self._end_some()
        now = time.monotonic()
        if now >= self._next_at:
            self._next_at = now + self._chance.uniform(0.05, 0.5)
            [fault] = self._chance.choices(self._faults, [each.weight for each in self._faults])
            kind = fault.name.split(":")[0]
            if kind not in self._under_way and self._advance(kind, fault.do()):
                self.counts[fault.name] += 1

    def end(self) -> None:
        """Wait until all are undone."""
        deadline = time.monotonic() + 60
        while self._under_way:
            assert time.monotonic() < deadline, f"can't be undone: {[*self._under_way]}"
            self._end_some()
            time.sleep(0.02)

    def _end_some(self) -> None:
        for kind, (at, course) in list(self._under_way.items()):
            if time.monotonic() >= at:
                del self._under_way[kind]
                self._advance(kind, course)

    def _advance(self, kind: str, course: Course) -> bool:
        for lasts in course:
            self._under_way[kind] = time.monotonic() + lasts, course
            return True
        return False

    def _list(self) -> list[Fault]:
        proxy, server, kill, term = self._soak.proxy, self._soak.server, signal.SIGKILL, signal.SIGTERM
        drops_packets = float(can_drop_packets())
        return [
            Fault("network: connections cut", 3, self._for(0.1, self._cut, self._heal)),
            Fault("network: refused", 2, self._for(1.5, proxy.refuse, self._heal)),
            Fault("network: answers held", 1, self._for(1.5, proxy.hold_answers, self._heal)),
            Fault("network: answers swallowed", 1, self._for(1.5, proxy.swallow_answers, self._heal)),
            Fault("network: packets dropped", drops_packets, self._for(3, proxy.blackhole, self._heal)),
            Fault("network: COMMIT lost", 2, lambda: self._lose_commit("request")),
            Fault("network: answer to COMMIT lost", 3, lambda: self._lose_commit("answer")),
            Fault("server: stopped at once", 1, self._for(1.5, server.stop, server.start)),
            Fault("server: killed", 1, self._for(1.5, server.kill, server.start)),
            Fault("server: frozen", 0.5, self._for(1.5, server.freeze, server.thaw)),
            Fault("server: sessions ended", 3, self._end_sessions),
            Fault("server: table renamed", 2, lambda: self._alter(
                f"ALTER TABLE {{}}.{LOG} RENAME TO away", f"ALTER TABLE {{}}.away RENAME TO {LOG}")),
            Fault("server: right revoked", 1, lambda: self._alter(
                f"REVOKE INSERT ON {{}}.{LOG} FROM writer", f"GRANT INSERT ON {{}}.{LOG} TO writer")),
            Fault("server: table locked", 1, self._lock),
            Fault("writer: SIGKILL", 2, lambda: self._end_writer(kill)),
            Fault("writer: SIGTERM", 1, lambda: self._end_writer(term)),
            Fault("writer: SIGKILL, another stands by", 1, lambda: self._end_writer(kill, another_stands_by=True)),
            Fault("writer: frozen", 1, self._for(
                2, lambda: self._soak.signal_writer(signal.SIGSTOP), lambda: self._soak.signal_writer(signal.SIGCONT))),
            Fault("process: SIGKILL", 4, lambda: self._end_process("SIGKILL")),
            Fault("process: SIGTERM", 1, lambda: self._end_process("SIGTERM")),
            Fault("process: ends in order", 2, lambda: self._end_process("in order")),
        ]  # fmt: skip

    def _for(self, longest: float, begin: Callable[[], None], end: Callable[[], None]) -> Callable[[], Course]:
        def do() -> Course:
            begin()
            yield self._chance.uniform(0.1, longest)
            end()

        return do

    def _cut(self) -> None:
        with contextlib.suppress(OSError):  # one is closed already
            self._soak.proxy.cut()

    def _heal(self) -> None:
        self._soak.proxy.heal()
        self._cut()  # else one end would wait for what was swallowed

    def _lose_commit(self, what: str) -> Course:
        proxy = self._soak.proxy
        lost = proxy.lost
        proxy.lose_commit(what)
        for _ in range(40):
            yield 0.05
            if proxy.lost > lost:
                yield self._chance.uniform(0, 0.5)
                break
        proxy.heal()

    def _end_sessions(self) -> Course:
        sessions = "pg_stat_activity WHERE usename = 'writer' AND random() < 0.5"
        if self._execute(f"SELECT pg_terminate_backend(pid) FROM {sessions}"):
            yield 0

    def _alter(self, there: str, back: str) -> Course:
        schema = self._chance.choice(SCHEMAS)
        if self._execute(there.format(schema)):
            yield self._chance.uniform(0.3, 3)
            while not self._execute(back.format(schema)):
                yield 0.1

    def _lock(self) -> Course:
        dsn = self._soak.server.dsn
        with contextlib.suppress(psycopg.Error), contextlib.closing(psycopg.connect(dsn)) as connection:
            connection.execute("SET lock_timeout = 500")
            connection.execute(f"LOCK {self._chance.choice(SCHEMAS)}.{LOG}")
            yield self._chance.uniform(0.1, 4)

    def _execute(self, statement: str) -> bool:
        """Execute a statement, if it can be done soon."""
        try:
            self._soak.server.execute("SET lock_timeout = 300", statement)
        except psycopg.Error:
            return False
        return True

    def _end_writer(self, how: signal.Signals, *, another_stands_by: bool = False) -> Course:
        if another_stands_by:
            self._soak.begin_writer()
            yield self._chance.uniform(0.5, 2)
        self._soak.signal_writer(how)
        if not another_stands_by:
            yield self._chance.uniform(0, 2)
            self._soak.begin_writer()
        yield 1

    def _end_process(self, how: str) -> Course:
        if self._soak.end_process(how):
            yield 0
