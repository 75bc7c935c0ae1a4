"""Reading: what was asked for, newest first, page by page, and nothing is changed by it."""

import itertools
import json
import operator
import uuid
from datetime import UTC, datetime, timedelta, timezone

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from astrocyte_otel_audit import ConfigurationError
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.postgres import AuditTable, Cursor, OwnConnection, PooledConnections, reader
from tests.records import BASE, bare_record, full_record, full_records
from tests.servers import emptied, emptied_and_migrated, new_database, role

SECOND = timedelta(seconds=1)
EARLIEST, LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
#: A table that could not be reached: what it refuses, it refuses before anything runs.
UNCONNECTED = AuditTable(OwnConnection("host=/nowhere"))


def varied_records():
    """Return a record for every combination of what a search can filter by."""
    values = itertools.product(["b1", "b2"], ["retain", "recall"], ["http", "mcp"], ["success", "failure"], ["a", "b"])
    return [
        full_record(number, bank_id=bank, action=action, transport=transport, outcome=outcome, actor_id=actor)
        for number, (bank, action, transport, outcome, actor) in enumerate(values)
    ]


def newest_first(records):
    return [record.id for record in sorted(records, key=operator.attrgetter("started_at", "id"), reverse=True)]


def found(page):
    return [record.id for record in page.records]


def pages(table, limit, between=lambda: None, **filters):
    """Yield the pages of a search one after the other, a hundred at most."""
    after = None
    for _ in range(100):
        page = table.search(limit=limit, after=after, **filters)
        yield page
        if page.next is None:
            return
        between()
        after = page.next
    pytest.fail("the pages have no end")


