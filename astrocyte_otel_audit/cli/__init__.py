"""The command line: each command is a few lines over `postgres`, `pipeline` and `view`."""

from __future__ import annotations

from typing import Annotated

import psycopg
import typer

from astrocyte_otel_audit._version import __version__
from astrocyte_otel_audit.cli import holds, records, retention, setup, spool
from astrocyte_otel_audit.cli.options import UNAVAILABLE, WRONG_USAGE, fail
from astrocyte_otel_audit.errors import AuditError, ConfigurationError
from astrocyte_otel_audit.postgres import classify

app = typer.Typer(
    name="astrocyte-otel-audit",
    help="Read and look after the audit log of an AI-memory service.",
    epilog="Exit codes: 0 done, 1 not found, 2 wrong usage, 3 Postgres can't be used. Start with the demo.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# In the order in which a person needs them.
app.command()(setup.demo)
app.command()(setup.migrate)
app.command()(setup.doctor)
app.command(name="list")(records.list_records)
app.command()(records.show)
app.command(name="set-aside")(records.list_set_aside)
app.command()(retention.stats)
app.command()(retention.purge)
app.command()(spool.writer)
app.add_typer(holds.app, name="hold")
app.add_typer(spool.app, name="spool")


def run() -> None:
    """Run the command line; errors become one line on standard error and an exit code."""
    try:
        app()
    except ConfigurationError as error:
        fail(str(error), WRONG_USAGE)
    except AuditError as error:
        fail(str(error), UNAVAILABLE)
    except psycopg.Error as error:
        fail(str(classify(error)), UNAVAILABLE)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Read and look after the audit log of an AI-memory service."""
    if version:
        print(__version__)
        raise typer.Exit
