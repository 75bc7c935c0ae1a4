"""A plain log becomes a partitioned one while it is written and read, and goes on as the same log."""

import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg import sql

from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from astrocyte_otel_audit.postgres.conversion import ConversionError, convert, plan
from astrocyte_otel_audit.postgres.layout import layout, name_of, period
from astrocyte_otel_audit.postgres.reader import plain_cursor
from tests.records import full_record, full_records
from tests.servers import emptied, role, role_prefix

LOG = "astrocyte_audit_log"
NOW = datetime.now(UTC)
#: What the plain table has, and the index on the id in its key's place.
INDEXES = {
    f"{LOG}_action_started_idx", f"{LOG}_bank_started_idx", f"{LOG}_id_idx", f"{LOG}_pkey", f"{LOG}_recorded_idx",
    f"{LOG}_started_idx", f"{LOG}_trace_idx",
}  # fmt: skip


def quickly(connection, unit="day", **arguments):
    return convert(connection, "public", LOG, unit, **{"pause": lambda seconds: None, **arguments})


def found(connection):
    with connection.transaction():
        return layout(plain_cursor(connection), "public", LOG)


def recent(count=1, ahead=timedelta(0), **changes):
    """Return records of just now, or of a later time."""
    return [
        full_record(1000 + number, started_at=NOW + ahead + timedelta(microseconds=number), **changes)
        for number in range(count)
    ]


def rows(connection, name=LOG):
    return connection.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(name))).fetchone()[0]


def indexes(connection, name=LOG):
    return {row[0] for row in connection.execute("SELECT indexname FROM pg_indexes WHERE tablename = %s", [name])}


def checks(connection):
    return connection.execute(
        "SELECT conname FROM pg_constraint WHERE contype = 'c' AND starts_with(conname, %s)", [f"{LOG}_before"]
    ).fetchall()


@contextmanager
def locked(database, name=LOG):
    """Keep everybody else from a table."""
    with psycopg.connect(database) as other:
        other.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(sql.Identifier(name)))
        yield


def test_an_empty_table_is_replaced_at_once(connection, table):
    assert quickly(connection) == ["made it a table partitioned by day"]
    now_found = found(connection)
    assert now_found.unit == "day"
    assert [each.name for each in now_found.partitions] == [
        *(name_of(LOG, "day", NOW + timedelta(days=days)) for days in range(8)), f"{LOG}_default",
    ]  # fmt: skip
    assert indexes(connection) == INDEXES
    assert table.append(recent(3)).stored == 3
    assert rows(connection, name_of(LOG, "day", NOW)) == 3


@pytest.mark.parametrize("unit", ["day", "week", "month"])
def test_a_table_with_rows_becomes_the_partition_of_what_is_there(connection, table, unit):
    before = [*full_records(50), *recent(5, trace_id="a" * 32)]
    table.append(before)
    told = []
    steps = quickly(connection, unit, progress=told.append)
    boundary = period(unit, period(unit, NOW)[1])[1]
    assert told == steps == [
        "built an index on (started_at, id)", "built an index on (id)",
        f"checked that all rows begin before {boundary:%Y-%m-%d}", f"made it a table partitioned by {unit}",
    ]  # fmt: skip
    first, *others, default = found(connection).partitions
    assert first == (f"{LOG}_before", None, boundary, False)
    assert [each.name for each in others[:1]] == [name_of(LOG, unit, boundary)]
    assert len(others) == 6
    assert default.is_default
    assert found(connection).unit == unit
    assert indexes(connection) == INDEXES
    assert {record.id for record in table.search(limit=100).records} == {record.id for record in before}
    assert checks(connection) == []


def test_the_old_table_is_neither_read_nor_indexed_while_others_wait(connection, table):
    table.append(full_records(500))
    messages = []
    connection.add_notice_handler(lambda message: messages.append(message.message_primary))
    connection.execute("SET client_min_messages = debug1")
    files = "SELECT relname, pg_relation_filenode(oid) FROM pg_class WHERE relname = ANY(%s)"
    old = dict(connection.execute(files, [[f"{LOG}_{index}_idx" for index in ("started", "trace", "recorded")]]))
    quickly(connection)
    assert any("is implied by existing constraints" in message for message in messages)
    attached = {
        child: (parent, connection.execute("SELECT pg_relation_filenode(%s::regclass)", [child]).fetchone()[0])
        for child, parent in connection.execute(
            "SELECT c.relname, p.relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid "
            "JOIN pg_class p ON p.oid = inhparent JOIN pg_index ON indexrelid = c.oid "
            "WHERE indrelid = %s::regclass",
            [f"{LOG}_before"],
        )
    }
    assert {parent for parent, _ in attached.values()} == INDEXES
    assert indexes(connection, f"{LOG}_before") == set(attached)  # none was built beside them
    assert {parent: file for parent, file in attached.values() if parent in old} == old


