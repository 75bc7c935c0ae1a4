"""The commands over the spool: what is in it, writing it, and the process that writes it for others."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.cli.options import Dsn, Json, Schema, TableName, database, say, show_found
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.pipeline import AuditSpanExporter
from astrocyte_otel_audit.pipeline.replay import replay, status
from astrocyte_otel_audit.view import records as view
from astrocyte_otel_audit.view.spool import spool_table

SpoolDir = Annotated[
    Path | None,
    typer.Option(
        envvar=settings.PREFIX + "SPOOL_DIR",
        help="Directory of the spool; by default the one of this user's processes.",
        show_default=False,
    ),
]

app = typer.Typer(
    help="Look at the records that are on disk and not in the table yet, and write them.", no_args_is_help=True
)


@app.command(name="status")
def spool_status(spool_dir: SpoolDir = None, json: Json = False) -> None:
    """Show what each process has in the spool: records, bytes, the oldest, and whether the process lives.

    What an ended process left is written by the next one with the same database and table, or by `spool replay`.
    """
    root = _spool_root(spool_dir)
    found = list(status(root))
    show_found(found, spool_table, f"the spool {root} is empty", json=json)


@app.command(name="replay")
def spool_replay(
    dsn: Dsn = None,
    schema: Schema = settings.DEFAULT_SCHEMA,
    table: TableName = settings.DEFAULT_TABLE,
    spool_dir: SpoolDir = None,
    any_destination: Annotated[
        bool,
        typer.Option("--any-destination", help="Also what was meant for another database or table, as after a move."),
    ] = False,
    json: Json = False,
) -> None:
    """Write what ended processes have left in the spool, and clear it away. Processes that live are left alone.

    Safe to repeat and to interrupt: a record that is in the table already is not written twice.
    """
    root = _spool_root(spool_dir)
    with database(dsn) as connection_string, Progress(console=Console(stderr=True), transient=True) as bar:
        exporter = AuditSpanExporter(dsn=connection_string, actions=(), schema=schema, table=table)
        task = bar.add_task("records", total=None)
        try:
            result = replay(
                root, exporter, any_destination=any_destination, progress=lambda count: bar.advance(task, count)
            )
        finally:
            exporter.shutdown()
    if json:
        print(view.as_json(result))
    else:
        print(
            f"{result.written} records of {result.processes} ended processes are in the table, {result.set_aside} were "
            f"set aside, {result.waiting} still wait, {result.damaged} lines can't be read"
        )


def writer(
    dsn: Dsn = None,
    schema: Schema = settings.DEFAULT_SCHEMA,
    table: TableName = settings.DEFAULT_TABLE,
    spool_dir: SpoolDir = None,
    destination: Annotated[
        list[str] | None,
        typer.Option(
            help="Processes with this destination, beside those with the same database and table; may be repeated.",
            show_default=settings.DEFAULT_DESTINATION,
        ),
    ] = None,
    migrate: Annotated[
        bool,
        typer.Option(
            "--migrate", envvar=settings.PREFIX + "MIGRATE", help="Create or upgrade tables, and tenants' schemas."
        ),
    ] = False,
) -> None:
    """Write what all processes of this machine put into the spool that were set up with writer='external'.

    They have no connection and no thread then: this one connection is for all of them. Run it as the same user, under
    whatever keeps services running; of several, one writes and the others stand by. It ends on SIGTERM or Ctrl-C, and
    what isn't written by then stays in the spool. What it does, and what keeps it from it, is on standard error.
    """
    from astrocyte_otel_audit.pipeline.beside import write_beside

    root = _spool_root(spool_dir)
    names = destination or [settings.DEFAULT_DESTINATION]
    destinations = [settings.SETTINGS["destination"].accept(name, "--destination") for name in names]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with database(dsn) as connection_string:
        exporter = AuditSpanExporter(
            dsn=connection_string, actions=(), mappings=(), schema=schema, table=table, migrate=migrate
        )
        counts = write_beside(root, exporter, destinations, stopped)
    say(f"{counts['stored']} records are in the table, {counts['set_aside']} were set aside")


def _spool_root(directory: Path | None) -> Path:
    if directory is not None and str(directory) == "off":  # the variable that says so is the application's
        raise ConfigurationError("--spool-dir", "the spool is 'off'; accepted is a directory")
    return directory or settings.default_spool_dir()
