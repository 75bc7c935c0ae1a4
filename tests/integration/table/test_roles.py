"""Each role may do what it is for and nothing else, whoever makes it and whatever was granted before."""

import json
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from astrocyte_otel_audit import ConfigurationError, audit_operation, cli, settings
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection, Roles, RolesError
from astrocyte_otel_audit.postgres.holds import AuditHolds
from astrocyte_otel_audit.postgres.migrate import _lock_key
from astrocyte_otel_audit.postgres.roles import grant_roles
from tests.records import full_record, full_records
from tests.servers import drop_roles, emptied_and_migrated, new_database, role, role_prefix

RELATIONS = LOG, SET_ASIDE, MIGRATIONS, HOLDS = tuple(
    f"astrocyte_audit_log{suffix}" for suffix in ("", "_set_aside", "_migrations", "_holds")
)
PRIVILEGES = ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"]
#: By the kind of role: what it may do with the table and with its side table.
RIGHTS = {"writer": ["INSERT"], "reader": ["SELECT"], "sweeper": ["SELECT", "DELETE"]}
#: The same with the holds.
HOLDS_RIGHTS = {"writer": [], "reader": ["SELECT"], "sweeper": ["SELECT"]}
NO_RIGHTS = {relation: [] for relation in RELATIONS}


@pytest.fixture
def prefix(database):
    """What the names of one test's roles begin with."""
    with role_prefix(database) as prefix:
        yield prefix


@contextmanager
def opened(dsn, **arguments):
    """A table over a connection of somebody else's."""
    table = AuditTable(OwnConnection(dsn), **arguments)
    try:
        yield table
    finally:
        table.close()


def execute(connection, statement, *names):
    """Run a statement with names in it, quoted."""
    return connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def user_of(dsn):
    return conninfo_to_dict(dsn)["user"]


def member_of(name):
    """A grant of `tests.servers.role`."""
    return sql.Identifier(name).as_string(None)


def rights(connection, name, schema="public"):
    """Return, by table, all that a role may do with it, with any column of it."""
    version = connection.info.server_version
    found = {}
    for relation in RELATIONS:
        regclass = sql.Identifier(schema, relation).as_string(None)
        found[relation] = [
            privilege
            for privilege in [*PRIVILEGES, *(["MAINTAIN"] if version >= 170_000 else [])]
            if connection.execute("SELECT has_table_privilege(%s, %s, %s)", [name, regclass, privilege]).fetchone()[0]
        ]
        for privilege in ("SELECT", "INSERT", "UPDATE", "REFERENCES"):
            of_column = connection.execute("SELECT has_any_column_privilege(%s, %s, %s)", [name, regclass, privilege])
            assert of_column.fetchone()[0] == (privilege in found[relation])
    return found


def expected(kind):
    return {LOG: RIGHTS[kind], SET_ASIDE: RIGHTS[kind], MIGRATIONS: [], HOLDS: HOLDS_RIGHTS[kind]}


def assert_exact(connection, roles, schema="public"):
    for kind, name in roles._asdict().items():
        assert rights(connection, name, schema) == expected(kind)
        usage = connection.execute("SELECT has_schema_privilege(%s, %s, 'USAGE')", [name, schema])
        assert usage.fetchone() == (True,)