def test_rows_beyond_the_boundary_are_moved(connection, table):
    soon, late = recent(3, timedelta(days=4)), [full_record(9, started_at=datetime(2999, 1, 1, tzinfo=UTC))]
    table.append([*full_records(5), *soon, *late])
    assert quickly(connection)[-2:] == [
        "found rows that begin later, which are to be moved", "made it a table partitioned by day, and moved 4 rows",
    ]  # fmt: skip
    assert rows(connection, f"{LOG}_before") == 5
    assert rows(connection, name_of(LOG, "day", NOW + timedelta(days=4))) == 3
    assert rows(connection, f"{LOG}_default") == 1
    assert rows(connection) == 9


def test_a_start_at_infinity_is_moved_too(connection, table):
    table.append(full_records(2))
    connection.execute(f"INSERT INTO {LOG} (action, transport, started_at) VALUES ('x', 'x', 'infinity')")
    connection.execute(f"INSERT INTO {LOG} (action, transport, started_at) VALUES ('x', 'x', '-infinity')")
    quickly(connection)
    assert (rows(connection, f"{LOG}_before"), rows(connection, f"{LOG}_default")) == (3, 1)


def test_what_was_written_is_found_and_not_doubled(connection, table):
    records = [*full_records(20), *recent(1, trace_id="b" * 32)]
    table.append(records)
    quickly(connection)
    assert table.append(records).stored == 21
    assert rows(connection) == 21
    assert table.get(records[3].id).id == records[3].id
    page = table.search(limit=15)
    assert len(table.search(limit=15, after=page.next).records) == 6
    assert table.search(trace_id="b" * 32).records[0].id == records[-1].id


def test_what_has_no_partition_of_its_own_is_taken_all_the_same(connection, table):
    quickly(connection)
    strange = [full_record(year, started_at=datetime(year, 1, 1, tzinfo=UTC)) for year in (1970, 2999)]
    assert table.append(strange).stored == 2
    assert rows(connection, f"{LOG}_default") == 2


def test_migrating_finds_nothing_to_do(connection, table):
    table.append(full_records(2))
    quickly(connection)
    assert table.migrate() == []


def test_astrocytes_own_writer_goes_on(connection):
    quickly(connection)
    connection.execute(
        f"INSERT INTO {LOG} (action, transport, bank_id, metadata) VALUES ('recall', 'mcp', 'b', '{{}}')"
    )
    assert rows(connection) == 1


def test_rights_owner_and_comment_stay(database, connection, table):
    with role(database) as owner, role(database) as other, role_prefix(database) as prefix:
        owner_name, other_name = (psycopg.conninfo.conninfo_to_dict(dsn)["user"] for dsn in (owner, other))
        table.append(full_records(3))
        roles = table.grant_roles(role_prefix=prefix)
        names = {"owner": sql.Identifier(owner_name), "other": sql.Identifier(other_name)}
        for statement in (
            "GRANT CREATE, USAGE ON SCHEMA public TO {owner}",
            f"ALTER TABLE {LOG} OWNER TO {{owner}}",
            f"GRANT SELECT ON {LOG} TO {{other}} WITH GRANT OPTION",
            f"GRANT UPDATE (metadata) ON {LOG} TO {{other}}",
            f"COMMENT ON TABLE {LOG} IS 'it''s the log'",
            "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO {other}",
        ):
            connection.execute(sql.SQL(statement).format(**names))

        def entries(name):
            return set(connection.execute("SELECT unnest(relacl)::text FROM pg_class WHERE relname = %s", [name]))

        before = entries(LOG)
        quickly(connection)
        assert entries(LOG) == before
        assert (
            connection.execute(
                "SELECT attacl::text FROM pg_attribute WHERE attrelid = %s::regclass AND attname = 'metadata'", [LOG]
            )
            .fetchone()[0]
            .startswith(f"{{{other_name}=w")
        )
        assert connection.execute("SELECT obj_description(%s::regclass)", [LOG]).fetchone() == ("it's the log",)
        partitions = [each.name for each in found(connection).partitions]
        for name in partitions:
            assert {entry.partition("=")[0] for (entry,) in entries(name)} <= {owner_name}
        owners = connection.execute(
            "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relname = ANY(%s)", [[LOG, *partitions]]
        )
        assert owners.fetchall() == [(owner_name,)]
        connection.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(roles.writer), names["other"]))
        writer = AuditTable(OwnConnection(other))
        assert writer.append(recent(2, trace_id="c" * 32)).stored == 2
        writer.close()
        table.grant_roles(role_prefix=prefix)
        connection.execute(sql.SQL("ALTER TABLE {} OWNER TO CURRENT_USER").format(sql.Identifier(LOG)))
        connection.execute(
            sql.SQL("ALTER DEFAULT PRIVILEGES IN SCHEMA public REVOKE ALL ON TABLES FROM {other}").format(**names)
        )


