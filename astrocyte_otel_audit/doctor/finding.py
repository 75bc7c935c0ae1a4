"""What a check has found."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Status: TypeAlias = Literal["ok", "warning", "failed", "skipped"]


class Finding(NamedTuple):
    """One line of what `doctor` says. Never a DSN, a password or a server's own words."""

    #: Which check, in a word.
    check: str
    status: Status
    what: str
    #: What to do about it; None where there is nothing to do.
    advice: str | None = None


def ok(check: str, what: str) -> Finding:
    """Return that all is well."""
    return Finding(check, "ok", what)


def warning(check: str, what: str, advice: str) -> Finding:
    """Return that it works, and that somebody should look at it."""
    return Finding(check, "warning", what, advice)


def failed(check: str, what: str, advice: str) -> Finding:
    """Return that audit records are lost or kept waiting by it."""
    return Finding(check, "failed", what, advice)


def skipped(check: str, what: str, advice: str) -> Finding:
    """Return that it was not looked at."""
    return Finding(check, "skipped", what, advice)


def in_two(reason: str, sqlstate: str | None = None) -> tuple[str, str]:
    """Return what is wrong and what to do about it: messages of this library have both, and a semicolon between."""
    what, _, advice = reason.partition("; ")
    return what if sqlstate is None else f"{what} [SQLSTATE {sqlstate}]", advice or "see the server's log"
