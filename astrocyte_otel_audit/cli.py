"""The command line: each command is a few lines over `postgres`, `view` and `demo`."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import psycopg
import typer
from rich.console import Console
from rich.progress import Progress

from astrocyte_otel_audit import settings
from astrocyte_otel_audit._version import __version__
from astrocyte_otel_audit.embedded import SCHEME, embedded_postgres
from astrocyte_otel_audit.errors import AuditError, ConfigurationError, DatabaseUnavailableError
from astrocyte_otel_audit.pipeline import AuditSpanExporter
from astrocyte_otel_audit.pipeline.replay import replay, status
from astrocyte_otel_audit.postgres import AuditTable, Cursor, OwnConnection, classify
from astrocyte_otel_audit.view import records as view
from astrocyte_otel_audit.view.spool import spool_table

#: Exit codes beside 0; a usage error is 2, as everywhere.
NOT_FOUND, UNAVAILABLE = 1, 3

app = typer.Typer(
    name="astrocyte-otel-audit",
    help="Read and look after the audit log of an AI-memory service.",
    epilog="Exit codes: 0 done, 1 not found, 2 wrong usage, 3 Postgres can't be used. Start with the demo.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Dsn = Annotated[
    str | None,
    typer.Option(
        envvar=settings.PREFIX + "DSN",
        show_envvar=True,
        metavar="DSN",
        help="Connection string: postgresql://…, key=value pairs, or embedded:DIR for a server of one's own on a "
        "directory (embedded: alone is the demo's).",
    ),
]
Schema = Annotated[str, typer.Option(envvar=settings.PREFIX + "SCHEMA", help="Schema of the tenant.")]
TableName = Annotated[str, typer.Option("--table", envvar=settings.PREFIX + "TABLE", help="Name of the table.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for other programs.")]


def run() -> None:
    """Run the command line; errors become one line on standard error and an exit code."""
    try:
        app()
    except ConfigurationError as error:
        _fail(str(error), 2)
    except DatabaseUnavailableError as error:
        _fail(str(error), UNAVAILABLE)
    except psycopg.Error as error:
        _fail(str(classify(error)), UNAVAILABLE)
    except AuditError as error:
        _fail(str(error), UNAVAILABLE)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Read and look after the audit log of an AI-memory service."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def demo(dsn: Dsn = None) -> None:
    """Run a real Astrocyte brain, sampled at 10 %, and show that every operation became a row.

    Without --dsn, a Postgres is started from its wheel; nothing has to be installed or cleaned up.
    """
    from astrocyte_otel_audit.demo import run_demo

    console = _console()
    place = dsn or SCHEME
    with _dsn(place) as connection_string:
        run_demo(connection_string, console)
    # A real connection string may hold a password, and isn't repeated.
    named = "" if settings.PREFIX + "DSN" in os.environ else f" --dsn {place if place.startswith(SCHEME) else '…'}"
    console.print(
        "\n[bold]What to do next[/bold]\n"
        f"  look again      astrocyte-otel-audit list{named} --bank user-calvin\n"
        f"  one record      astrocyte-otel-audit show ID{named}\n"
        "  your own app    configure_audit(dsn=…, actions=['retain', 'recall'], mappings=['astrocyte'], migrate=True)\n"
        "  and read        README.md, from 'Audit your own service' on",
        highlight=False,
    )


@app.command()
def migrate(
    dsn: Dsn = None,
    schema: Schema = settings.DEFAULT_SCHEMA,
    table: TableName = settings.DEFAULT_TABLE,
    create_schema: Annotated[bool, typer.Option("--create-schema", help="Create the schema if there is none.")] = False,
    roles: Annotated[
        bool, typer.Option("--roles", help="Also make the roles that may write, read and sweep the table.")
    ] = False,
    role_prefix: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What the names of the roles begin with: NAME_writer, NAME_reader, NAME_sweeper.",
            show_default=settings.DEFAULT_ROLE_PREFIX,
        ),
    ] = None,
) -> None:
    """Create the table, or upgrade the one that Astrocyte's migration 023 or an older release made.

    Safe to repeat, and to run from many processes at once. The role needs CREATE on the schema, or to own the table;
    the role that writes the log needs no more than INSERT afterwards.

    With --roles it makes three roles that can't log in, with these rights on the
    table and its side table, and no others: astrocyte_audit_writer may INSERT,
    astrocyte_audit_reader may SELECT, astrocyte_audit_sweeper may SELECT, DELETE.
    Whatever else they, or PUBLIC, could do with the tables is revoked. It needs
    CREATEROLE where a role is missing, and to own the tables.

    Then let the login role of your service, which must not own the tables, write
    and do nothing else: GRANT astrocyte_audit_writer TO app_user.
    Roles are the whole server's: all schemas and databases share these, unless
    --role-prefix names others.
    """
    prefix = settings.role_prefix(settings.DEFAULT_ROLE_PREFIX if role_prefix is None else role_prefix, "--role-prefix")
    if role_prefix is not None and not roles:
        raise ConfigurationError("--role-prefix", f"got {role_prefix!r} without --roles; accepted is it with --roles")
    console = _console()
    with _table(dsn, schema, table) as audit_table:
        for name in audit_table.migrate(create_schema=create_schema):
            console.print(f"applied {name}", highlight=False)
        console.print(f"{schema}.{table} is up to date", highlight=False)
        if roles:
            made = audit_table.grant_roles(role_prefix=prefix)
            console.print(
                f"{made.writer} may INSERT, {made.reader} may SELECT, {made.sweeper} may SELECT, DELETE",
                highlight=False,
                soft_wrap=True,
            )
            console.print(
                f"next: {made.next_step}, the login role of your service, which must not own the tables",
                highlight=False,
                soft_wrap=True,
            )


@app.command()
def doctor(
    dsn: Dsn = None,
    schema: Annotated[str | None, typer.Option(help="Schema of the tenant; by default as configured.")] = None,
    table: Annotated[str | None, typer.Option(help="Name of the table; by default as configured.")] = None,
    spool_dir: Annotated[
        str | None, typer.Option(help="Directory of the spool, or off; by default as configured.")
    ] = None,
    actions: Annotated[
        str | None, typer.Option(help="Actions or globs, comma-separated, that your code gives to configure_audit.")
    ] = None,
    canary: Annotated[
        bool, typer.Option("--canary/--no-canary", help="Write a row, read it back, and leave none behind.")
    ] = True,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds to wait for each answer.")] = 10.0,
    json: Json = False,
) -> None:
    """Find out why there are no rows: check settings, SDK, database, rights and spool, and say what to do.

    Run it where your service runs, as its user and with its environment. It changes nothing. Exit codes: 0 nothing
    failed, though there may be warnings; 1 something failed; 2 wrong usage; 3 Postgres can't be reached.
    """
    from astrocyte_otel_audit.doctor import Examination, examine, exit_status
    from astrocyte_otel_audit.view.doctor import plain_line, styled_line, summary

    with _dsn(dsn) if dsn and dsn.strip() else nullcontext(None) as connection_string:
        examination = Examination(connection_string, schema, table, spool_dir, actions, canary, timeout)
        console, found = _console(), []
        for finding in examine(examination):
            found.append(finding)
            if json:
                print(view.as_json(finding), flush=True)
            elif sys.stdout.isatty():
                console.print(styled_line(*finding))
            else:
                print(plain_line(*finding), flush=True)
    _say(summary((finding.check, finding.status) for finding in found))
    raise typer.Exit(exit_status(found))


@app.command(name="list")
def list_records(
    dsn: Dsn = None,
    schema: Schema = settings.DEFAULT_SCHEMA,
    table: TableName = settings.DEFAULT_TABLE,
    bank: Annotated[str | None, typer.Option(help="Memory bank.")] = None,
    action: Annotated[str | None, typer.Option(help="Action, such as retain.")] = None,
    transport: Annotated[str | None, typer.Option(help="Transport, such as http or mcp.")] = None,
    outcome: Annotated[str | None, typer.Option(help="success, failure or unknown.")] = None,
    actor: Annotated[str | None, typer.Option(help="Actor's id.")] = None,
    trace: Annotated[str | None, typer.Option(help="Trace id, 32 hexadecimal digits.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Started at or after: 2026-01-31, 2026-01-31T12:00, or 90m, 24h, 7d ago (UTC).")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Started before; written like --since.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Records a page.")] = 50,
    after: Annotated[str | None, typer.Option(help="Next page: the cursor that the page before ended with.")] = None,
    json: Json = False,
) -> None:
    """List records, newest first. Filters combine."""
    with _table(dsn, schema, table) as audit_table:
        page = audit_table.search(
            bank_id=bank,
            action=action,
            transport=transport,
            outcome=outcome,
            actor_id=actor,
            trace_id=trace,
            since=_instant(since, "--since"),
            until=_instant(until, "--until"),
            after=Cursor.parse(after) if after else None,
            limit=limit,
        )
    if json:
        for record in page.records:
            print(view.as_json(record))
    elif page.records:
        console = _console()
        columns = [column for column in view.LIST_COLUMNS if column != "trace" or console.width >= view.WIDE]
        console.print(view.records_table(page.records, columns))
    else:
        _say("no record fits")
    if page.next is not None:
        _say(f"there is more: --after '{page.next}'")


@app.command()
def show(
    record_id: Annotated[str, typer.Argument(metavar="ID", help="The record's id: audit.record.id on its span.")],
    dsn: Dsn = None,
    schema: Schema = settings.DEFAULT_SCHEMA,
    table: TableName = settings.DEFAULT_TABLE,
    json: Json = False,
) -> None:
    """Show everything that one record says."""
    with _table(dsn, schema, table) as audit_table:
        record = audit_table.get(record_id)
    if record is None:
        _fail(f"no record {record_id} in {schema}.{table}", NOT_FOUND)
    elif json:
        print(view.as_json(record))
    else:
        _console().print(view.record_details(record))


@app.command(name="set-aside")
def list_set_aside(
    dsn: Dsn = None,
    schema: Schema = settings.DEFAULT_SCHEMA,
    table: TableName = settings.DEFAULT_TABLE,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Records, at most.")] = 50,
    json: Json = False,
) -> None:
    """List the records that the table refused, newest first, each with the reason. --json has all of a record."""
    with _table(dsn, schema, table) as audit_table:
        refused = audit_table.set_aside(limit)
    if json:
        for row in refused:
            print(view.as_json(row))
    elif refused:
        _console().print(view.set_aside_table(refused))
    else:
        _say("nothing was set aside")


spool = typer.Typer(
    help="Look at the records that are on disk and not in the table yet, and write them.", no_args_is_help=True
)
app.add_typer(spool, name="spool")

SpoolDir = Annotated[
    Path | None,
    typer.Option(
        envvar=settings.PREFIX + "SPOOL_DIR",
        help="Directory of the spool; by default the one of this user's processes.",
        show_default=False,
    ),
]


@spool.command(name="status")
def spool_status(spool_dir: SpoolDir = None, json: Json = False) -> None:
    """Show what each process has in the spool: records, bytes, the oldest, and whether the process lives.

    What an ended process left is written by the next one with the same database and table, or by `spool replay`.
    """
    root = _spool_root(spool_dir)
    found = list(status(root))
    if json:
        for row in found:
            print(view.as_json(row))
    elif found:
        _console().print(spool_table(found))
    else:
        _say(f"the spool {root} is empty")


@spool.command(name="replay")
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
    with _dsn(dsn) as connection_string, Progress(console=Console(stderr=True), transient=True) as bar:
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


@app.command()
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
    with _dsn(dsn) as connection_string:
        exporter = AuditSpanExporter(
            dsn=connection_string, actions=(), mappings=(), schema=schema, table=table, migrate=migrate
        )
        counts = write_beside(root, exporter, destinations, stopped)
    _say(f"{counts['stored']} records are in the table, {counts['set_aside']} were set aside")


@contextmanager
def _dsn(dsn: str | None) -> Iterator[str]:
    """Give the connection string that a person has named, running an embedded server for as long as it is used."""
    if dsn is None:
        raise ConfigurationError("--dsn", f"no database named; give --dsn or set {settings.PREFIX}DSN")
    if not dsn.startswith(SCHEME):
        yield dsn
        return
    directory = dsn.removeprefix(SCHEME)
    with embedded_postgres(Path(directory) if directory else None) as running:
        yield running


def _spool_root(directory: Path | None) -> Path:
    if directory is not None and str(directory) == "off":  # the variable that says so is the application's
        raise ConfigurationError("--spool-dir", "the spool is 'off'; accepted is a directory")
    return directory or settings.default_spool_dir()


@contextmanager
def _table(dsn: str | None, schema: str, table: str) -> Iterator[AuditTable]:
    schema = settings.SETTINGS["schema"].accept(schema, "--schema")
    table = settings.SETTINGS["table"].accept(table, "--table")
    with ExitStack() as stack:
        audit_table = AuditTable(OwnConnection(stack.enter_context(_dsn(dsn))), schema=schema, table=table)
        stack.callback(audit_table.close)
        yield audit_table


_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def _instant(text: str | None, option: str) -> datetime | None:
    if text is None:
        return None
    try:
        if ago := re.fullmatch(r"(\d+)([smhdw])", text):
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        instant = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ConfigurationError(option, f"got {text!r}; accepted is 2026-01-31T12:00, or 24h or 7d for ago") from None
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def _console() -> Console:
    # A pipe has no width of its own: rich would take 80 columns and fold what another program reads by lines.
    return Console() if sys.stdout.isatty() else Console(width=200)


def _say(remark: str) -> None:
    """Say something about the output, where it isn't taken for output."""
    Console(stderr=True).print(remark, highlight=False, markup=False, soft_wrap=True)


def _fail(message: str, code: int) -> Any:
    _say(f"error: {message}")
    sys.exit(code)
