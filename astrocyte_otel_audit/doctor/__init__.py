"""What `doctor` does: it asks whether audit records can be made, kept and written here, and says what to do if not.

A check is a function that yields findings. It is left out where one that it needs has failed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from astrocyte_otel_audit.doctor import beside, database, process, spool, wiring
from astrocyte_otel_audit.doctor.examination import Examination
from astrocyte_otel_audit.doctor.finding import Finding, failed, in_two, skipped
from astrocyte_otel_audit.errors import DatabaseUnavailableError

#: What a check that fails says of Postgres: that it can't be reached.
UNREACHABLE: Final = frozenset({"host", "connection"})
#: SQLSTATEs, by their beginnings, of a connection that broke, a server that went, and a login that it refuses.
_LOST = ("08", "57P", "28")


class Check(NamedTuple):
    """One check."""

    #: As its findings call it; they may call others by names of their own.
    name: str
    look: Callable[[Examination], Iterator[Finding]]
    #: What must not have failed before it.
    needs: tuple[str, ...] = ()


_WRITING = ("connection", "server", "table", "set-aside")
CHECKS: Final = (
    Check("settings", process.check_settings),
    Check("allowlist", process.check_allowlist),
    Check("sdk", process.check_sdk),
    Check("limits", process.check_limits),
    Check("sampler", process.check_sampler, ("limits",)),
    Check("versions", process.check_versions),
    Check("wiring", wiring.check_wiring, ("settings", "allowlist", "sdk", "limits", "sampler")),
    Check("dsn", database.check_dsn),
    Check("host", database.check_host, ("dsn",)),
    Check("connection", database.check_connection, ("dsn", "host")),
    Check("clock", database.check_clock, ("connection",)),
    Check("table", database.check_table, ("connection",)),
    Check("set-aside", database.check_set_aside, ("connection", "table")),
    Check("indexes", database.check_indexes, ("connection", "table")),
    Check("migrations", database.check_migrations, ("connection", "table")),
    Check("rights", database.check_rights, _WRITING),
    Check("canary", database.check_canary, (*_WRITING, "rights")),
    Check("spool", spool.check_directory),
    Check("spool-disk", spool.check_disk, ("spool",)),
    Check("spool-filesystem", spool.check_file_system, ("spool",)),
    Check("spool-left", spool.check_what_is_left, ("spool",)),
    Check("writer", beside.check_writer, ("spool",)),
)


def examine(examination: Examination) -> Iterator[Finding]:
    """Yield what the checks find, each as soon as it is known. Never raises for what it finds."""
    #: What wasn't found well, and what to do about what is at the bottom of it.
    ill: dict[str, str] = {}
    with _quiet(), contextlib.closing(examination):
        for check in CHECKS:
            if advice := next((ill[need] for need in check.needs if need in ill), None):
                ill[check.name] = advice
                yield skipped(check.name, "not looked at", advice)
                continue
            for finding in _survived(check, examination):
                if finding.status == "failed":
                    ill[finding.check] = f"mend `{finding.check}` first"
                elif finding.status == "skipped" and finding.advice is not None:
                    ill[finding.check] = finding.advice
                yield finding


def exit_status(found: Iterable[Finding]) -> int:
    """Return 0 if nothing failed, 3 if Postgres can't be reached, else 1."""
    ill = {finding.check for finding in found if finding.status == "failed"}
    return 3 if ill & UNREACHABLE else 1 if ill else 0


def _survived(check: Check, examination: Examination) -> Iterator[Finding]:
    try:
        yield from check.look(examination)
    except DatabaseUnavailableError as error:
        what, advice = in_two(error.reason, error.sqlstate)
        if error.sqlstate is None or error.sqlstate.startswith(_LOST):
            yield failed("connection", f"lost at `{check.name}`: {what}", advice)
            yield skipped(check.name, "not looked at to the end", "mend `connection` first")
        else:
            yield failed(check.name, what, advice)
    except Exception as fault:  # of this library, or of something nobody thought of: the other checks still help
        yield failed(
            check.name, f"the check itself failed ({type(fault).__qualname__})", "go by the others, and report it"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what others log about the same troubles out of the way: it would go to the terminal, between the lines."""
    loggers = [logging.getLogger(name) for name in ("astrocyte_otel_audit", "opentelemetry", "psycopg")]
    before = [logger.propagate for logger in loggers]
    nobody = logging.NullHandler()
    for logger in loggers:
        logger.addHandler(nobody)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagates in zip(loggers, before, strict=True):
            logger.removeHandler(nobody)
            logger.propagate = propagates


__all__ = ["CHECKS", "Check", "Examination", "Finding", "examine", "exit_status"]