class TestFilters:
    @pytest.mark.parametrize(
        "wanted",
        [
            {},
            {"bank_id": "b1"},
            {"action": "recall"},
            {"transport": "mcp"},
            {"outcome": "failure"},
            {"actor_id": "b"},
            {"trace_id": f"{5:032x}"},
            {"bank_id": "b2", "action": "retain"},
            {"bank_id": "b2", "outcome": "failure", "actor_id": "a"},
            {"bank_id": "b1", "action": "retain", "transport": "http", "outcome": "success", "actor_id": "a"},
            {"bank_id": "b1", "trace_id": f"{0:032x}"},
        ],
        ids=lambda wanted: ", ".join(wanted) or "none",
    )
    def test_every_filter_must_match(self, varied_table, wanted):
        page = varied_table.search(**wanted)

        matching = [record for record in varied_records() if all(getattr(record, k) == v for k, v in wanted.items())]
        assert matching != []
        assert found(page) == newest_first(matching)

    @pytest.mark.parametrize("name", ["bank_id", "action", "transport", "outcome", "actor_id", "trace_id"])
    @pytest.mark.parametrize("value", ["", "no such thing", "b%", "'; DROP TABLE astrocyte_audit_log; --"])
    def test_what_nothing_equals_finds_nothing(self, unchanged_table, name, value):
        assert unchanged_table.search(**{name: value}).records == []

    def test_a_text_that_had_to_be_mended_is_found_as_it_was_given(self, table):
        names = ["bank_id", "action", "transport", "outcome", "actor_id", "trace_id"]
        pairs = list(itertools.product(names, ["a\x00b", "\ud800", "x" * 100_000]))
        records = [full_record(number, **{name: text}) for number, (name, text) in enumerate(pairs)]
        table.append(records)

        assert [found(table.search(**{name: text})) for name, text in pairs] == [[record.id] for record in records]

    def test_a_trace_id_may_be_in_capitals(self, table):
        table.append([full_record(0xABC)])

        assert found(table.search(trace_id=f"{0xABC:032X}")) == [full_record(0xABC).id]

    @pytest.mark.parametrize(
        ("since", "until", "numbers"),
        [
            (1, 3, [2, 1]),
            (7, None, [9, 8, 7]),
            (None, 3, [2, 1, 0]),
            (2, 2, []),
            (3, 1, []),
            (10, None, []),
            (None, 0, []),
            (0, 10, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        ],
    )
    def test_a_range_of_time_holds_its_start_and_not_its_end(self, unchanged_table, since, until, numbers):
        bounds = {
            name: BASE + number * SECOND
            for name, number in (("since", since), ("until", until))
            if number is not None
        }  # fmt: skip

        assert found(unchanged_table.search(**bounds)) == [full_record(number).id for number in numbers]

    def test_a_range_of_time_is_exact_to_the_microsecond_and_in_any_zone(self, unchanged_table):
        last = full_record(9)
        just = last.started_at.astimezone(timezone(timedelta(hours=5, minutes=45)))

        assert found(unchanged_table.search(since=just, until=just + timedelta(microseconds=1))) == [last.id]
        assert found(unchanged_table.search(since=just + timedelta(microseconds=1))) == []

    def test_a_range_of_time_goes_with_other_filters(self, varied_table):
        page = varied_table.search(bank_id="b1", since=BASE + 4 * SECOND, until=BASE + 20 * SECOND)

        assert found(page) == newest_first(varied_records()[4:16])


class TestPages:
    @pytest.mark.parametrize("limit", [1, 3, 9, 10, 11])
    def test_pages_give_each_record_once_newest_first(self, unchanged_table, limit):
        seen = [found(page) for page in pages(unchanged_table, limit)]

        assert list(itertools.chain(*seen)) == newest_first(full_records(10))
        assert [len(page) for page in seen[:-1]] == [limit] * (len(seen) - 1)
        assert seen[-1] != []

    def test_records_of_one_instant_are_each_given_once(self, table):
        records = full_records(25, started_at=BASE)
        table.append(records)

        seen = [record_id for page in pages(table, 7) for record_id in found(page)]

        assert seen == newest_first(records)

    def test_records_that_come_in_between_two_pages_move_nothing(self, table):
        records = [full_record(number, started_at=BASE + number // 5 * SECOND) for number in range(25)]
        table.append(records)
        late = iter(range(100, 200))

        def newer():
            table.append([full_record(next(late), started_at=BASE + timedelta(hours=1))])

        seen = [record_id for page in pages(table, 7, between=newer) for record_id in found(page)]

        assert seen == newest_first(records)

    def test_pages_keep_to_their_filters(self, varied_table):
        seen = [found(page) for page in pages(varied_table, 3, bank_id="b1", outcome="failure")]

        matching = [record for record in varied_records() if (record.bank_id, record.outcome) == ("b1", "failure")]
        assert list(itertools.chain(*seen)) == newest_first(matching)

    def test_the_last_page_names_no_next(self, unchanged_table):
        assert unchanged_table.search(limit=9).next is not None
        assert unchanged_table.search(limit=10).next is None

    def test_a_page_of_nothing_names_no_next(self, unchanged_table):
        page = unchanged_table.search(bank_id="no such bank")

        assert (page.records, page.next) == ([], None)

    def test_a_cursor_survives_being_printed(self, unchanged_table):
        page = unchanged_table.search(limit=8)

        again = Cursor.parse(str(page.next))

        assert again == page.next
        assert found(unchanged_table.search(after=again)) == [full_record(1).id, full_record(0).id]

    @pytest.mark.parametrize("limit", [0, -1, 10_001, 1.0, "5", True, None])
    def test_a_limit_out_of_bounds_is_refused(self, limit):
        with pytest.raises(ConfigurationError, match=r"limit: got .* from 1 to 10,000"):
            UNCONNECTED.search(limit=limit)

    @pytest.mark.parametrize("limit", [1, 10_000])
    def test_a_limit_within_bounds_is_taken(self, unchanged_table, limit):
        assert len(unchanged_table.search(limit=limit).records) == min(limit, 10)


class TestCursor:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "/",
            "nonsense",
            f"2026-01-02T03:04:05+00:00{uuid.UUID(int=1)}",
            "2026-01-02T03:04:05+00:00/",
            "2026-01-02T03:04:05+00:00/nonsense",
            f"2026-01-02T03:04:05/{uuid.UUID(int=1)}",
            f"nonsense/{uuid.UUID(int=1)}",
            f"2026-01-02T03:04:05+00:00/{uuid.UUID(int=1)}; DROP TABLE astrocyte_audit_log",
        ],
    )
    def test_a_text_that_is_no_cursor_is_refused(self, text):
        with pytest.raises(ConfigurationError, match="after: not a cursor"):
            Cursor.parse(text)

    @pytest.mark.parametrize(
        "instant",
        [datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999_999, UTC), BASE],
        ids=str,
    )
    def test_a_cursor_of_any_instant_can_be_printed_and_parsed(self, instant):
        cursor = Cursor(instant, str(uuid.UUID(int=7)))

        assert Cursor.parse(str(cursor)) == cursor


