"""Partitions are made before they are needed, no record is refused for want of one, and expired ones go whole."""

import itertools
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone

import psycopg
import pytest
from psycopg import sql

from astrocyte_otel_audit.postgres import AuditTable, OwnConnection
from astrocyte_otel_audit.postgres.conversion import convert
from astrocyte_otel_audit.postgres.dropping import Dropped, Kept, drop_expired
from astrocyte_otel_audit.postgres.layout import Partition, layout, mark, name_of, period, periods
from astrocyte_otel_audit.postgres.partitions import AHEAD, make_ahead
from astrocyte_otel_audit.postgres.reader import plain_cursor
from tests.faults.server import wait_until
from tests.records import full_record
from tests.servers import emptied_and_migrated, role

LOG = "astrocyte_audit_log"
DEFAULT = f"{LOG}_default"
#: A Wednesday.
NOW = datetime(2026, 3, 4, 5, 6, tzinfo=UTC)
TODAY = datetime(2026, 3, 4, tzinfo=UTC)
KEY = 4711
HELD = Kept(sql.SQL("l.bank_id = %(bank)s"), {"bank": "held"})


def day(number):
    """Return the begin of a day, counted from today."""
    return TODAY + timedelta(days=number)


@pytest.fixture
def plain_database(module_database):
    """DSN of the module's database with a new plain table."""
    return emptied_and_migrated(module_database)


@pytest.fixture
def database(plain_database):
    """The same, with a table that has yesterday's partition, and DEFAULT."""
    with psycopg.connect(plain_database, autocommit=True) as connection:
        convert(connection, "public", LOG, "day")
        for (name,) in connection.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = %s::regclass", [LOG]
        ).fetchall():
            if name != DEFAULT:
                connection.execute(f"DROP TABLE {name}")
        attach(connection, day(-1), day(0))
    return plain_database


def attach(connection, lower, upper, name=None):
    """Make a partition by hand; give its name."""
    name = name or name_of(LOG, "day", lower)
    connection.execute(
        sql.SQL("CREATE TABLE {} PARTITION OF {} FOR VALUES FROM ({}) TO ({})").format(
            sql.Identifier(name), sql.Identifier(LOG), lower, upper
        )
    )
    return name


def ahead(connection, now=NOW, **arguments):
    return make_ahead(connection, "public", LOG, now, **{"pause": lambda seconds: None, **arguments})


def dropping(connection, cutoff, **arguments):
    return drop_expired(connection, "public", LOG, cutoff, **{"key": KEY, "pause": lambda seconds: None, **arguments})


def found(connection):
    with connection.transaction():
        return layout(plain_cursor(connection), "public", LOG)


_numbers = itertools.count()


def names(connection):
    return [each.name for each in found(connection).bounded]


def rows(connection, name=LOG):
    return connection.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(name))).fetchone()[0]


def exists(connection, name):
    return connection.execute("SELECT to_regclass(%s)", [name]).fetchone()[0] is not None


def at(*instants, **changes):
    """Return a record for each instant."""
    return [full_record(next(_numbers), started_at=instant, **changes) for instant in instants]


@contextmanager
def locked(database, name=LOG, mode="ROW EXCLUSIVE"):
    """Hold a lock on a table, as a writer does that does not end."""
    with psycopg.connect(database) as other:
        other.execute(sql.SQL("LOCK TABLE ONLY {} IN {} MODE").format(sql.Identifier(name), sql.SQL(mode)))
        yield other