def refused(dsn, *statements):
    """Say whether a role lacks the right to each of some statements."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statement in statements:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)
    return True


def partitioned(connection):
    """Put a partitioned table in place of the log."""
    connection.execute(f"""
        ALTER TABLE {LOG} RENAME TO {LOG}_before;
        CREATE TABLE {LOG} (LIKE {LOG}_before INCLUDING DEFAULTS, PRIMARY KEY (started_at, id))
            PARTITION BY RANGE (started_at);
        CREATE TABLE {LOG}_2026 PARTITION OF {LOG} FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
        CREATE TABLE {LOG}_default PARTITION OF {LOG} DEFAULT;
        DROP TABLE {LOG}_before
    """)


def rows(connection, relation=LOG):
    return execute(connection, "SELECT count(*) FROM {}", relation).fetchone()[0]


def test_each_role_has_its_rights_and_no_others(table, connection, prefix):
    roles = table.grant_roles(role_prefix=prefix)

    assert roles == Roles(f"{prefix}_writer", f"{prefix}_reader", f"{prefix}_sweeper")
    assert_exact(connection, roles)
    can = connection.execute(
        "SELECT rolname, rolcanlogin OR rolsuper OR rolcreaterole OR rolcreatedb OR rolbypassrls OR rolreplication"
        " FROM pg_roles WHERE starts_with(rolname, %s)",
        [prefix],
    )
    assert dict(can.fetchall()) == dict.fromkeys(roles, False)


def test_the_names_of_the_roles_have_a_default(connection):
    names = Roles("astrocyte_audit_writer", "astrocyte_audit_reader", "astrocyte_audit_sweeper")
    with connection.transaction(force_rollback=True):  # the server may be somebody's who has these roles
        assert grant_roles(connection, "public", LOG, settings.DEFAULT_ROLE_PREFIX) == names
        assert_exact(connection, names)


def test_the_next_step_is_a_statement_that_can_be_run(table, connection, prefix):
    assert Roles.named("astrocyte_audit").next_step == "GRANT astrocyte_audit_writer TO app_user"
    roles = table.grant_roles(role_prefix=prefix)
    assert roles.next_step == f'GRANT "{prefix}_writer" TO app_user'


def test_repeating_changes_nothing(table, connection, prefix):
    roles = table.grant_roles(role_prefix=prefix)
    before = connection.execute("SELECT relname, relacl FROM pg_class WHERE relacl IS NOT NULL ORDER BY oid").fetchall()

    assert table.grant_roles(role_prefix=prefix) == roles

    after = connection.execute("SELECT relname, relacl FROM pg_class WHERE relacl IS NOT NULL ORDER BY oid").fetchall()
    assert after == before


def test_a_whole_pipeline_writes_as_the_writer_and_can_change_nothing(
    table, database, connection, audit, provider, prefix
):
    roles = table.grant_roles(role_prefix=prefix)
    connection.execute(f"ALTER TABLE {LOG} ADD CHECK (action <> 'refused')")
    with role(database, member_of(roles.writer)) as dsn:
        processor = audit(dsn=dsn)
        for action in ("retain", "recall", "refused"):
            with audit_operation(action, bank_id="user-calvin", tracer_provider=provider):
                pass
        processor.force_flush()
        processor.shutdown()

        assert connection.execute(f"SELECT action FROM {LOG} ORDER BY started_at").fetchall() == [
            ("retain",),
            ("recall",),
        ]
        assert connection.execute(f"SELECT action FROM {SET_ASIDE}").fetchall() == [("refused",)]
        for relation in (LOG, SET_ASIDE):
            assert refused(
                dsn,
                f"UPDATE {relation} SET action = 'nothing'",
                f"DELETE FROM {relation}",
                f"TRUNCATE {relation}",
                f"SELECT id FROM {relation}",
                f"INSERT INTO {relation} SELECT * FROM {relation}",
                f"DROP TABLE {relation}",
                f"ALTER TABLE {relation} DISABLE TRIGGER ALL",
            )
        assert refused(dsn, f"SELECT * FROM {MIGRATIONS}", f"INSERT INTO {MIGRATIONS} VALUES (9, 'x')")
        assert refused(dsn, f"SELECT * FROM {HOLDS}", f"INSERT INTO {HOLDS} (bank_id, reason) VALUES ('a', 'b')")


def test_a_writer_that_writes_a_record_twice_keeps_the_first(table, database, connection, prefix):
    roles = table.grant_roles(role_prefix=prefix)
    with role(database, member_of(roles.writer)) as dsn, opened(dsn) as written:
        assert written.check() is None
        assert written.append(full_records(3)).stored == 3
        assert written.append([full_record(0, bank_id="another")]).stored == 1

    assert sorted(record.bank_id for record in table.search().records) == ["bank-0", "bank-1", "bank-2"]


def test_the_reader_runs_what_reads_and_can_write_nothing(table, database, connection, prefix, capsys, monkeypatch):
    roles = table.grant_roles(role_prefix=prefix)
    connection.execute(f"ALTER TABLE {LOG} ADD CHECK (action <> 'refused')")
    table.append([full_record(0), full_record(1, action="refused")])
    with role(database, member_of(roles.reader)) as dsn:
        said = []
        for arguments in (["list"], ["show", full_record(0).id], ["set-aside"]):
            monkeypatch.setattr(sys, "argv", ["astrocyte-otel-audit", *arguments, "--json", "--dsn", dsn])
            with pytest.raises(SystemExit) as ended:
                cli.run()
            assert ended.value.code in (0, None)
            said.append(json.loads(capsys.readouterr().out)["id"])

        assert said == [full_record(0).id, full_record(0).id, full_record(1).id]
        for relation in (LOG, SET_ASIDE):
            assert refused(
                dsn, f"UPDATE {relation} SET action = 'x'", f"DELETE FROM {relation}", f"TRUNCATE {relation}"
            )
        with opened(dsn) as read:
            assert read.check().sqlstate == "42501"
    assert (rows(connection), rows(connection, SET_ASIDE)) == (1, 1)


def test_the_sweeper_deletes_what_is_old_and_can_write_nothing(table, database, connection, prefix):
    roles = table.grant_roles(role_prefix=prefix)
    table.append(full_records(4))
    connection.execute(f"INSERT INTO {SET_ASIDE} VALUES (gen_random_uuid(), 'recall', '', NULL, '', '2020-01-01')")
    with role(database, member_of(roles.sweeper)) as dsn:
        with psycopg.connect(dsn, autocommit=True) as sweeping:
            deleted = sweeping.execute(
                f"DELETE FROM {LOG} WHERE id IN (SELECT id FROM {LOG} ORDER BY started_at LIMIT 3) RETURNING bank_id"
            )
            assert sorted(deleted.fetchall()) == [("bank-0",), ("bank-1",), ("bank-2",)]
            assert sweeping.execute(f"DELETE FROM {SET_ASIDE} WHERE set_aside_at < now()").rowcount == 1
        for relation in (LOG, SET_ASIDE):
            assert refused(dsn, f"UPDATE {relation} SET action = 'x'", f"TRUNCATE {relation}")
        with opened(dsn) as read:
            assert [record.bank_id for record in read.search().records] == ["bank-3"]
            assert read.check().sqlstate == "42501"


@pytest.mark.parametrize("kind", ["reader", "sweeper"])
def test_who_reads_or_sweeps_sees_the_holds_and_can_neither_add_nor_release_one(
    table, database, connection, prefix, kind
):
    roles = table.grant_roles(role_prefix=prefix)
    owners = AuditHolds(OwnConnection(database))
    kept = owners.add(bank_id="user-calvin", reason="case 7")
    with role(database, member_of(getattr(roles, kind))) as dsn:
        holds = AuditHolds(OwnConnection(dsn))
        assert holds.list() == [kept]
        for change in (lambda: holds.release(kept.id), lambda: holds.add(bank_id="b", reason="mine")):
            with pytest.raises(DatabaseUnavailableError, match="added and released by the table's owner"):
                change()
        assert refused(
            dsn,
            f"UPDATE {HOLDS} SET released_at = now()",
            f"DELETE FROM {HOLDS}",
            f"TRUNCATE {HOLDS}",
            f"ALTER TABLE {HOLDS} DISABLE TRIGGER ALL",
        )
        holds.close()
    assert owners.list() == [kept]
    owners.close()


def test_of_a_partitioned_table_the_partitions_can_only_be_reached_by_way_of_it(table, database, connection, prefix):
    partitioned(connection)
    for name in (f"{LOG}_2026", f"{LOG}_default"):
        connection.execute(f"GRANT ALL ON {name} TO PUBLIC")
    roles = table.grant_roles(role_prefix=prefix)

    assert_exact(connection, roles)
    with role(database, member_of(roles.sweeper)) as dsn, psycopg.connect(dsn, autocommit=True) as sweeping:
        table.append([full_record(0), full_record(1)])
        assert sweeping.execute(f"DELETE FROM {LOG} WHERE bank_id = 'bank-0'").rowcount == 1
        assert refused(dsn, f"DELETE FROM {LOG}_2026", f"SELECT FROM {LOG}_2026", f"DROP TABLE {LOG}_2026")
    with role(database, member_of(roles.writer)) as dsn, opened(dsn) as written:
        assert written.append([full_record(2)]).stored == 1
        assert refused(dsn, f"UPDATE {LOG}_2026 SET action = 'x'", f"TRUNCATE {LOG}_2026", f"SELECT FROM {LOG}_2026")


def test_a_right_on_a_partition_that_can_not_be_revoked_is_told(table, database, connection, prefix):
    partitioned(connection)
    roles = table.grant_roles(role_prefix=prefix)
    with role(database) as other, psycopg.connect(other, autocommit=True) as third:
        execute(connection, "GRANT UPDATE ON {} TO {} WITH GRANT OPTION", f"{LOG}_2026", user_of(other))
        execute(third, "GRANT UPDATE ON {} TO {}", f"{LOG}_2026", roles.writer)

        with pytest.raises(RolesError, match=f'^"{roles.writer}" may also UPDATE {LOG}_2026'):
            table.grant_roles(role_prefix=prefix)

        execute(third, "REVOKE UPDATE ON {} FROM {}", f"{LOG}_2026", roles.writer)


def test_rights_that_were_granted_before_are_revoked(table, connection, prefix):
    roles = table.grant_roles(role_prefix=prefix)
    for relation in RELATIONS:
        for name in roles:
            execute(connection, "GRANT ALL ON {} TO {} WITH GRANT OPTION", relation, name)
        connection.execute(f"GRANT ALL ON {relation} TO PUBLIC")
    execute(connection, "GRANT UPDATE (bank_id), REFERENCES (action) ON {} TO {}", LOG, roles.writer)
    connection.execute(f"GRANT UPDATE (outcome) ON {LOG} TO PUBLIC")

    table.grant_roles(role_prefix=prefix)

    assert_exact(connection, roles)
    # Not of PUBLIC either.
    left = "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attacl IS NOT NULL"
    assert connection.execute(left, [LOG]).fetchall() == []


def test_what_a_writer_has_handed_on_is_revoked_with_its_own(table, database, connection, prefix):
    roles = table.grant_roles(role_prefix=prefix)
    execute(connection, "GRANT UPDATE ON {} TO {} WITH GRANT OPTION", LOG, roles.writer)
    with role(database) as other:
        handed = user_of(other)
        with connection.transaction():
            execute(connection, "SET LOCAL ROLE {}", roles.writer)
            execute(connection, "GRANT UPDATE ON {} TO {}", LOG, handed)

        table.grant_roles(role_prefix=prefix)

        assert_exact(connection, roles)
        assert rights(connection, handed)[LOG] == []


def test_a_right_that_cannot_be_revoked_is_told(table, database, connection, prefix):
    roles = table.grant_roles(role_prefix=prefix)
    with role(database) as other, psycopg.connect(other, autocommit=True) as third:
        execute(connection, "GRANT UPDATE ON {} TO {} WITH GRANT OPTION", LOG, user_of(other))
        execute(third, "GRANT UPDATE (action) ON {} TO {}", LOG, roles.writer)
        connection.execute(f"GRANT TRIGGER ON {LOG} TO PUBLIC")

        with pytest.raises(RolesError, match=f'^"{roles.writer}" may also UPDATE {LOG}'):
            table.grant_roles(role_prefix=prefix)

        # Nothing was changed: neither is what could have been revoked.
        kept = connection.execute("SELECT has_table_privilege(%s, %s, 'TRIGGER')", [roles.reader, LOG])
        assert kept.fetchone() == (True,)
        execute(third, "REVOKE UPDATE (action) ON {} FROM {}", LOG, roles.writer)


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("ALTER ROLE {writer} SUPERUSER", "may also"),
        ("ALTER TABLE astrocyte_audit_log_set_aside OWNER TO {writer}", "may also ALTER"),
        ("GRANT {sweeper} TO {writer}", "may also"),
        ("GRANT pg_write_all_data TO {writer}", "may also"),
        ("ALTER ROLE {writer} LOGIN", "is a role that may log in"),
    ],
)
def test_a_role_that_is_more_than_it_should_be_is_told(table, connection, prefix, statement, told):
    roles = table.grant_roles(role_prefix=prefix)
    names = {kind: sql.Identifier(name) for kind, name in roles._asdict().items()}
    connection.execute(sql.SQL(statement).format(**names))

    with pytest.raises(RolesError) as refusal:
        table.grant_roles(role_prefix=prefix)

    connection.execute(f"ALTER TABLE {SET_ASIDE} OWNER TO CURRENT_USER")
    assert f'"{roles.writer}" {told}' in str(refusal.value)
    assert "choose another prefix" in str(refusal.value)


def test_tenants_share_the_roles(table, database, connection, prefix):
    for schema in ("tenant_a", 'te"nant; --'):
        table.migrate(schema, create_schema=True)
    roles = table.grant_roles(role_prefix=prefix)

    assert rights(connection, roles.writer, "tenant_a") == NO_RIGHTS
    for schema in ("tenant_a", 'te"nant; --'):
        assert table.grant_roles(schema, role_prefix=prefix) == roles

    for schema in ("public", "tenant_a", 'te"nant; --'):
        assert_exact(connection, roles, schema)
    with role(database, member_of(roles.writer)) as dsn, opened(dsn) as written:
        assert written.append([full_record(0), full_record(1, schema="tenant_a")]).schemas == {"public", "tenant_a"}


def test_a_tenant_may_have_roles_of_its_own(table, connection, prefix):
    table.migrate("tenant_a", create_schema=True)
    table.grant_roles(role_prefix=prefix)

    roles = table.grant_roles("tenant_a", role_prefix=f"{prefix}-a")

    assert_exact(connection, roles, "tenant_a")
    assert rights(connection, roles.reader) == NO_RIGHTS


ONE_OF_MANY = """
import sys
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection

