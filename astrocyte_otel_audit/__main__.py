"""The command ``astrocyte-otel-audit``, also as ``python -m astrocyte_otel_audit``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        from astrocyte_otel_audit.cli import run
    except ModuleNotFoundError as missing:
        if missing.name not in ("rich", "typer", "click"):
            raise
        sys.exit("The command line needs an extra: pip install 'astrocyte-otel-audit[cli]'")
    run()


if __name__ == "__main__":
    main()