PERIODS = [
    ("day", (2026, 11, 24, 15), "p20261124", (2026, 11, 24), (2026, 11, 25)),
    ("day", (2026, 12, 31, 23), "p20261231", (2026, 12, 31), (2027, 1, 1)),
    ("day", (2028, 2, 29, 0), "p20280229", (2028, 2, 29), (2028, 3, 1)),
    ("week", (2026, 11, 24, 15), "w20261123", (2026, 11, 23), (2026, 11, 30)),
    ("week", (2027, 1, 3, 23), "w20261228", (2026, 12, 28), (2027, 1, 4)),
    ("week", (2027, 1, 4, 0), "w20270104", (2027, 1, 4), (2027, 1, 11)),
    ("month", (2026, 11, 24, 15), "m202611", (2026, 11, 1), (2026, 12, 1)),
    ("month", (2026, 12, 31, 23), "m202612", (2026, 12, 1), (2027, 1, 1)),
    ("month", (2028, 2, 29, 0), "m202802", (2028, 2, 1), (2028, 3, 1)),
]


@pytest.mark.parametrize(("unit", "instant", "suffix", "lower", "upper"), PERIODS)
def test_a_period_has_its_name_and_its_bounds(unit, instant, suffix, lower, upper):
    instant = datetime(*instant, tzinfo=UTC)
    assert period(unit, instant) == (datetime(*lower, tzinfo=UTC), datetime(*upper, tzinfo=UTC))
    assert name_of("log", unit, instant) == f"log_{suffix}"


@pytest.mark.parametrize("unit", ["day", "week", "month"])
def test_periods_follow_one_another(unit):
    several = list(periods(unit, datetime(2026, 12, 30, 12, tzinfo=UTC), 30))
    assert len(several) == 30
    assert all(before[1] == after[0] for before, after in itertools.pairwise(several))


def test_a_period_is_of_utc_wherever_the_clock_is():
    assert period("day", datetime(2026, 3, 5, 0, 30, tzinfo=timezone(timedelta(hours=2)))) == (day(0), day(1))


def test_a_plain_table_has_no_layout_and_no_upkeep(plain_database):
    with psycopg.connect(plain_database, autocommit=True) as connection:
        assert found(connection) is None
        assert ahead(connection).made == []
        assert dropping(connection, NOW).dropped == []
        connection.execute(f"DROP TABLE {LOG}")
        assert found(connection) is None


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu", "America/New_York"])
@pytest.mark.parametrize("style", ["ISO, MDY", "SQL, DMY", "German"])
def test_bounds_are_read_whatever_the_session_is_set_to(connection, zone, style):
    attach(connection, "-infinity", datetime(2020, 1, 1, tzinfo=UTC), f"{LOG}_old")
    connection.execute("SELECT set_config('TimeZone', %s, false), set_config('DateStyle', %s, false)", [zone, style])
    partitions = found(connection).partitions
    assert [each.name for each in partitions] == [f"{LOG}_old", name_of(LOG, "day", day(-1)), DEFAULT]
    assert partitions[0].upper == datetime(2020, 1, 1, tzinfo=UTC)
    assert partitions[1] == Partition(name_of(LOG, "day", day(-1)), day(-1), day(0))
    assert partitions[2] == Partition(DEFAULT, None, None, True)


def test_open_bounds_are_none(connection):
    connection.execute(f"CREATE TABLE a PARTITION OF {LOG} FOR VALUES FROM (MINVALUE) TO ('2020-01-01Z')")
    connection.execute(f"CREATE TABLE z PARTITION OF {LOG} FOR VALUES FROM ('2030-01-01Z') TO (MAXVALUE)")
    first, _, last = found(connection).bounded
    assert (first.lower, last.upper) == (None, None)
    assert found(connection).unit == "day"


@pytest.mark.parametrize("unit", ["day", "week", "month"])
def test_the_unit_is_that_of_the_newest_partition(connection, unit):
    lower, upper = period(unit, datetime(2027, 2, 10, tzinfo=UTC))
    attach(connection, lower, upper, "newest")
    attach(connection, upper + timedelta(days=40), upper + timedelta(days=43), "odd")
    assert found(connection).unit == unit


def test_the_current_period_and_the_next_ones_are_made(connection):
    assert ahead(connection).made == [name_of(LOG, "day", day(number)) for number in range(AHEAD + 1)]
    assert ahead(connection).made == []
    assert ahead(connection, NOW + timedelta(days=2)).made == [name_of(LOG, "day", day(8)), name_of(LOG, "day", day(9))]
    assert ahead(connection, ahead=0).made == []


