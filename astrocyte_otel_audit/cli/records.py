"""The commands that show records."""

from __future__ import annotations

from typing import Annotated

import typer

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.cli.options import (
    NOT_FOUND,
    Dsn,
    Json,
    Schema,
    TableName,
    fail,
    instant,
    new_console,
    opened,
    say,
    show_found,
)
from astrocyte_otel_audit.postgres import AuditTable, Cursor
from astrocyte_otel_audit.view import records as view


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
    with opened(AuditTable, dsn, schema, table) as audit_table:
        page = audit_table.search(
            bank_id=bank,
            action=action,
            transport=transport,
            outcome=outcome,
            actor_id=actor,
            trace_id=trace,
            since=instant(since, "--since"),
            until=instant(until, "--until"),
            after=Cursor.parse(after) if after else None,
            limit=limit,
        )
    if json:
        for record in page.records:
            print(view.as_json(record))
    elif page.records:
        console = new_console()
        columns = [column for column in view.LIST_COLUMNS if column != "trace" or console.width >= view.WIDE]
        console.print(view.records_table(page.records, columns))
    else:
        say("no record fits")
    if page.next is not None:
        say(f"there is more: --after '{page.next}'")


def show(
    record_id: Annotated[str, typer.Argument(metavar="ID", help="The record's id: audit.record.id on its span.")],
    dsn: Dsn = None,
    schema: Schema = settings.DEFAULT_SCHEMA,
    table: TableName = settings.DEFAULT_TABLE,
    json: Json = False,
) -> None:
    """Show everything that one record says."""
    with opened(AuditTable, dsn, schema, table) as audit_table:
        record = audit_table.get(record_id)
    if record is None:
        fail(f"no record {record_id} in {schema}.{table}", NOT_FOUND)
    elif json:
        print(view.as_json(record))
    else:
        new_console().print(view.record_details(record))


def list_set_aside(
    dsn: Dsn = None,
    schema: Schema = settings.DEFAULT_SCHEMA,
    table: TableName = settings.DEFAULT_TABLE,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Records, at most.")] = 50,
    json: Json = False,
) -> None:
    """List the records that the table refused, newest first, each with the reason. --json has all of a record."""
    with opened(AuditTable, dsn, schema, table) as audit_table:
        refused = audit_table.set_aside(limit)
    show_found(refused, view.set_aside_table, "nothing was set aside", json=json)
