"""The commands that show what a log takes, and delete what is expired."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.cli.evidence import evidence
from astrocyte_otel_audit.cli.options import (
    NOT_DONE,
    UNAVAILABLE,
    Dsn,
    Json,
    Schema,
    TableName,
    database,
    fail,
    new_console,
    opened,
    say,
)
from astrocyte_otel_audit.cli.policy import policy_of
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.pipeline.retention import RetentionTask
from astrocyte_otel_audit.postgres import OwnConnection
from astrocyte_otel_audit.postgres.storage import AuditStorage
from astrocyte_otel_audit.postgres.sweep import AuditSweeper, Expiring
from astrocyte_otel_audit.retention import ACTION, RULES, RetentionPolicy
from astrocyte_otel_audit.view.records import as_json
from astrocyte_otel_audit.view.retention import expiring_table, swept_json, swept_table, unfinished
from astrocyte_otel_audit.view.storage import storage_json, storage_page

_VARIABLES = settings.PREFIX + "RETENTION_"
#: Seconds: a person who has asked for a run wants all of it, and can interrupt it.
_AS_LONG_AS_IT_TAKES: Final = 1e9


def stats(
    dsn: Dsn = None,
    schema: Schema = settings.DEFAULT_SCHEMA,
    table: TableName = settings.DEFAULT_TABLE,
    storage: Annotated[bool, typer.Option("--storage", help="What the log takes of the server.")] = False,
    json: Json = False,
) -> None:
    """Show how many records there are, what they take on disk, and how many are about to expire.

    Up to a million rows are counted; of more it says about how many, by the
    server's own statistics. What expires is by the policy of the environment, as
    for purge. It needs the right to read the table, and changes nothing.

    Example: stats --storage
    """
    if not storage:
        raise ConfigurationError("stats", "say of what: accepted is --storage")
    with opened(AuditStorage, dsn, schema, table) as measured:
        found = measured.storage(policy_of())
    if json:
        print(storage_json(found))
    else:
        new_console().print(storage_page(found))


def purge(
    context: typer.Context,
    dsn: Dsn = None,
    days: Annotated[str | None, typer.Option(metavar="N", help="Days that records are kept; or forever.")] = None,
    action: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="In place of --days, for an action: recall=30. May be repeated."),
    ] = None,
    bank: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="In place of --days, for a bank: user-calvin=365. May be repeated."),
    ] = None,
    minimum_days: Annotated[
        str | None,
        typer.Option(metavar="N|RULE", help=f"Refuse to keep for less: days, or a rule: {', '.join(RULES)}."),
    ] = None,
    schema: Annotated[
        list[str] | None,
        typer.Option(help="Schema of a tenant; may be repeated.", show_default="all that hold the table"),
    ] = None,
    table: TableName = settings.DEFAULT_TABLE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be deleted and why; delete none.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask, as in a script.")] = False,
    json: Json = False,
) -> None:
    """Delete the records that are older than a policy allows, now, and leave a record of that in the log.

    The policy is that of the environment, OTEL_ASTROCYTE_AUDIT_RETENTION_DAYS,
    _ACTIONS, _BANKS and _MINIMUM_DAYS, with what options say in its place. Where
    an action and a bank are both named, the longer time holds. What is on hold
    stays. Look first with --dry-run; on a terminal you are shown it and asked.

    It needs the rights of astrocyte_audit_sweeper, and to drop partitions those
    of the tables' owner; and for the record of the run, whose id it tells in the
    end, those of astrocyte_audit_writer. One role can be a member of both. Or
    OTEL_ASTROCYTE_AUDIT_RETENTION_DSN names the one who sweeps, where the one
    who writes is in OTEL_ASTROCYTE_AUDIT_DSN and not in --dsn. Safe to interrupt
    and to repeat.

    Example: purge --days 365 --action recall=30 --dry-run
    """
    policy = policy_of(days, action or (), bank or (), minimum_days)
    if not policy.expires:
        raise ConfigurationError(
            "--days", f"nothing expires by this policy; give --days, --action or --bank, or set {_VARIABLES}DAYS"
        )
    home = settings.resolve("schema")
    table = settings.SETTINGS["table"].accept(table, "--table")
    chosen = [settings.identifier(name, "--schema") for name in schema] if schema else None
    with ExitStack() as stack:
        place = stack.enter_context(database(dsn))
        # Only beside the variable that it belongs to: whoever names a database has no other one in mind.
        is_named = getattr(context.get_parameter_source("dsn"), "name", None) == "COMMANDLINE"
        sweeping = None if is_named else settings.resolve("retention_dsn")
        sweeper = AuditSweeper(OwnConnection(sweeping or place), schema=home, table=table)
        stack.callback(sweeper.close)
        expiring, is_whole = _expiring(sweeper, policy, chosen)
        if dry_run:
            _show(expiring, json=json)
        elif not expiring:
            say("nothing is expired")
        else:
            _ask(expiring, yes=yes)
            is_whole &= _purge(place, sweeper, policy, chosen, expiring, json=json)
    if not is_whole:
        raise typer.Exit(UNAVAILABLE)


def _expiring(
    sweeper: AuditSweeper, policy: RetentionPolicy, schemas: Sequence[str] | None
) -> tuple[list[Expiring], bool]:
    """Return what is expired, and whether every schema could be looked at; says of which not, and why."""
    cutoffs, found, is_whole = policy.cutoffs(sweeper.now()), list[Expiring](), True
    tenants = sweeper.tenants(schemas)
    for tenant in tenants:
        if tenant.fault is None:
            found += (row for row in sweeper.preview(tenant.schema, cutoffs) if row.rows)
        else:
            is_whole = False
            say(f"{tenant.schema} is left alone: {tenant.fault}")
    if not tenants:
        fail(f"no schema holds a table {sweeper.table}; run `astrocyte-otel-audit migrate`", UNAVAILABLE)
    return found, is_whole


def _show(expiring: Sequence[Expiring], *, json: bool) -> None:
    if json:
        for row in expiring:
            print(as_json(row))
    elif expiring:
        new_console().print(expiring_table(expiring))
    say(f"{sum(row.rows for row in expiring):,} records would be deleted; none was")


def _ask(expiring: Sequence[Expiring], *, yes: bool) -> None:
    """Let a person who sees what will go say so, or end."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigurationError(
            "--yes", "nobody can be asked where this is no terminal; look with --dry-run, then give it"
        )
    Console(stderr=True).print(expiring_table(expiring))
    if not typer.confirm(f"Delete these {sum(row.rows for row in expiring):,} records for good?", err=True):
        fail("nothing was deleted", NOT_DONE)


def _purge(
    dsn: str,
    sweeper: AuditSweeper,
    policy: RetentionPolicy,
    schemas: Sequence[str] | None,
    expiring: Sequence[Expiring],
    *,
    json: bool,
) -> bool:
    """Do one run, however long it takes, and say what has come of it; False where something is left."""
    with (
        evidence(dsn, sweeper.schema, sweeper.table, ACTION) as tracer,
        Progress(
            TextColumn("deleting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
        ) as bar,
    ):  # fmt: skip
        shown = bar.add_task("rows", total=sum(row.rows for row in expiring))
        task = RetentionTask(
            sweeper,
            replace(policy, budget_seconds=_AS_LONG_AS_IT_TAKES),
            schemas=schemas,
            tracer=lambda: tracer,
        )
        run = task.run(lambda rows: bar.advance(shown, rows))
    if json:
        for row in run.swept:
            print(swept_json(row))
    else:
        new_console().print(swept_table(run.swept))
    return not any(unfinished(row) for row in run.swept)