def test_the_owner_needs_to_be_no_superuser(database, connection, table):
    with role(database, "CREATE, USAGE ON SCHEMA public") as owner:
        name = psycopg.conninfo.conninfo_to_dict(owner)["user"]
        connection.execute(sql.SQL("ALTER TABLE {} OWNER TO {}").format(sql.Identifier(LOG), sql.Identifier(name)))
        table.append(full_records(3))
        with psycopg.connect(owner, autocommit=True) as owners:
            quickly(owners)
        assert rows(connection) == 3


def test_a_table_of_another_name_in_another_schema(connection, module_database):
    other = AuditTable(OwnConnection(module_database), schema="Tenant-1", table="x" * 44)
    other.migrate(create_schema=True)
    other.append(full_records(3))
    convert(connection, "Tenant-1", "x" * 44, "month")
    assert len(other.search().records) == 3
    assert other.migrate() == []
    other.close()


def test_repeated_there_is_nothing_to_do(connection, table):
    table.append(full_records(3))
    quickly(connection)
    before = found(connection)
    assert quickly(connection) == []
    assert found(connection) == before
    assert plan(connection, "public", LOG, "day").is_partitioned


def test_writers_go_on_while_it_is_converted(connection, table, database):
    table.append(full_records(20_000))
    stop, written, failures = threading.Event(), [], []

    def write():
        writer, number = AuditTable(OwnConnection(database)), 100_000
        while not stop.is_set():
            batch = [full_record(number + each, started_at=datetime.now(UTC)) for each in range(10)]
            result = writer.append(batch)
            if result.stored != 10:
                failures.append(result)
            written.extend(record.id for record in batch)
            number += 10
        writer.close()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        quickly(connection)
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert written
    assert rows(connection) == 20_000 + len(written)
    assert rows(connection, f"{LOG}_set_aside") == 0


def test_rows_that_come_after_the_look_for_an_empty_table_are_kept(connection, table, monkeypatch):
    from astrocyte_otel_audit.postgres.conversion import _Preparation

    honest = _Preparation.is_empty

    def is_empty(self):
        answer = honest(self)
        table.append(full_records(3))
        return answer

    monkeypatch.setattr(_Preparation, "is_empty", is_empty)
    assert len(quickly(connection)) == 4
    assert rows(connection) == 3


def test_a_lock_that_is_not_to_be_had_leaves_the_table_as_it_was(connection, table, database):
    table.append(full_records(3))
    quickly_made = []

    def lock(step):
        quickly_made.append(step)
        if step.startswith("checked"):
            other.execute(f"LOCK TABLE {LOG} IN ROW SHARE MODE")

    pauses = []
    with psycopg.connect(database) as other, pytest.raises(psycopg.errors.LockNotAvailable):
        quickly(connection, lock_timeout_seconds=0.02, attempts=3, progress=lock, pause=pauses.append)
    assert len(pauses) == 2
    assert found(connection) is None
    connection.execute(f"INSERT INTO {LOG} (action, transport) VALUES ('x', 'x')")
    assert quickly(connection)[0].startswith("checked"), "its indexes were there already"
    assert rows(connection) == 4