@pytest.mark.parametrize("unit", ["week", "month"])
def test_longer_periods_follow_where_the_shorter_ones_end(connection, unit):
    connection.execute(f"DROP TABLE {name_of(LOG, 'day', day(-1))}")
    lower, upper = period(unit, NOW)
    attach(connection, lower, upper, name_of(LOG, unit, NOW))
    made = ahead(connection, ahead=2).made
    assert made == [name_of(LOG, unit, start) for start, _ in list(periods(unit, NOW, 3))[1:]]
    assert found(connection).unit == unit


def test_what_somebody_has_made_is_left_alone(connection):
    attach(connection, day(1) + timedelta(hours=6), day(2) + timedelta(hours=6), "theirs")
    assert ahead(connection, ahead=3).made == [name_of(LOG, "day", day(number)) for number in (0, 3)]


def test_a_partition_has_the_tables_indexes_and_owner_and_nobody_elses_rights(connection, database):
    with role(database) as dsn:
        name = psycopg.conninfo.conninfo_to_dict(dsn)["user"]
        connection.execute(f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO PUBLIC, {name}")
        connection.execute(f"ALTER TABLE {LOG} OWNER TO {name}")
        made = ahead(connection, ahead=0).made
        indexes = "SELECT count(*) FROM pg_index WHERE indrelid = %s::regclass AND indisvalid"
        assert connection.execute(indexes, made).fetchone() == connection.execute(indexes, [LOG]).fetchone() == (7,)
        assert (
            connection.execute(
                "SELECT DISTINCT pg_get_userbyid(relowner), grantee FROM pg_class, aclexplode(relacl) "
                "WHERE relname = %s AND grantee <> relowner OR relname = %s AND pg_get_userbyid(relowner) <> %s",
                [*made, *made, name],
            ).fetchall()
            == []
        )
        connection.execute(f"ALTER TABLE {LOG} OWNER TO CURRENT_USER")
        connection.execute(f"ALTER DEFAULT PRIVILEGES IN SCHEMA public REVOKE ALL ON TABLES FROM PUBLIC, {name}")


def test_writing_needs_no_right_on_a_partition(connection, database):
    ahead(connection)
    with role(database, "USAGE ON SCHEMA public", f"INSERT ON {LOG}") as dsn:
        writer = AuditTable(OwnConnection(dsn))
        assert writer.append(at(NOW, day(-900), day(900))).stored == 3
        writer.close()
    assert rows(connection) == 3


def test_late_early_and_far_records_are_taken_and_not_doubled(connection, table):
    ahead(connection)
    records = at(NOW, day(-40), day(30), datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC))
    assert table.append(records).stored == 5
    assert ahead(connection).faults == []
    assert table.append(records).stored == 5
    assert rows(connection) == 5
    assert {record.id for record in table.search().records} == {record.id for record in records}


def test_what_waits_in_the_default_partition_goes_to_its_own(connection, table):
    today, soon, far = at(NOW, day(0)), at(day(3)), at(day(20))
    table.append([*today, *soon, *far])
    assert rows(connection, DEFAULT) == 4
    upkeep = ahead(connection)
    assert (upkeep.moved, upkeep.faults) == (3, [])
    assert rows(connection, name_of(LOG, "day", NOW)) == 2
    assert rows(connection, name_of(LOG, "day", day(3))) == 1
    assert rows(connection, DEFAULT) == 1
    assert ahead(connection, day(13)).moved == 1
    assert rows(connection, DEFAULT) == 0
    assert rows(connection) == 4


def test_a_gap_is_filled_where_records_are(connection, table):
    table.append(at(day(3), day(3)))
    upkeep = ahead(connection, day(10), ahead=0)
    assert upkeep.made == [name_of(LOG, "day", day(10)), name_of(LOG, "day", day(3))]
    assert upkeep.moved == 2


