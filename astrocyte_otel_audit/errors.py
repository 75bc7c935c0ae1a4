"""What can go wrong, as types. Every error the library raises on purpose is an `AuditError`."""

from __future__ import annotations


class AuditError(Exception):
    """Base of every error that this library raises."""


class ConfigurationError(AuditError, ValueError):
    """An argument, variable or name that can't be used, refused before anything runs.

    Args:
        source: the argument or environment variable at fault, as the user wrote it.
        problem: what came and what is accepted. Never a secret: a DSN isn't quoted here.
    """

    def __init__(self, source: str, problem: str) -> None:
        self.source = source
        self.problem = problem
        super().__init__(f"{source}: {problem}")


class AuditUnavailableError(AuditError):
    """An operation marked `required=True` found no pipeline that took it, so its body did not run."""


class DatabaseUnavailableError(AuditError):
    """Postgres can't be used right now. The message is ours: it names no DSN, password or payload.

    Args:
        reason: what is wrong and what to do about it, in one line.
        sqlstate: the server's five-character code, or None where the server was never reached.
    """

    def __init__(self, reason: str, sqlstate: str | None = None) -> None:
        self.reason = reason
        self.sqlstate = sqlstate
        super().__init__(reason if sqlstate is None else f"{reason} [SQLSTATE {sqlstate}]")