def test_what_was_killed_is_taken_up_again(connection, table):
    table.append(full_records(3))
    # A build that failed leaves its index, and one that was killed a check of another day.
    connection.execute(f"CREATE TABLE twins AS SELECT * FROM {LOG}")
    connection.execute(f"CREATE INDEX CONCURRENTLY {LOG}_before_id ON {LOG} (id)")
    connection.execute(f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{LOG}_before_id'::regclass")
    connection.execute(
        f"ALTER TABLE {LOG} ADD CONSTRAINT {LOG}_before_20260102 CHECK (started_at < '2026-05-01') NOT VALID"
    )
    quickly(connection)
    assert rows(connection) == 3
    assert indexes(connection, f"{LOG}_before") >= {f"{LOG}_before_pkey", f"{LOG}_before_id"}
    assert checks(connection) == []


def test_an_error_leaves_no_check_behind(connection, table):
    table.append(full_records(3))

    def stop(step):
        if step.startswith("checked"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quickly(connection, progress=stop)
    assert checks(connection) == []


REFUSED = {
    "triggers": (
        (
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
            f"CREATE TRIGGER t BEFORE INSERT ON {LOG} FOR EACH ROW EXECUTE FUNCTION f()"
        ),
        "it has triggers",
    ),
    "row security": (f"ALTER TABLE {LOG} ENABLE ROW LEVEL SECURITY", "it has row security"),
    "a foreign key": (f"CREATE TABLE notes (id uuid REFERENCES {LOG})", "a foreign key leads to it"),
    "a publication": (f"CREATE PUBLICATION p FOR TABLE {LOG}", "it is in a publication"),
    "a child": (f"CREATE TABLE child () INHERITS ({LOG})", "it inherits"),
    "a view": (f"CREATE VIEW v AS SELECT id FROM {LOG}", "a view or rule"),
    "a unique index": (f"CREATE UNIQUE INDEX u ON {LOG} (trace_id)", "a unique index"),
    "a constraint": (f"ALTER TABLE {LOG} ADD CONSTRAINT c CHECK (action <> '') NOT VALID", "is not validated"),
    "unlogged": (f"ALTER TABLE {LOG} SET UNLOGGED", "it is unlogged"),
    "a name": (f"CREATE TABLE {LOG}_before ()", f"a table {LOG}_before is in the way"),
    "no audit log": (f"DROP TABLE {LOG}; CREATE TABLE {LOG} (id uuid)", "is it an audit log?"),
    "no table": (f"DROP TABLE {LOG}; CREATE VIEW {LOG} AS SELECT 1 AS id", "it is no table"),
}


@pytest.mark.parametrize(("statements", "words"), REFUSED.values(), ids=REFUSED)
def test_what_a_new_table_would_lack_is_refused(connection, statements, words):
    connection.execute(statements)
    with pytest.raises(ConversionError, match="can't be partitioned") as raised:
        quickly(connection)
    assert words in str(raised.value)
    planned = plan(connection, "public", LOG, "day")
    assert any(words in obstacle for obstacle in planned.obstacles)
    assert planned.steps == []


def test_who_does_not_own_it_is_refused(database, connection):
    with (
        role(database, f"ALL ON {LOG}") as stranger,
        psycopg.connect(stranger, autocommit=True) as strangers,
        pytest.raises(ConversionError, match="belongs to another role"),
    ):
        quickly(strangers)


def test_a_table_that_is_not_there_is_refused(module_database):
    with (
        psycopg.connect(emptied(module_database), autocommit=True) as connection,
        pytest.raises(ConversionError, match="does not exist"),
    ):
        quickly(connection)


def test_the_plan_says_what_is_done_and_who_waits(connection, table):
    assert [step.waits for step in plan(connection, "public", LOG, "day").steps] == [
        "writers and readers, for milliseconds"
    ]
    table.append(full_records(300))
    connection.execute(f"ANALYZE {LOG}")
    planned = plan(connection, "public", LOG, "week")
    assert planned.rows == 300
    assert planned.bytes > 0
    assert [step.waits for step in planned.steps] == ["nobody", "nobody", "writers and readers, for milliseconds"]
    assert f"{period('week', period('week', NOW)[1])[1]:%Y-%m-%d}" in planned.steps[-1].does
    table.append(recent(1, timedelta(days=300)))
    planned = plan(connection, "public", LOG, "day")
    assert [step.waits for step in planned.steps] == [
        "nobody", "writers and readers, for about 1 s, as the table is read once",
    ]  # fmt: skip
    assert found(connection) is None
    assert indexes(connection) == INDEXES - {f"{LOG}_id_idx"}