def test_what_is_older_than_all_gets_a_partition_if_it_is_kept(connection, table):
    table.append(at(day(-30), day(-20), day(-20)))
    assert ahead(connection, ahead=0).moved == 0
    upkeep = ahead(connection, ahead=0, oldest_kept=day(-25))
    assert (upkeep.made, upkeep.moved) == ([name_of(LOG, "day", day(-20))], 2)
    assert rows(connection, DEFAULT) == 1


def test_a_period_that_is_not_over_at_the_cutoff_gets_a_partition(connection, table):
    kept = day(-25) + timedelta(hours=6)
    table.append(at(day(-25) + timedelta(hours=3), day(-25) + timedelta(hours=9)))
    assert ahead(connection, ahead=0, oldest_kept=kept).moved == 2


def test_a_writer_goes_on_while_the_default_partition_is_emptied(connection, database):
    stop, written, refused = threading.Event(), [], []

    def write():
        writer = AuditTable(OwnConnection(database))
        while not stop.is_set():
            batch = at(*(day(len(written) % 5) for _ in range(20)))
            if writer.append(batch).stored != 20:
                refused.append(batch)
            written.extend(batch)
        writer.close()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        wait_until(lambda: len(written) >= 200)
        upkeep = ahead(connection, attempts=20)
        enough = len(written) + 200
        wait_until(lambda: len(written) >= enough)
    finally:
        stop.set()
        thread.join()
    assert not refused
    assert upkeep.faults == []
    assert len(upkeep.made) == AHEAD + 1
    assert rows(connection) == len({record.id for record in written})
    assert ahead(connection).moved == 0
    assert rows(connection, DEFAULT) == 0


def test_two_processes_may_do_it_at_once(connection, database, table):
    table.append(at(*(day(number) for number in range(8) for _ in range(10))))
    upkeeps = []

    def keep():
        with psycopg.connect(database, autocommit=True) as other:
            upkeeps.append(ahead(other, attempts=50))

    threads = [threading.Thread(target=keep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for upkeep in upkeeps for name in upkeep.made) == names(connection)[1:]
    assert sum(upkeep.moved for upkeep in upkeeps) == rows(connection) == 80
    assert [fault for upkeep in upkeeps for fault in upkeep.faults] == []


def test_whoever_has_locked_the_table_is_not_waited_for_long(connection, database):
    pauses = []
    with locked(database):
        upkeep = ahead(connection, ahead=2, lock_timeout_seconds=0.02, pause=pauses.append)
        assert upkeep.made == []
        assert [fault.sqlstate for fault in upkeep.faults] == ["55P03"] * 3
        assert upkeep.faults[0].reason == f"{name_of(LOG, 'day', NOW)}: the table is locked by somebody else"
        assert len(pauses) == 4
    assert len(ahead(connection, ahead=2).made) == 3


def test_a_lock_that_is_let_go_is_had_at_the_next_attempt(connection, database):
    with psycopg.connect(database) as other:
        other.execute(f"LOCK TABLE ONLY {LOG} IN ROW EXCLUSIVE MODE")
        upkeep = ahead(connection, ahead=0, lock_timeout_seconds=0.02, pause=lambda seconds: other.rollback())
    assert (upkeep.made, upkeep.faults) == ([name_of(LOG, "day", NOW)], [])


def test_a_name_that_is_taken_holds_up_no_other(connection):
    taken = name_of(LOG, "day", day(1))
    connection.execute(f"CREATE TABLE {taken} ()")
    upkeep = ahead(connection, ahead=2)
    assert upkeep.made == [name_of(LOG, "day", day(number)) for number in (0, 2)]
    assert [fault.sqlstate for fault in upkeep.faults] == ["42P07"]
    assert taken in upkeep.faults[0].reason


def test_who_does_not_own_the_table_is_told(connection, database, table):
    table.append(at(day(-1)))
    with (
        role(database, "USAGE ON SCHEMA public", f"ALL ON {LOG}") as dsn,
        psycopg.connect(dsn, autocommit=True) as stranger,
    ):
        assert "only the table's owner" in ahead(stranger).faults[0].reason
        ahead(connection)
        assert "only the table's owner" in dropping(stranger, day(0)).faults[0].reason
        assert dropping(stranger, day(-30)).faults == []


def test_a_table_that_is_partitioned_otherwise_is_left_alone(plain_database):
    with psycopg.connect(plain_database, autocommit=True) as connection:
        connection.execute(f"DROP TABLE {LOG}")
        connection.execute(f"CREATE TABLE {LOG} (id uuid, started_at timestamptz) PARTITION BY HASH (id)")
        connection.execute(f"CREATE TABLE p0 PARTITION OF {LOG} FOR VALUES WITH (MODULUS 1, REMAINDER 0)")
        assert "not partitioned by the day" in ahead(connection).faults[0].reason
        assert dropping(connection, NOW).dropped == []
        assert exists(connection, "p0")


def test_a_broken_connection_is_raised(connection, database):
    with psycopg.connect(database, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])
    with pytest.raises(psycopg.OperationalError):
        ahead(connection)