class TestRefusals:
    @pytest.mark.parametrize("name", ["since", "until"])
    def test_a_time_without_a_zone_is_refused(self, name):
        with pytest.raises(ConfigurationError, match=f"{name}: has no time zone"):
            UNCONNECTED.search(**{name: datetime(2026, 1, 1)})

    @pytest.mark.parametrize("schema", ['public"; --', "pg_catalog", "a b", "t" * 64])
    def test_a_name_that_is_no_schemas_is_refused(self, schema):
        with pytest.raises(ConfigurationError, match="schema: "):
            UNCONNECTED.search(schema=schema)
        with pytest.raises(ConfigurationError, match="schema: "):
            UNCONNECTED.get(str(uuid.UUID(int=1)), schema=schema)

    def test_a_missing_table_says_what_to_do(self, module_database):
        table = AuditTable(OwnConnection(emptied(module_database)))

        with pytest.raises(DatabaseUnavailableError, match="run `astrocyte-otel-audit migrate`") as refusal:
            table.search()

        assert refusal.value.sqlstate == "42P01"
        table.close()

    def test_a_missing_tenant_says_what_to_do(self, unchanged_table):
        with pytest.raises(DatabaseUnavailableError, match="run `astrocyte-otel-audit migrate`"):
            unchanged_table.get(str(uuid.UUID(int=1)), schema="tenant_b")

    def test_a_table_that_astrocyte_made_and_nobody_upgraded_says_what_to_do(self, table, connection):
        connection.execute("ALTER TABLE astrocyte_audit_log DROP COLUMN outcome")

        with pytest.raises(DatabaseUnavailableError, match="run `astrocyte-otel-audit migrate`"):
            table.search()

    def test_a_role_that_may_not_read_is_told_what_to_grant(self, database):
        with role(database, "USAGE ON SCHEMA public", "INSERT ON astrocyte_audit_log") as dsn:
            writer = AuditTable(OwnConnection(dsn))
            with pytest.raises(DatabaseUnavailableError, match="SELECT to read"):
                writer.search()
            writer.close()

    def test_a_locked_table_is_waited_for_no_longer_than_a_statement_may_take(self, database, connection):
        table = AuditTable(OwnConnection(database), statement_timeout_seconds=0.05)

        with connection.transaction():
            connection.execute("LOCK TABLE astrocyte_audit_log IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(DatabaseUnavailableError, match=r"the table(?: is)? locked"):
                table.search()

        assert table.search().records == []
        table.close()


class TestRows:
    def test_a_row_of_astrocytes_own_writer_comes_back(self, table, connection):
        row_id = str(uuid.uuid4())
        connection.execute(
            "INSERT INTO astrocyte_audit_log (id, action, transport, started_at) VALUES (%s, 'retain', 'system', %s)",
            [row_id, BASE],
        )

        (record,) = table.search().records

        expected = bare_record(id=row_id, action="retain", transport="system", schema="public")
        assert record._replace(recorded_at=None) == expected
        assert record == table.get(row_id)

    def test_a_tenants_rows_are_its_own(self, table):
        table.migrate("Tenant_A", create_schema=True)
        table.append([full_record(0), full_record(1, schema="Tenant_A")])

        assert found(table.search()) == [full_record(0).id]
        (theirs,) = table.search(schema="Tenant_A").records
        assert (theirs.id, theirs.schema) == (full_record(1).id, "Tenant_A")

    def test_a_lent_pool_with_rows_as_dicts_will_do(self, database):
        with ConnectionPool(database, min_size=1, max_size=1, kwargs={"row_factory": dict_row}) as pool:
            table = AuditTable(PooledConnections(pool))
            table.append(full_records(2))

            assert found(table.search()) == newest_first(full_records(2))

    def test_reading_changes_nothing(self, table, connection):
        """A view of the table's name that writes whenever it is read."""
        connection.execute(
            """
            CREATE TABLE written (n integer);
            ALTER TABLE astrocyte_audit_log RENAME TO renamed;
            CREATE FUNCTION write() RETURNS text LANGUAGE sql VOLATILE
            AS $$ INSERT INTO written VALUES (1) RETURNING 'x' $$;
            """
        )
        names = [row.name for row in connection.execute("SELECT * FROM renamed LIMIT 0").description]
        selected = sql.SQL(", ").join(
            sql.SQL("write() AS transport") if name == "transport" else sql.Identifier(name) for name in names
        )
        connection.execute("INSERT INTO renamed (action, transport) VALUES ('recall', 'http')")
        connection.execute(sql.SQL("CREATE VIEW astrocyte_audit_log AS SELECT {} FROM renamed").format(selected))

        with pytest.raises(DatabaseUnavailableError) as refusal:
            table.search()

        assert refusal.value.sqlstate == "25006"
        assert connection.execute("SELECT count(*) FROM written").fetchone() == (0,)

    def test_the_application_may_write_with_a_pool_that_was_read_with(self, database):
        with ConnectionPool(database, min_size=1, max_size=1) as pool:
            AuditTable(PooledConnections(pool)).search()

            with pool.connection() as lent:
                assert lent.execute("SHOW transaction_read_only").fetchone() == ("off",)
                assert lent.execute("SHOW statement_timeout").fetchone() == ("0",)


class TestGet:
    @pytest.mark.parametrize("spell", [str, str.upper, lambda record_id: record_id.replace("-", ""), "  {}\n".format])
    def test_a_record_is_found_by_its_id_however_it_is_spelt(self, unchanged_table, spell):
        assert unchanged_table.get(spell(full_record(1).id)).bank_id == "bank-1"

    def test_an_id_that_no_row_has_finds_none(self, unchanged_table):
        assert unchanged_table.get(full_record(10).id) is None

    @pytest.mark.parametrize("record_id", ["", "1", "g" * 32, "0" * 31, "0" * 33, "'; --", "\x00" * 32, "٣" * 32])
    def test_what_is_no_id_is_refused(self, record_id):
        with pytest.raises(ConfigurationError, match="id: not a record's id; accepted is a UUID"):
            UNCONNECTED.get(record_id)

    def test_a_record_of_another_tenant_is_found_in_its_schema_only(self, table):
        table.migrate("tenant_b", create_schema=True)
        table.append([full_record(schema="tenant_b")])

        assert table.get(full_record().id) is None
        assert table.get(full_record().id, schema="tenant_b") == table.search(schema="tenant_b").records[0]


def test_instants_that_no_datetime_can_hold_are_read_as_the_nearest_that_one_can(table, connection):
    connection.execute(
        """
        INSERT INTO astrocyte_audit_log (action, transport, started_at, ended_at)
        VALUES ('late', 'x', 'infinity', '20000-01-01'), ('early', 'x', '-infinity', '0044-03-15 BC')
        """
    )

    late, early = table.search().records

    assert (late.action, late.started_at, late.ended_at) == ("late", LATEST, LATEST)
    assert (early.action, early.started_at, early.ended_at) == ("early", EARLIEST, EARLIEST)


class RecordingCursor(psycopg.Cursor):
    """Keeps the last statement with parameters, which is what a search is."""

    last = None

    def execute(self, query, params=None, **options):
        if params is not None:
            type(self).last = (query, params)
        return super().execute(query, params, **options)


def nodes(plan):
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


@pytest.fixture
def plan(large_database, monkeypatch):
    """A function from a search's arguments to the nodes of its plan on 20,000 rows."""
    monkeypatch.setattr(reader, "plain_cursor", RecordingCursor)
    table = AuditTable(OwnConnection(large_database))
    with psycopg.connect(large_database, autocommit=True) as connection:

        def explain(**arguments):
            table.search(**arguments)
            query, parameters = RecordingCursor.last
            explained = connection.execute(sql.SQL("EXPLAIN (FORMAT JSON) ") + query, parameters)
            return list(nodes(explained.fetchone()[0][0]["Plan"]))

        yield explain
    table.close()


class TestPlans:
    @pytest.mark.parametrize(
        ("arguments", "index"),
        [
            ({"bank_id": "bank-7"}, "astrocyte_audit_log_bank_started_idx"),
            ({"bank_id": "bank-7", "outcome": "success"}, "astrocyte_audit_log_bank_started_idx"),
            ({"action": "rare"}, "astrocyte_audit_log_action_started_idx"),
            ({"trace_id": f"{7:032x}"}, "astrocyte_audit_log_trace_idx"),
            ({}, "astrocyte_audit_log_started_idx"),
            ({"until": BASE - timedelta(hours=5)}, "astrocyte_audit_log_started_idx"),
        ],
        ids=lambda value: (", ".join(value) or "no filter") if isinstance(value, dict) else value,
    )
    def test_a_search_reads_an_index_and_never_the_whole_table(self, plan, arguments, index):
        scans = [node for node in plan(**arguments) if "Scan" in node["Node Type"]]

        assert [node.get("Index Name") for node in scans] == [index]

    def test_a_later_page_reads_an_index_too(self, plan):
        cursor = Cursor(BASE - timedelta(hours=2), str(uuid.UUID(int=7)))

        scans = [node for node in plan(bank_id="bank-7", after=cursor) if "Scan" in node["Node Type"]]

        assert [node.get("Index Name") for node in scans] == ["astrocyte_audit_log_bank_started_idx"]


@pytest.fixture(scope="module")
def unchanged_database(server_dsn):
    """DSN of a migrated database for tests that change nothing in it."""
    with new_database(server_dsn) as dsn:
        yield emptied_and_migrated(dsn)


@pytest.fixture(scope="module")
def unchanged_table(unchanged_database):
    """A table with ten records that stay as they are."""
    table = AuditTable(OwnConnection(unchanged_database))
    table.append(full_records(10))
    yield table
    table.close()


@pytest.fixture(scope="module")
def varied_table(unchanged_database):
    """A table, in a tenant's schema, with a record for every combination of what a search can filter by."""
    table = AuditTable(OwnConnection(unchanged_database), schema="varied")
    table.migrate(create_schema=True)
    table.append(varied_records())
    yield table
    table.close()


@pytest.fixture(scope="module")
def large_database(server_dsn):
    """DSN of a database with 20,000 rows, a second apart, of 50 banks; one row in 2,000 is a rare action."""
    with new_database(server_dsn) as dsn:
        with psycopg.connect(emptied_and_migrated(dsn), autocommit=True) as connection:
            connection.execute(
                """
                INSERT INTO astrocyte_audit_log (action, transport, bank_id, started_at, trace_id, outcome, request)
                SELECT CASE WHEN n %% 2000 = 0 THEN 'rare' ELSE 'recall' END, 'http', 'bank-' || n %% 50,
                       %s::timestamptz - n * interval '1 second', lpad(to_hex(n), 32, '0'), 'success', %s::jsonb
                FROM generate_series(1, 20000) AS n
                """,
                [BASE, json.dumps({"query": {"length": 42}})],
            )
            connection.execute("ANALYZE astrocyte_audit_log")
        yield dsn