table = AuditTable(OwnConnection(sys.argv[1]), schema=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(*table.grant_roles(role_prefix=sys.argv[3]), flush=True)
table.close()
"""


def test_ten_processes_of_two_databases_may_grant_at_once(server_dsn, database, connection, prefix):
    with new_database(server_dsn) as other, ExitStack() as stack:
        with opened(emptied_and_migrated(other)) as table:
            table.migrate("tenant_a", create_schema=True)
        with opened(database) as table:
            table.migrate("tenant_a", create_schema=True)
        places = [
            (dsn, schema)
            for dsn in (database, other)
            for schema in ("public", "public", "public", "tenant_a", "tenant_a")
        ]
        processes = [
            stack.enter_context(subprocess.Popen(
                [sys.executable, "-c", ONE_OF_MANY, dsn, schema, prefix],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            ))
            for dsn, schema in places
        ]  # fmt: skip
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 10
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=30)[0].strip() for process in processes]
        roles = Roles.named(prefix)

        assert [process.returncode for process in processes] == [0] * 10
        assert said == [" ".join(roles)] * 10
        for dsn in (database, other):
            with psycopg.connect(dsn) as looking:
                assert_exact(looking, roles)
                assert_exact(looking, roles, "tenant_a")


def test_a_role_that_somebody_makes_meanwhile_is_taken(server_dsn, database, connection, prefix):
    making = """
import sys
from astrocyte_otel_audit.postgres import AuditTable, OwnConnection

print(*AuditTable(OwnConnection(sys.argv[1])).grant_roles(role_prefix=sys.argv[2]), flush=True)
"""
    with psycopg.connect(server_dsn) as other:  # in a transaction of another database
        execute(other, "CREATE ROLE {}", f"{prefix}_reader")
        with subprocess.Popen(
            [sys.executable, "-c", making, database, prefix], stdout=subprocess.PIPE, text=True
        ) as one:
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
            while connection.execute(waiting).fetchone() == (0,):
                assert one.poll() is None
            other.commit()
            assert one.communicate(timeout=30)[0].split() == list(Roles.named(prefix))

    assert_exact(connection, Roles.named(prefix))


def test_granting_waits_for_a_migration_as_long_as_for_a_statement(database, connection, prefix):
    with opened(database, statement_timeout_seconds=0.1) as table:
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [_lock_key("public")])
            with pytest.raises(psycopg.errors.LockNotAvailable):
                table.grant_roles(role_prefix=prefix)
        with connection.transaction():
            connection.execute(f"LOCK TABLE {LOG} IN ROW EXCLUSIVE MODE")  # as whoever writes at the time
            assert table.grant_roles(role_prefix=prefix) == Roles.named(prefix)


@contextmanager
def operator(connection, database, *grants):
    """Make a role that may log in, owns the tables and is no superuser; give its name and its DSN."""
    with role(database, "CREATE ON SCHEMA public", *grants) as dsn:
        name = user_of(dsn)
        for relation in RELATIONS:
            execute(connection, "ALTER TABLE {} OWNER TO {}", relation, name)
        yield name, dsn


def test_an_owner_that_may_create_roles_needs_not_be_superuser(database, connection, prefix):
    with operator(connection, database) as (name, dsn), opened(dsn) as owned, role(database) as service:
        execute(connection, "ALTER ROLE {} CREATEROLE", name)

        roles = owned.grant_roles(role_prefix=prefix)
        assert owned.grant_roles(role_prefix=prefix) == roles
        with psycopg.connect(dsn, autocommit=True) as next_step:
            next_step.execute(roles.next_step.replace("app_user", user_of(service)))

        assert_exact(connection, roles)
        with opened(service) as written:
            assert written.append([full_record(0)]).stored == 1
        assert refused(service, f"DELETE FROM {LOG}", f"SELECT FROM {LOG}")
        drop_roles(database, prefix)


def test_an_owner_without_createrole_is_told_what_to_run_and_the_table_stays(database, connection, prefix):
    roles = Roles.named(prefix)
    execute(connection, "CREATE ROLE {}", roles.reader)
    with operator(connection, database) as (_, dsn), opened(dsn) as owned:
        with pytest.raises(RolesError) as refusal:
            owned.grant_roles(role_prefix=prefix)

        told = str(refusal.value)
        assert "needs CREATEROLE" in told
        assert len(told.splitlines()) == 1
        assert f'`CREATE ROLE "{roles.writer}"; CREATE ROLE "{roles.sweeper}"`' in told
        assert owned.search().records == []
        connection.execute(told.split("`")[1])
        assert owned.grant_roles(role_prefix=prefix) == roles
        assert_exact(connection, roles)


def test_who_does_not_own_the_table_is_told_who_has_to(table, database, connection, prefix):
    with role(database) as stranger:
        execute(connection, "ALTER ROLE {} CREATEROLE", user_of(stranger))
        for grant in (None, "INSERT", "SELECT"):  # of whom may do something, Postgres only warns
            if grant:
                execute(connection, f"GRANT {grant} ON {', '.join(RELATIONS)} TO {{}}", user_of(stranger))
            with opened(stranger) as strange, pytest.raises(RolesError, match="as the owner of the tables and their"):
                strange.grant_roles(role_prefix=prefix)

    assert connection.execute("SELECT FROM pg_roles WHERE starts_with(rolname, %s)", [prefix]).fetchall() == []


def test_a_schema_that_cannot_be_opened_to_the_roles_is_told(database, connection, prefix):
    connection.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
    with operator(connection, database, "USAGE ON SCHEMA public") as (name, dsn), opened(dsn) as owned:
        execute(connection, "ALTER ROLE {} CREATEROLE", name)
        with pytest.raises(RolesError, match="can't be given USAGE on schema public"):
            owned.grant_roles(role_prefix=prefix)


def test_a_table_that_is_not_there_is_no_matter_of_rights(database, connection, prefix):
    with pytest.raises(psycopg.errors.UndefinedTable), opened(database, table="nowhere") as nowhere:
        nowhere.grant_roles(role_prefix=prefix)

    assert connection.execute("SELECT FROM pg_roles WHERE starts_with(rolname, %s)", [prefix]).fetchall() == []


def test_no_roles_without_a_server():
    with opened("postgresql://127.0.0.1:1/nowhere") as table, pytest.raises(DatabaseUnavailableError):
        table.grant_roles()


@pytest.mark.parametrize(
    "hostile",
    ['a"b', "a'b", "100%", "%s", "{writer}", "a b", "a;b", "", "1a", "ä", "a\x00b", "pg_audit", "a" * 56, None],
)
def test_a_prefix_that_cannot_begin_a_name_is_refused(table, hostile):
    with pytest.raises(ConfigurationError) as refusal:
        table.grant_roles(role_prefix=hostile)

    told = str(refusal.value)
    assert told.startswith("role_prefix: got ")
    assert (repr(hostile) if isinstance(hostile, str) else "NoneType") in told
    assert "accepted is a name of 1 to 55 letters, digits" in told or "belong to Postgres" in told


def test_the_longest_prefix_makes_names_that_are_not_cut(table, connection, prefix):
    longest = prefix + "$" * (55 - len(prefix))

    roles = table.grant_roles(role_prefix=longest)

    assert [len(name) for name in roles] == [62, 62, 63]
    assert_exact(connection, roles)


@pytest.mark.parametrize(
    "hostile", ['"; DROP TABLE astrocyte_audit_log; --', "'; SELECT", "100% %s %(x)s", "{writer} {", "$$"]
)
def test_names_are_quoted_where_they_are_not_checked_either(connection, prefix, hostile):
    roles = grant_roles(connection, "public", LOG, prefix + hostile)

    assert roles.writer == f"{prefix}{hostile}_writer"
    assert_exact(connection, roles)