def test_expired_partitions_are_dropped_and_say_what_they_held(connection, table):
    attach(connection, day(-3), day(-2))
    first, last = day(-1) + timedelta(hours=1), day(-1) + timedelta(hours=2)
    table.append([*at(first, last), *at(day(0))])
    ahead(connection)
    dropped = dropping(connection, day(0))
    assert dropped.dropped == [
        Dropped(name_of(LOG, "day", day(-3)), 0, None, None, 0),
        Dropped(name_of(LOG, "day", day(-1)), 2, first, last, 0),
    ]
    assert dropped.faults == []
    assert rows(connection) == 1
    assert names(connection)[0] == name_of(LOG, "day", day(0))
    assert not exists(connection, name_of(LOG, "day", day(-1)))


def test_what_is_not_over_at_the_cutoff_stays(connection):
    ahead(connection)
    assert dropping(connection, day(0) - timedelta(microseconds=1)).dropped == []


def test_the_newest_partition_stays_as_it_says_what_is_made_next(connection):
    assert dropping(connection, day(30)).dropped == []
    assert found(connection).unit == "day"


def test_the_table_of_before_goes_as_any_other(connection, table):
    connection.execute(
        sql.SQL("CREATE TABLE {} PARTITION OF {} FOR VALUES FROM (MINVALUE) TO ({})").format(
            sql.Identifier(f"{LOG}_before"), sql.Identifier(LOG), day(-5)
        )
    )
    table.append(at(day(-9)))
    assert [each.name for each in dropping(connection, day(-5)).dropped] == [f"{LOG}_before"]


def test_what_holds_something_that_is_kept_stays(connection, table):
    ahead(connection)
    attach(connection, day(-3), day(-2))
    table.append([*at(day(-1), day(-3)), *at(day(-1), bank_id="held")])
    result = dropping(connection, day(0), kept=HELD)
    assert [each.name for each in result.dropped] == [name_of(LOG, "day", day(-3))]
    assert result.kept == [name_of(LOG, "day", day(-1))]
    assert rows(connection) == 2


def detach(connection, name, comment=None):
    connection.execute(f"ALTER TABLE {LOG} DETACH PARTITION {name}")
    if comment:
        connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(sql.Identifier(name), comment))


def test_what_was_detached_and_not_dropped_is_finished(connection, table):
    ahead(connection)
    table.append([*at(day(-1), day(-1)), *at(day(-1), bank_id="held")])
    name = name_of(LOG, "day", day(-1))
    detach(connection, name, mark(LOG))
    assert found(connection).leftovers == [name]
    [dropped] = dropping(connection, day(-30), kept=HELD).dropped
    assert (dropped.name, dropped.rows, dropped.put_back) == (name, 2, 1)
    assert not exists(connection, name)
    assert rows(connection, DEFAULT) == rows(connection) == 1


