"""The commands that set the log up, and find out what is wrong with it."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import Annotated

import typer

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.cli.options import Dsn, Json, Schema, TableName, database, new_console, opened, say
from astrocyte_otel_audit.cli.partitioning import partition, show_plan, unit_of
from astrocyte_otel_audit.embedded import SCHEME
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.postgres import AuditTable
from astrocyte_otel_audit.view import records as view


def demo(dsn: Dsn = None) -> None:
    """Run a real Astrocyte brain, sampled at 10 %, and show that every operation became a row.

    Without --dsn, a Postgres is started from its wheel; nothing has to be installed or cleaned up.
    """
    from astrocyte_otel_audit.demo import run_demo

    console = new_console()
    place = dsn or SCHEME
    with database(place) as connection_string:
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
    partition_by: Annotated[
        str | None,
        typer.Option(metavar="day|week|month", help="Also make it a partitioned table, while it is written and read."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --partition-by: say what would be done, and do nothing.")
    ] = False,
) -> None:
    """Create the table, or upgrade the one that Astrocyte's migration 023 or an older release made.

    Safe to repeat, and to run from many processes at once. The role needs CREATE on the schema, or to own the table;
    the role that writes the log needs no more than INSERT afterwards.

    With --roles it makes three roles that can't log in, with these rights on the
    table and its side table, and no others: astrocyte_audit_writer may INSERT,
    astrocyte_audit_reader may SELECT, astrocyte_audit_sweeper may SELECT, DELETE.
    The last two also see what is on hold; holding and releasing is the owner's.
    Whatever else they, or PUBLIC, could do with the tables is revoked. It needs
    CREATEROLE where a role is missing, and to own the tables.

    Then let the login role of your service, which must not own the tables, write
    and do nothing else: GRANT astrocyte_audit_writer TO app_user.
    Roles are the whole server's: all schemas and databases share these, unless
    --role-prefix names others.

    With --partition-by the table becomes one partition of a new one, and others
    are made ahead: expired records then go by dropping a partition, at once. Look
    first: migrate --partition-by month --dry-run. It needs the table's owner, and
    is safe to interrupt and to repeat.
    """
    prefix = settings.role_prefix(settings.DEFAULT_ROLE_PREFIX if role_prefix is None else role_prefix, "--role-prefix")
    if role_prefix is not None and not roles:
        raise ConfigurationError("--role-prefix", f"got {role_prefix!r} without --roles; accepted is it with --roles")
    unit = None if partition_by is None else unit_of(partition_by)
    console = new_console()
    if dry_run:
        if unit is None:
            raise ConfigurationError("--dry-run", "given without --partition-by; accepted is it with that")
        show_plan(dsn, schema, table, unit)
        return
    with opened(AuditTable, dsn, schema, table) as audit_table:
        for name in audit_table.migrate(create_schema=create_schema):
            console.print(f"applied {name}", highlight=False)
        console.print(f"{schema}.{table} is up to date", highlight=False)
    if unit is not None:
        partition(dsn, schema, table, unit)
    if roles:
        with opened(AuditTable, dsn, schema, table) as audit_table:
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

    with database(dsn) if dsn and dsn.strip() else nullcontext(None) as connection_string:
        examination = Examination(connection_string, schema, table, spool_dir, actions, canary, timeout)
        console, found = new_console(), []
        for finding in examine(examination):
            found.append(finding)
            if json:
                print(view.as_json(finding), flush=True)
            elif sys.stdout.isatty():
                console.print(styled_line(*finding))
            else:
                print(plain_line(*finding), flush=True)
    say(summary((finding.check, finding.status) for finding in found))
    raise typer.Exit(exit_status(found))
