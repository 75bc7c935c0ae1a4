"""The commands over legal holds."""

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
    opened,
    say,
    show_found,
)
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres.holds import AuditHolds, Hold
from astrocyte_otel_audit.view.records import as_json
from astrocyte_otel_audit.view.retention import criteria, holds_table
from astrocyte_otel_audit.view.tables import moment

app = typer.Typer(
    help="Keep records from being deleted, whatever the retention policy says, and let them go again.",
    no_args_is_help=True,
)


@app.command(name="add")
def add_hold(
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the hold later.")],
    dsn: Dsn = None,
    schema: Schema = settings.DEFAULT_SCHEMA,
    table: TableName = settings.DEFAULT_TABLE,
    bank: Annotated[str | None, typer.Option(help="Memory bank.")] = None,
    actor: Annotated[str | None, typer.Option(help="Actor's id.")] = None,
    trace: Annotated[str | None, typer.Option(help="Trace id, 32 hexadecimal digits.")] = None,
    json: Json = False,
) -> None:
    """Keep all records that fit, those to come included, until the hold is released. Several criteria must all fit.

    Once it has ended, no sweep deletes such a record any more; what one has deleted
    before is gone. It needs the table's owner.

    Example: hold add --bank user-calvin --reason 'case 7, until the verdict'
    """
    with opened(AuditHolds, dsn, schema, table) as holds:
        hold = holds.add(bank_id=bank, actor_id=actor, trace_id=trace, reason=reason)
        fits = _fits(holds, hold)
    if json:
        print(as_json(hold))
    else:
        print(f"hold {hold.id} keeps every record of {criteria(hold)}; it ends with: hold release {hold.id}")
    if fits is False:
        say("no record that is there fits it: check the names, unless it is for records to come")


@app.command(name="list")
def list_holds(
    dsn: Dsn = None,
    schema: Schema = settings.DEFAULT_SCHEMA,
    table: TableName = settings.DEFAULT_TABLE,
    all_: Annotated[bool, typer.Option("--all", help="Also those that were released.")] = False,
    json: Json = False,
) -> None:
    """List the holds, who added each, when and why, and with --all who released which.

    Example: hold list --all --json
    """
    with opened(AuditHolds, dsn, schema, table) as holds:
        found = holds.list(include_released=all_)
    show_found(found, holds_table, "nothing is held", json=json)


@app.command(name="release")
def release_hold(
    hold_id: Annotated[int, typer.Argument(metavar="ID", help="The hold's id, as `hold list` shows it.", min=1)],
    dsn: Dsn = None,
    schema: Schema = settings.DEFAULT_SCHEMA,
    table: TableName = settings.DEFAULT_TABLE,
    json: Json = False,
) -> None:
    """End a hold. Records of it that are expired, and held by no other, go with the next sweep. It stays in the list.

    It needs the table's owner.

    Example: hold release 7
    """
    with opened(AuditHolds, dsn, schema, table) as holds:
        hold = holds.release(hold_id)
    if hold is None:
        fail(f"no hold {hold_id} in {schema}.{table}", NOT_FOUND)
    elif json:
        print(as_json(hold))
    else:
        print(f"hold {hold.id}, of {criteria(hold)}, was released at {moment(hold.released_at)} UTC")


def _fits(holds: AuditHolds, hold: Hold) -> bool | None:
    """Say whether a record fits a hold; None where that can't be said, which is no reason to take the hold for none."""
    try:
        page = holds.search(bank_id=hold.bank_id, actor_id=hold.actor_id, trace_id=hold.trace_id, limit=1)
    except DatabaseUnavailableError:
        return None
    return bool(page.records)