def test_what_was_put_back_or_written_again_before_is_not_doubled(connection, table):
    ahead(connection)
    held = at(day(-1), bank_id="held")
    table.append(held)
    detach(connection, name_of(LOG, "day", day(-1)), mark(LOG))
    table.append(held)
    dropping(connection, day(-30), kept=HELD)
    assert rows(connection) == 1


def test_a_leftover_with_fewer_columns_is_put_back(connection, table):
    ahead(connection)
    table.append(at(day(-1), bank_id="held"))
    detach(connection, name_of(LOG, "day", day(-1)), mark(LOG))
    connection.execute(f"ALTER TABLE {LOG} ADD COLUMN newer text")
    assert dropping(connection, day(-30), kept=HELD).dropped[0].put_back == 1


def test_what_a_person_has_detached_is_theirs(connection, table):
    ahead(connection)
    table.append(at(day(-1)))
    detach(connection, name_of(LOG, "day", day(-1)))
    assert dropping(connection, day(0)).dropped == []
    assert rows(connection, name_of(LOG, "day", day(-1))) == 1


def test_where_somebody_else_sweeps_it_is_left_to_them(connection, database):
    ahead(connection)
    attach(connection, day(-3), day(-2))
    detach(connection, name_of(LOG, "day", day(-3)), mark(LOG))
    with psycopg.connect(database) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", [KEY])
        result = dropping(connection, day(0))
        assert (result.dropped, result.faults) == ([], [])
    assert len(dropping(connection, day(0)).dropped) == 2


def test_a_partition_that_somebody_reads_holds_up_no_other(connection, database):
    ahead(connection)
    attach(connection, day(-3), day(-2))
    with locked(database, name_of(LOG, "day", day(-3)), "ACCESS SHARE"):
        result = dropping(connection, day(0), lock_timeout_seconds=0.02)
    assert [each.name for each in result.dropped] == [name_of(LOG, "day", day(-1))]
    assert [fault.sqlstate for fault in result.faults] == ["55P03"]
    assert len(dropping(connection, day(0)).dropped) == 1


def test_one_whose_drop_is_locked_is_left_for_the_next_run(connection, database, table):
    ahead(connection)
    table.append(at(day(-1)))
    name = name_of(LOG, "day", day(-1))
    with psycopg.connect(database) as other:
        detach(connection, name, mark(LOG))
        other.execute(f"LOCK TABLE {name} IN ACCESS SHARE MODE")
        result = dropping(connection, day(0), lock_timeout_seconds=0.02)
        assert [fault.sqlstate for fault in result.faults] == ["55P03"]
        assert rows(connection, name) == 1
    assert [each.name for each in dropping(connection, day(0)).dropped] == [name]


def test_two_processes_drop_each_partition_once(connection, database, table):
    ahead(connection)
    for number in range(-9, -1):
        attach(connection, day(number), day(number + 1))
    table.append(at(*(day(number) for number in range(-9, 0))))
    results = []

    def drop():
        with psycopg.connect(database, autocommit=True) as other:
            for _ in range(20):
                results.append(dropping(other, day(0)))

    threads = [threading.Thread(target=drop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [fault for result in results for fault in result.faults] == []
    assert sum(dropped.rows for result in results for dropped in result.dropped) == 9
    assert sorted(dropped.name for result in results for dropped in result.dropped) == [
        name_of(LOG, "day", day(number)) for number in range(-9, 0)
    ]


def test_nothing_is_prepared_on_a_lent_connection(connection, table):
    table.append(at(*(day(number) for number in range(8))))
    connection.prepare_threshold = 0
    ahead(connection)
    dropping(connection, day(4))
    prepared = connection.execute("SELECT statement FROM pg_prepared_statements", prepare=False).fetchall()
    assert [text for (text,) in prepared if text not in {"BEGIN", "COMMIT", "ROLLBACK"}] == []
