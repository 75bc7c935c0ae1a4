"""The command line, as a person and as a script use it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from astrocyte_otel_audit import cli
from astrocyte_otel_audit.pipeline.directory import destination_of
from astrocyte_otel_audit.pipeline.segment import PROVISIONAL, RECORD, captured_frame
from astrocyte_otel_audit.pipeline.spool import Spool
from astrocyte_otel_audit.record import AuditRecord, record_id
from tests.records import captured_of
from tests.servers import role, role_prefix

START = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def record(number: int, **changes) -> AuditRecord:
    made = AuditRecord(
        id=record_id(number + 1, number + 1, int(START.timestamp() * 1e9) + number),
        action="recall",
        transport="http",
        bank_id="user-calvin",
        started_at=START + timedelta(seconds=number),
        ended_at=START + timedelta(seconds=number, milliseconds=7),
        request={"query": {"length": 22}},
        response={"hits": 3},
        metadata={},
        outcome="success",
        error_type=None,
        actor_id="calvin",
        actor_type="user",
        trace_id=f"{number + 1:032x}",
        span_id=f"{number + 1:016x}",
        parent_span_id=None,
        sampled=False,
        service_name="memory",
    )
    return made._replace(**changes)


def test_list_shows_records_newest_first(command, table):
    table.append([record(0), record(1, action="retain", outcome="failure", error_type="astrocyte.errors.AccessDenied")])
    code, out, _ = command("list")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split()[:3] == ["started", "(UTC)", "action"]
    assert "retain" in lines[1]
    assert "failure AccessDenied" in lines[1]
    assert "recall" in lines[2]
    assert record(0).id in lines[2]
    assert record(0).trace_id in lines[2]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["--bank", "other"], [1]),
        (["--action", "retain"], [2]),
        (["--transport", "mcp"], [3]),
        (["--outcome", "failure"], [4]),
        (["--actor", "susie"], [5]),
        (["--trace", f"{7:032X}"], [6]),
        (["--since", "2026-01-31T12:00:05"], [6, 5]),
        (["--until", "2026-01-31T12:00:01+00:00"], [0]),
        (["--since", "2026-01-31T12:00:01", "--until", "2026-01-31T12:00:03", "--transport", "http"], [2, 1]),
    ],
)
def test_list_filters(command, table, filters, expected):
    table.append(
        [
            record(0),
            record(1, bank_id="other"),
            record(2, action="retain"),
            record(3, transport="mcp"),
            record(4, outcome="failure"),
            record(5, actor_id="susie"),
            record(6),
        ]
    )
    _, out, _ = command("list", "--json", *filters)
    assert [json.loads(line)["id"] for line in out.splitlines()] == [record(number).id for number in expected]


def test_list_takes_a_time_ago(command, table):
    table.append([record(0), record(1, started_at=datetime.now(UTC) - timedelta(hours=2))])
    _, out, _ = command("list", "--json", "--since", "3h")
    assert len(out.splitlines()) == 1


def test_pages_follow_the_cursor_to_the_end(command, table):
    table.append([record(number) for number in range(5)])
    seen, cursor = [], []
    while True:
        _, out, err = command("list", "--json", "--limit", "2", *cursor)
        seen += [json.loads(line)["id"] for line in out.splitlines()]
        if not (found := re.search(r"--after '([^']+)'", err)):
            break
        cursor = ["--after", found[1]]
    assert seen == [record(number).id for number in (4, 3, 2, 1, 0)]


def test_nothing_found_is_no_error_and_no_output(command):
    assert command("list", "--bank", "nobody") == (0, "", "no record fits\n")


def test_show_says_everything(command, table):
    table.append([record(0)])
    code, out, _ = command("show", record(0).id)
    assert code == 0
    for expected in (record(0).id, "user-calvin", "calvin", "7.0 ms", "the trace was sampled out", '"length": 22'):
        assert expected in out


def test_show_as_json_is_the_whole_record(command, table):
    table.append([record(0)])
    _, out, _ = command("show", record(0).id, "--json")
    shown = json.loads(out)
    assert shown["request"] == {"query": {"length": 22}}
    assert shown["started_at"] == START.isoformat()
    assert shown["error_type"] is None


def test_show_of_an_unknown_id_exits_with_1(command):
    code, out, err = command("show", record(9).id)
    assert (code, out) == (1, "")
    assert err == f"error: no record {record(9).id} in public.astrocyte_audit_log\n"


def test_set_aside_shows_the_reason(command, table, database):
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ALTER TABLE astrocyte_audit_log ADD CHECK (action <> 'recall')")
    table.append([record(0), record(1, action="retain")])
    _, out, _ = command("set-aside")
    assert "a constraint of the table refuses the record" in out
    assert "23514" in out
    _, out, _ = command("set-aside", "--json")
    assert json.loads(json.loads(out)["record"])["bank_id"] == "user-calvin"


def test_migrate_says_what_it_did_and_may_be_repeated(command, empty_database):
    code, out, _ = command("migrate", dsn=empty_database)
    assert code == 0
    assert out.splitlines()[0] == "applied 001_log"
    assert out.splitlines()[-1] == "public.astrocyte_audit_log is up to date"
    assert command("migrate", dsn=empty_database)[1] == "public.astrocyte_audit_log is up to date\n"


def test_migrate_makes_a_tenants_schema_only_if_asked(command, empty_database):
    code, _, err = command("migrate", "--schema", "Tenant-A", dsn=empty_database)
    assert code == 3
    assert "the schema does not exist" in err
    assert "--create-schema" in err
    assert command("migrate", "--schema", "Tenant-A", "--create-schema", dsn=empty_database)[0] == 0


def test_migrate_makes_roles_if_asked_and_says_what_to_do_next(command, empty_database):
    with role_prefix(empty_database) as prefix:
        code, out, _ = command("migrate", "--roles", "--role-prefix", prefix, dsn=empty_database)
        assert code == 0
        assert out.splitlines()[-3:] == [
            "public.astrocyte_audit_log is up to date",
            f"{prefix}_writer may INSERT, {prefix}_reader may SELECT, {prefix}_sweeper may SELECT, DELETE",
            f'next: GRANT "{prefix}_writer" TO app_user, the login role of your service, which must not own the tables',
        ]
        with role(empty_database, f'"{prefix}_writer"') as writer:
            assert command("list", dsn=writer)[0] == 3
        assert command("migrate", "--roles", "--role-prefix", prefix, dsn=empty_database)[0] == 0


def test_roles_that_can_not_be_made_leave_the_table_migrated_and_are_one_line(command, empty_database):
    with role(empty_database, "CREATE ON SCHEMA public") as owner, role_prefix(empty_database) as prefix:
        code, out, err = command("migrate", "--roles", "--role-prefix", prefix, dsn=owner)
        assert code == 3
        assert out.splitlines()[-1] == "public.astrocyte_audit_log is up to date"
        assert re.fullmatch("error: .* needs CREATEROLE: .*\n", err)
        assert command("list", dsn=owner)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "no-uuid"], 2, "id: not a record's id; accepted is a UUID"),
        (["list", "--since", "yesterday"], 2, "--since: got 'yesterday'"),
        (["list", "--after", "x"], 2, "after: not a cursor"),
        (["list", "--schema", "a;b"], 2, "--schema: got 'a;b'"),
        (["list", "--table", "nowhere"], 3, "the table does not exist; run `astrocyte-otel-audit migrate`"),
        (
            ["migrate", "--roles", "--role-prefix", 'a"b'],
            2,
            """--role-prefix: got 'a"b'; accepted is a name of 1 to 55""",
        ),
        (["migrate", "--roles", "--role-prefix", "a" * 56], 2, "accepted is a name of 1 to 55 letters"),
        (["migrate", "--roles", "--role-prefix", ""], 2, "--role-prefix: got ''"),
        (["migrate", "--role-prefix", "mine"], 2, "--role-prefix: got 'mine' without --roles"),
        (["list", "--limit", "0"], 2, "Invalid value for '--limit'"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(command, arguments, code, message):
    got, out, err = command(*arguments)
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_an_unreachable_server_is_one_line_without_the_password(command):
    code, out, err = command("list", dsn="postgresql://calvin:hunter2@127.0.0.1:1/memories")
    assert (code, out) == (3, "")
    assert err == "error: nothing listens at that host and port; is Postgres running?\n"


def test_a_dsn_that_cannot_be_parsed_is_not_repeated(command):
    code, _, err = command("list", dsn="postgresql://calvin:hun%ter2@localhost/memories")
    assert code == 2
    assert err.startswith("error: dsn: can't be parsed")
    assert "hun" not in err


def test_hostile_text_is_inert_on_a_terminal(command, table):
    hostile = "\x1b]0;owned\x07\u202ekcab [red]x[/red]"
    table.append([record(0, bank_id=hostile, actor_id=hostile, request={"\x1b[2J": hostile})])
    for arguments in (["list"], ["show", record(0).id], ["list", "--json"], ["show", record(0).id, "--json"]):
        _, out, _ = command(*arguments)
        assert not set("\x1b\x07\u202e") & set(out)
        assert "[red]x[/red]" in out.replace("\n", "")


def test_without_a_database_it_says_which_option_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["astrocyte-otel-audit", "list"])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    assert ended.value.code == 2
    assert "give --dsn or set OTEL_ASTROCYTE_AUDIT_DSN" in capsys.readouterr().err


def test_help_teaches(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["astrocyte-otel-audit", "list", "--help"])
    with pytest.raises(SystemExit):
        cli.run()
    out = capsys.readouterr().out
    assert "newest first" in out
    assert "OTEL_ASTROCYTE_AUDIT_DSN" in out


def test_help_teaches_how_to_write_with_no_more_rights_than_needed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["astrocyte-otel-audit", "migrate", "--help"])
    with pytest.raises(SystemExit):
        cli.run()
    out = capsys.readouterr().out
    assert "GRANT astrocyte_audit_writer TO app_user" in out
    assert "CREATEROLE" in out


def test_the_demo_shows_nine_operations_as_nine_rows(empty_database):
    result = subprocess.run(
        [sys.executable, "-m", "astrocyte_otel_audit", "demo", "--dsn", empty_database],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("OTEL_")},
    )
    assert (result.returncode, result.stderr) == (0, "")
    shown = [line.split()[2:6] for line in result.stdout.splitlines() if re.match(r"\d{4}-", line)]
    assert [(action, outcome) for action, _, outcome, *_ in shown] == [
        ("classify", "success"),
        ("retain", "success"),
        ("retain", "success"),
        ("recall", "success"),
        ("reflect", "success"),
        ("retain", "failure"),
        ("recall", "failure"),
        ("consolidate", "success"),
        ("forget", "success"),
    ]
    assert "9 operations, 9 rows." in result.stdout
    assert "What to do next" in result.stdout
    assert empty_database not in result.stdout
    with psycopg.connect(empty_database) as connection:
        stored = connection.execute("SELECT string_agg(astrocyte_audit_log::text, ' ') FROM astrocyte_audit_log")
        assert "dark mode" not in stored.fetchone()[0]


def test_without_its_extra_the_command_says_how_to_get_it(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('no', name='typer')")
    result = subprocess.run(
        [sys.executable, "-m", "astrocyte_otel_audit", "list"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode == 1
    assert result.stderr == "The command line needs an extra: pip install 'astrocyte-otel-audit[cli]'\n"


def test_a_table_object_is_closed_by_every_command(command, table, database):
    command("list")
    with psycopg.connect(database) as connection:
        ours = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name ="
            " 'astrocyte-otel-audit' AND pid <> pg_backend_pid()"
        )
        assert ours.fetchone() == (0,)


def leave_in_spool(root, destination="elsewhere", parts=()):
    """Leave what a process leaves that was killed: three operations, and parts of some that had not ended."""
    spool = Spool(root, destination, max_bytes=10**6, max_in_memory=100)
    for number in range(3):
        spool.append(captured_frame(RECORD, captured_of(record(number))))
    for number, outer in parts:
        part = captured_of(record(number), id=record(outer).id, replaces=record(number).id)
        spool.append(captured_frame(PROVISIONAL, part))
    spool.after_fork()


def test_spool_status_of_nothing_says_so(command, tmp_path):
    code, out, err = command("spool", "status")
    assert (code, out) == (0, "")
    assert "is empty" in err


def test_spool_status_shows_what_an_ended_process_left(command, tmp_path):
    leave_in_spool(tmp_path / "spool")
    code, out, _ = command("spool", "status", "--spool-dir", str(tmp_path / "spool"))
    assert code == 0
    assert "2026-01-31 12:00:00" in out
    code, out, _ = command("spool", "status", "--spool-dir", str(tmp_path / "spool"), "--json")
    said = json.loads(out)
    assert (said["alive"], said["destination"], said["records"], said["missing"]) == (False, "elsewhere", 3, 0)


def test_what_an_operation_had_done_that_never_ended_is_shown_as_begun_and_replayed(command, table, tmp_path):
    leave_in_spool(tmp_path / "spool", parts=[(7, 8)])
    arguments = ("--spool-dir", str(tmp_path / "spool"), "--json")
    said = json.loads(command("spool", "status", *arguments)[1])
    assert (said["records"], said["begun"]) == (3, 1)
    said = json.loads(command("spool", "replay", *arguments, "--any-destination")[1])
    assert (said["processes"], said["written"], said["damaged"]) == (1, 4, 0)
    newest, *others = table.search().records
    assert newest._replace(recorded_at=None) == record(7, id=record(8).id, schema="public")
    assert [found.id for found in others] == [record(number).id for number in (2, 1, 0)]
    assert list((tmp_path / "spool").iterdir()) == []


def test_of_what_operations_inside_one_had_done_that_never_ended_one_row_is_replayed(command, table, tmp_path):
    leave_in_spool(tmp_path / "spool", parts=[(6, 7), (7, 8)])
    command("spool", "replay", "--spool-dir", str(tmp_path / "spool"), "--any-destination")
    assert [found.id for found in table.search().records] == [record(number).id for number in (8, 2, 1, 0)]


def test_spool_replay_leaves_another_destination_alone_unless_it_is_told_not_to(command, table, tmp_path):
    leave_in_spool(tmp_path / "spool")
    code, out, _ = command("spool", "replay", "--spool-dir", str(tmp_path / "spool"))
    assert code == 0
    assert "0 records of 0 ended processes" in out
    code, out, _ = command("spool", "replay", "--spool-dir", str(tmp_path / "spool"), "--any-destination")
    assert code == 0
    assert "3 records of 1 ended processes" in out
    assert len(table.search().records) == 3
    assert list((tmp_path / "spool").iterdir()) == []


def test_spool_replay_without_postgres_keeps_everything(command, tmp_path):
    leave_in_spool(tmp_path / "spool")
    arguments = ("spool", "replay", "--spool-dir", str(tmp_path / "spool"), "--any-destination")
    code, _, err = command(*arguments, dsn="postgresql://127.0.0.1:1/nowhere")
    assert code == 3
    assert "nothing listens" in err
    assert len(list((tmp_path / "spool").iterdir())) == 1


@pytest.fixture
def writer(database):
    """Starts the command `writer` on the test's database, and ends it."""
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "astrocyte_otel_audit", "writer", "--dsn", database, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until(condition, seconds=30):
    """Whether it becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("destination", "options"), [("default", []), ("mine", ["--destination", "mine"])])
def test_writer_writes_what_is_in_the_spool_until_it_is_ended(writer, table, tmp_path, destination, options, ending):
    leave_in_spool(tmp_path / "spool", "elsewhere")
    running = writer("--spool-dir", str(tmp_path / "spool"), *options)
    leave_in_spool(tmp_path / "spool", destination, parts=[(7, 8)])
    assert wait_until(lambda: len(table.search().records) == 4)
    running.send_signal(ending)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (0, "")
    assert err.splitlines()[-1] == "4 records are in the table, 0 were set aside"
    left = [path for path in (tmp_path / "spool").iterdir() if path.is_dir()]
    assert [destination_of(path) for path in left] == ["elsewhere"]


def test_of_two_writers_one_stands_by_until_the_other_one_ends(writer, table, tmp_path):
    first = writer("--spool-dir", str(tmp_path / "spool"))
    assert "writing what is in" in first.stderr.readline()
    second = writer("--spool-dir", str(tmp_path / "spool"))
    assert "standing by" in second.stderr.readline()
    first.kill()
    leave_in_spool(tmp_path / "spool", "default")
    assert "writing what is in" in second.stderr.readline()
    assert wait_until(lambda: len(table.search().records) == 3)
    second.terminate()
    assert second.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schema", "a;b"], "schema: got 'a;b'; accepted is a name"),
        (["--table", "a.b"], "table: got 'a.b'; accepted is a name"),
        (["--dsn", "no such form"], "dsn: can't be parsed"),
        (["--dsn", ""], "dsn: not a connection string"),
    ],
)
def test_a_writer_that_can_not_begin_says_why_in_one_line(writer, tmp_path, options, message):
    running = writer("--spool-dir", str(tmp_path / "spool"), *options)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--spool-dir", __file__], 3, "its directory can't be made"),
        (["--spool-dir", "off"], 2, "accepted is a directory"),
        (["--destination", "a b"], 2, "--destination"),
    ],
)
def test_a_writer_that_cant_work_says_so_in_one_line(options, code, said):
    done = subprocess.run(
        [sys.executable, "-m", "astrocyte_otel_audit", "writer", "--dsn", "host=127.0.0.1 port=1", *options],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert said in done.stderr
