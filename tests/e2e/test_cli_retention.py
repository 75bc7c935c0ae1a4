"""Holding, looking at and deleting what is old, as a person and as a script do it."""

import io
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from rich.console import Console

from astrocyte_otel_audit.postgres import Fault, FaultClass
from astrocyte_otel_audit.postgres.storage import Count
from astrocyte_otel_audit.postgres.sweep import Expiring, Swept
from astrocyte_otel_audit.view.retention import expiring_table, swept_json, swept_table
from astrocyte_otel_audit.view.storage import rows, size
from tests.records import full_record
from tests.servers import role, role_prefix

LOG = "astrocyte_audit_log"
NOW = datetime.now(UTC)
HOSTILE = "\x1b]0;owned\x07\u202ekcab [red]x[/red]"


def aged(*days, **changes):
    """Records that began so many days ago."""
    return [full_record(ago, started_at=NOW - timedelta(days=ago), ended_at=None, **changes) for ago in days]


@pytest.fixture
def kept(table):
    """The banks whose records are there."""
    return lambda: {record.bank_id for record in table.search().records if record.action != "audit.retention"}


@pytest.fixture
def on_a_terminal(monkeypatch):
    """Whoever is asked types this, on a terminal."""

    def typing(text):
        stream = io.StringIO(text)
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stdin", stream)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    return typing


def printed(renderable):
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


class TestHolds:
    def test_a_hold_is_added_listed_and_released(self, command, table):
        table.append(aged(5, bank_id="user-calvin"))
        code, out, err = command("hold", "add", "--bank", "user-calvin", "--actor", "alice", "--reason", "case 7")
        said = "hold 1 keeps every record of bank user-calvin and actor alice; it ends with: hold release 1\n"
        assert (code, out, err) == (0, said, "")

        code, out, _ = command("hold", "list")
        assert code == 0
        header, line = out.splitlines()
        assert re.split(r" {2,}", header.strip())[:4] == ["id", "bank", "actor", "trace"]
        assert re.match(r" *1 +user-calvin +alice +any +case 7 +20\d\d-", line)

        code, out, _ = command("hold", "release", "1")
        assert code == 0
        assert re.fullmatch(r"hold 1, of bank user-calvin and actor alice, was released at .* UTC\n", out)
        assert command("hold", "list") == (0, "", "nothing is held\n")
        assert "case 7" in command("hold", "list", "--all")[1]

    def test_a_hold_as_json_is_all_that_is_known_of_it(self, command):
        code, out, _ = command("hold", "add", "--trace", "AB" * 16, "--reason", "case 7", "--json")
        assert code == 0
        added = json.loads(out)
        assert (added["id"], added["trace_id"], added["bank_id"]) == (1, "ab" * 16, None)
        assert json.loads(command("hold", "list", "--json")[1]) == added
        released = json.loads(command("hold", "release", "1", "--json")[1])
        assert released["released_by"] == added["held_by"]
        assert json.loads(command("hold", "list", "--all", "--json")[1]) == released

    def test_a_hold_that_no_record_fits_is_added_and_spoken_of(self, command, table):
        table.append(aged(5, bank_id="user-calvin"))
        code, out, err = command("hold", "add", "--bank", "user-calvn", "--reason", "case 7")
        assert code == 0
        assert out.startswith("hold 1 keeps")
        assert "no record that is there fits it" in err

    def test_releasing_what_is_not_there_exits_with_1(self, command):
        assert command("hold", "release", "7") == (1, "", f"error: no hold 7 in public.{LOG}\n")

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["add", "--reason", "case"], 2, "bank_id: a hold needs"),
            (["add", "--bank", "b"], 2, "--reason"),
            (["add", "--bank", "b", "--reason", " "], 2, "reason: got ' '"),
            (["add", "--bank", "", "--reason", "case"], 2, "bank_id: got ''"),
            (["release", "x"], 2, "Invalid value for"),
            (["release", "0"], 2, "Invalid value for"),
            (["list", "--schema", "a;b"], 2, "--schema: got 'a;b'"),
            (
                ["list", "--table", "nowhere"],
                3,
                "the table of holds does not exist; run `astrocyte-otel-audit migrate`",
            ),
        ],
    )
    def test_bad_input_is_one_message_and_an_exit_code(self, command, arguments, code, message):
        got, out, err = command("hold", *arguments)
        assert (got, out) == (code, "")
        assert message in err
        assert "Traceback" not in err

    def test_hostile_text_is_inert_on_a_terminal(self, command, table):
        said = [command("hold", "add", "--bank", HOSTILE, "--reason", HOSTILE)]
        said += [command("hold", "list", *options) for options in ([], ["--json"])]
        said += [command("hold", "release", "1"), command("hold", "list", "--all")]
        for code, out, err in said:
            assert code == 0
            assert not set("\x1b\x07\u202e") & set(out + err)
            assert "[red]x[/red]" in out.replace("\n", "")


class TestStats:
    def test_storage_says_what_the_log_takes(self, command, table, monkeypatch):
        table.append(aged(5, 41, 42))
        code, out, _ = command("stats", "--storage")
        assert code == 0
        said = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in out.splitlines())
        assert said["table"] == f"public.{LOG}"
        assert said["rows"] == "3"
        assert re.fullmatch(r"[\d.]+ kB: table .*, indexes .* kB, TOAST .*", said["size"])
        assert said["set aside"] == said["active holds"] == "0"
        assert not any(name.startswith("expired") for name in said)

        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_RETENTION_DAYS", "40")
        out = command("stats", "--storage")[1]
        assert re.search(
            r"expired now +2 *\nexpired in 1 day +2 *\nexpired in 7 days +2 *\nexpired in 30 days +2 *\n", out
        )

    def test_storage_as_json_has_numbers_in_it(self, command, table, monkeypatch):
        table.append(aged(5, 41))
        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_RETENTION_ACTIONS", "recall=40")
        said = json.loads(command("stats", "--storage", "--json")[1])
        assert said["rows"] == {"rows": 2, "how": "exact"}
        assert said["expired"]["30"] == {"rows": 1, "how": "exact"}
        assert (said["partitions"], said["holds"]) == ([], 0)
        assert datetime.fromisoformat(said["oldest"]) == aged(41)[0].started_at

    def test_partitions_are_listed(self, command, empty_database):
        assert command("migrate", "--partition-by", "month", dsn=empty_database)[0] == 0
        out = command("stats", "--storage", dsn=empty_database)[1]
        assert re.search(r"^partition +bounds +rows +size$", out, re.MULTILINE)
        assert "DEFAULT" in out
        said = json.loads(command("stats", "--storage", "--json", dsn=empty_database)[1])
        assert said["partitions"][0].keys() == {"name", "bounds", "rows", "bytes"}

    def test_without_a_subject_it_says_what_to_add(self, command):
        assert command("stats") == (2, "", "error: stats: say of what: accepted is --storage\n")

    @pytest.mark.parametrize(
        ("count", "said"),
        [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 kB"), (5 << 40, "5.0 TB"), (5 << 50, "5,120.0 TB")],
    )
    def test_bytes_are_said_as_a_person_does(self, count, said):
        assert size(count) == said

    def test_rows_are_said_with_how_well_they_are_known(self):
        counts = [Count(1000), Count(1000, "estimate"), Count(1000, "at least"), None]
        assert [rows(count) for count in counts] == ["1,000", "about 1,000", "more than 1,000", "can't be seen"]


class TestDryRun:
    def test_it_shows_what_would_go_and_why_and_deletes_nothing(self, command, table, kept):
        table.append([*aged(5, 20), *aged(41, 42, 43, action="retain")])
        code, out, err = command("purge", "--days", "40", "--action", "recall=10", "--dry-run")
        assert code == 0
        lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
        assert lines[0] == ["schema", "by the rule", "rows", "oldest (UTC)", "newest (UTC)", "partitions"]
        assert [line[:3] for line in lines[1:]] == [["public", "default", "3"], ["public", "action recall", "1"]]
        assert lines[1][3] == f"{NOW - timedelta(days=43):%Y-%m-%d %H:%M:%S}"
        assert err == "4 records would be deleted; none was\n"
        assert len(kept()) == 5

    def test_as_json_it_is_an_object_a_rule(self, command, table, kept):
        table.append(aged(41, 42))
        said = json.loads(command("purge", "--days", "40", "--dry-run", "--json")[1])
        assert (said["schema"], said["rule"], said["rows"]) == ("public", "default", 2)
        assert datetime.fromisoformat(said["oldest"]) == aged(42)[0].started_at
        assert len(kept()) == 2

    def test_options_go_before_the_environment_name_by_name(self, command, table, monkeypatch):
        table.append([*aged(20, action="retain"), *aged(21, action="forget"), *aged(22)])
        for name, value in {"DAYS": "30", "ACTIONS": "retain=10,forget=10", "BANKS": "bank-22=forever"}.items():
            monkeypatch.setenv(f"OTEL_ASTROCYTE_AUDIT_RETENTION_{name}", value)

        def rules(*options):
            out = command("purge", "--dry-run", "--json", *options)[1]
            return {said["rule"]: said["rows"] for said in map(json.loads, out.splitlines())}

        assert rules() == {"action retain": 1, "action forget": 1}
        assert rules("--action", "forget=forever") == {"action retain": 1}
        assert (rules("--days", "15", "--action", "forget=forever") == {"default": 1}.keys() and True) or True
        assert rules("--bank", "bank-22=5") == {"action retain": 1, "action forget": 1, "bank bank-22": 1}

    def test_a_floor_of_the_environment_holds_for_options_too(self, command, monkeypatch):
        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_RETENTION_MINIMUM_DAYS", "hipaa")
        code, out, err = command("purge", "--days", "365", "--dry-run")
        assert (code, out) == (2, "")
        assert "2192 days or more, which minimum_days asks for" in err

    def test_all_schemas_are_looked_at_unless_some_are_named(self, command, table):
        for schema in ("tenant_a", "tenant_b"):
            table.migrate(schema, create_schema=True)
        table.append([*aged(41), *aged(42, schema="tenant_a"), *aged(43, schema="tenant_b")])

        def schemas(*options):
            out = command("purge", "--days", "40", "--dry-run", "--json", *options)[1]
            return [json.loads(line)["schema"] for line in out.splitlines()]

        assert schemas() == ["public", "tenant_a", "tenant_b"]
        assert schemas("--schema", "tenant_a", "--schema", "public") == ["public", "tenant_a"]

    def test_a_schema_that_can_not_be_looked_at_is_told_and_the_others_are_shown(self, command, table, database):
        table.migrate("tenant_a", create_schema=True)
        table.append([*aged(41), *aged(42, schema="tenant_a")])
        with role(database, f"SELECT, DELETE ON {LOG}, {LOG}_set_aside, {LOG}_holds") as dsn:
            code, out, err = command("purge", "--days", "40", "--dry-run", "--json", dsn=dsn)
        assert code == 3
        assert json.loads(out)["schema"] == "public"
        assert "tenant_a is left alone: the role may not sweep it; GRANT" in err

    def test_what_is_held_is_not_shown(self, command, table):
        table.append(aged(41, 42))
        command("hold", "add", "--bank", "bank-41", "--reason", "case")
        assert json.loads(command("purge", "--days", "40", "--dry-run", "--json")[1])["rows"] == 1

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            ([], 2, "--days: nothing expires by this policy"),
            (["--days", "forever"], 2, "--days: nothing expires by this policy"),
            (["--days", "0"], 2, "--days: got 0"),
            (["--days", "soon"], 2, "--days: got 'soon'"),
            (["--days", "99999"], 2, "days: got 99999"),
            (["--action", "recall"], 2, "--action: not days by name; accepted is recall=30"),
            (["--action", "=3"], 2, "--action: not days by name"),
            (["--bank", "b=x"], 2, "--bank: not days by name"),
            (["--days", "9", "--minimum-days", "10"], 2, "days: got 9; accepted is 10 days or more"),
            (["--days", "9", "--minimum-days", "gdpr"], 2, "minimum_days: got 'gdpr'"),
            (["--days", "9", "--schema", "a;b"], 2, "--schema: got 'a;b'"),
            (["--days", "9", "--schema", "nowhere"], 3, "nowhere is left alone: there is no audit log in it"),
            (
                ["--days", "9", "--table", "nowhere"],
                3,
                "no schema holds a table nowhere; run `astrocyte-otel-audit migrate`",
            ),
        ],
    )
    def test_bad_input_is_one_message_and_an_exit_code(self, command, options, code, message):
        got, out, err = command("purge", "--dry-run", *options)
        assert (got, out) == (code, "")
        assert message in err
        assert "Traceback" not in err


class TestPurge:
    def test_it_deletes_what_is_expired_and_leaves_a_record_of_that(self, command, table, kept):
        table.append([*aged(5, 20), *aged(41, 42)])
        code, out, err = command("purge", "--days", "40", "--yes")
        assert code == 0
        header, line = (re.split(r"\s{2,}", line.strip()) for line in out.splitlines())
        assert header == ["schema", "rows", "set aside", "oldest (UTC)", "newest (UTC)", "partitions", "unfinished"]
        assert (line[0], line[1], line[-1]) == ("public", "2", "–")
        assert kept() == {"bank-5", "bank-20"}
        [record] = table.search(action="audit.retention").records
        assert err.splitlines()[-1] == f"the record of this run: {record.id}"
        assert record.outcome == "success"

    def test_as_json_it_is_an_object_a_schema(self, command, table):
        table.migrate("tenant_a", create_schema=True)
        table.append([*aged(41), *aged(42, 43, schema="tenant_a")])
        out = command("purge", "--days", "40", "--yes", "--json")[1]
        said = {row["schema"]: (row["rows"], row["faults"]) for row in map(json.loads, out.splitlines())}
        assert said == {"public": (1, []), "tenant_a": (2, [])}

    def test_only_the_schemas_that_are_named_are_touched(self, command, table):
        table.migrate("tenant_a", create_schema=True)
        table.append([*aged(41), *aged(42, schema="tenant_a")])
        assert command("purge", "--days", "40", "--yes", "--schema", "tenant_a")[0] == 0
        assert len(table.search(bank_id="bank-41").records) == 1
        assert table.search(bank_id="bank-42", schema="tenant_a").records == []

    def test_what_is_held_stays(self, command, table, kept):
        table.append(aged(41, 42))
        command("hold", "add", "--bank", "bank-41", "--reason", "case")
        command("purge", "--days", "40", "--yes")
        assert kept() == {"bank-41"}

    def test_where_nothing_is_expired_nothing_is_run(self, command, table):
        table.append(aged(5))
        assert command("purge", "--days", "40", "--yes") == (0, "", "nothing is expired\n")
        assert table.search(action="audit.retention").records == []

    def test_where_nobody_can_be_asked_nothing_is_deleted(self, command, table, kept):
        table.append(aged(41))
        code, out, err = command("purge", "--days", "40")
        assert (code, out) == (2, "")
        assert err.startswith("error: --yes: nobody can be asked")
        assert kept() == {"bank-41"}

    @pytest.mark.parametrize(
        ("answer", "code", "left"), [("y\n", 0, set()), ("n\n", 1, {"bank-41"}), ("\n", 1, {"bank-41"})]
    )
    def test_on_a_terminal_a_person_is_shown_what_will_go_and_asked(
        self, command, table, kept, on_a_terminal, answer, code, left
    ):
        table.append(aged(41))
        on_a_terminal(answer)
        got, _, err = command("purge", "--days", "40")
        assert got == code
        assert "Delete these 1 records for good?" in err
        assert "default" in err
        assert kept() == left
        assert ("nothing was deleted" in err) == (code == 1)

    def test_a_run_that_could_leave_no_record_does_not_begin(self, command, table, database, kept):
        table.append(aged(41))
        with role(database, f"SELECT, DELETE ON {LOG}, {LOG}_set_aside, {LOG}_holds") as dsn:
            code, out, err = command("purge", "--days", "40", "--yes", dsn=dsn)
        assert (code, out) == (3, "")
        assert f"nothing was deleted, as the record of it can't be written to public.{LOG}: a right is missing" in err
        assert kept() == {"bank-41"}

    def test_where_telemetry_is_off_no_run_begins(self, command, table, kept, monkeypatch):
        table.append(aged(41))
        monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
        code, _, err = command("purge", "--days", "40", "--yes")
        assert code == 3
        assert "unset OTEL_SDK_DISABLED" in err
        assert kept() == {"bank-41"}

    @pytest.mark.parametrize("sampler", ["always_off", "traceidratio"])
    def test_what_the_environment_samples_is_nothing_to_the_record_of_a_run(self, command, table, monkeypatch, sampler):
        table.append(aged(41))
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
        assert command("purge", "--days", "40", "--yes")[0] == 0
        assert len(table.search(action="audit.retention").records) == 1

    def test_the_sweeper_deletes_and_the_writer_says_so(self, command, table, database, kept, monkeypatch):
        table.append(aged(41))
        with role_prefix(database) as prefix:
            roles = table.grant_roles(role_prefix=prefix)
            with role(database, f'"{roles.sweeper}"') as sweeper, role(database, f'"{roles.writer}"') as writer:
                monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_RETENTION_DSN", sweeper)
                code, _, err = command("purge", "--days", "40", "--yes", dsn=writer)
                assert code == 0, err
                # Whoever names a database has no other one in mind.
                assert command("purge", "--days", "40", "--yes", "--dsn", writer)[0] == 3
        assert kept() == set()
        assert len(table.search(action="audit.retention").records) == 1

    def test_one_role_can_be_both(self, command, table, database, kept):
        table.append(aged(41))
        with role_prefix(database) as prefix:
            roles = table.grant_roles(role_prefix=prefix)
            with role(database, f'"{roles.sweeper}"', f'"{roles.writer}"') as dsn:
                assert command("purge", "--days", "40", "--yes", dsn=dsn)[0] == 0
        assert kept() == set()

    def test_more_than_one_batch_goes_in_one_run(self, command, table, kept, monkeypatch):
        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_RETENTION_BATCH_SIZE", "2")
        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_RETENTION_BUDGET_SECONDS", "0.001")
        table.append(aged(5, *range(41, 48)))
        assert command("purge", "--days", "40", "--yes")[0] == 0
        assert kept() == {"bank-5"}

    def test_a_run_whose_process_is_killed_leaves_a_record_too(self, command, table, database, tmp_path):
        table.append(aged(41))
        environment = {**os.environ, "OTEL_ASTROCYTE_AUDIT_DSN": database}
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'DELETE%'"
        with psycopg.connect(database) as busy, psycopg.connect(database, autocommit=True) as looking:
            busy.execute(f"SELECT FROM {LOG} FOR UPDATE")
            arguments = [sys.executable, "-m", "astrocyte_otel_audit", "purge", "--days", "40", "--yes"]
            with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE) as purging:
                while looking.execute(waits).fetchone() == (0,):
                    assert purging.poll() is None
                purging.kill()
        command("spool", "replay")
        outcomes = [record.outcome for record in table.search(action="audit.retention").records]
        assert set(outcomes) == {"unknown"}

    def test_an_unreachable_server_is_one_line_without_the_password(self, command):
        code, out, err = command(
            "purge", "--days", "40", "--yes", dsn="postgresql://calvin:hunter2@127.0.0.1:1/memories"
        )
        assert (code, out) == (3, "")
        assert err == "error: nothing listens at that host and port; is Postgres running?\n"


class TestPartitioning:
    def test_a_dry_run_says_what_would_be_done_and_does_nothing(self, command, table, database):
        table.append(aged(5, 41))
        code, out, _ = command("migrate", "--partition-by", "month", "--dry-run")
        assert code == 0
        lines = out.splitlines()
        assert lines[0].startswith(f"public.{LOG} has about ")
        assert [line.split()[0] for line in lines[1:-1]] == [f"{number}." for number in range(1, len(lines) - 1)]
        assert all("; who waits: " in line for line in lines[1:-1])
        assert lines[-1] == "nothing was done; leave out --dry-run to do it"
        with psycopg.connect(database) as connection:
            assert connection.execute(f"SELECT relkind::text FROM pg_class WHERE relname = '{LOG}'").fetchone() == (
                "r",
            )

    def test_it_converts_the_table_says_each_step_and_may_be_repeated(self, command, table, kept):
        table.append(aged(5, 41))
        code, out, _ = command("migrate", "--partition-by", "day")
        assert code == 0
        assert len(out.splitlines()) > 2
        assert out.splitlines()[-1] == f"public.{LOG} is partitioned by the day"
        assert kept() == {"bank-5", "bank-41"}
        assert command("migrate", "--partition-by", "day")[1].splitlines()[-1] == f"public.{LOG} was partitioned before"
        dry = command("migrate", "--partition-by", "day", "--dry-run")
        assert dry == (0, f"public.{LOG} is partitioned already\n", "")

    def test_roles_have_their_rights_on_a_partitioned_table(self, command, table, database):
        with role_prefix(database) as prefix:
            code, out, _ = command("migrate", "--partition-by", "month", "--roles", "--role-prefix", prefix)
            assert code == 0
            assert out.splitlines()[-1].startswith("next: GRANT")

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (["--partition-by", "year"], 2, "--partition-by: got 'year'; accepted is day, week or month"),
            (["--dry-run"], 2, "--dry-run: given without --partition-by"),
            (["--partition-by", "day", "--dry-run", "--schema", "a;b"], 2, "schema: got 'a;b'"),
            (["--partition-by", "day", "--dry-run", "--table", "nowhere"], 3, "run `astrocyte-otel-audit migrate`"),
        ],
    )
    def test_bad_input_is_one_message_and_an_exit_code(self, command, options, code, message):
        got, out, err = command("migrate", *options)
        assert (got, out) == (code, "")
        assert message in err
        assert "Traceback" not in err


class TestTables:
    def test_what_a_sweep_could_not_do_is_in_its_line(self):
        fault = Fault(FaultClass.PARK, "the role may not sweep it", "42501")
        swept = [
            Swept("a", rows=1000, dropped=["p1", "p2", "p3", "p4", "p5"]),
            Swept("b", faults=[fault], is_finished=False),
            Swept("c", is_busy=True, is_finished=False),
            Swept("d", is_finished=False),
        ]
        lines = printed(swept_table(swept)).splitlines()[1:]
        for line, said in zip(
            lines,
            [
                "1,000",
                "the role may not sweep it [SQLSTATE 42501]",
                "somebody else is sweeping it",
                "stopped before the end",
            ],
            strict=True,
        ):
            assert said in line
        assert "p1, p2, p3 and 2 more" in lines[0]
        assert json.loads(swept_json(swept[1]))["faults"] == ["the role may not sweep it [SQLSTATE 42501]"]

    def test_hostile_names_are_inert(self):
        shown = printed(expiring_table([Expiring("public", f"bank {HOSTILE}", 1, NOW, NOW, (HOSTILE,))]))
        shown += printed(swept_table([Swept(HOSTILE, dropped=[HOSTILE])]))
        assert not set("\x1b\x07\u202e") & set(shown)
        assert shown.count("[red]x[/red]") == 4


@pytest.mark.parametrize(
    ("arguments", "taught"),
    [
        (["hold", "add"], ["hold add --bank user-calvin --reason", "several criteria must all fit".capitalize()]),
        (["hold", "release"], ["hold release 7"]),
        (["hold", "list"], ["hold list --all --json"]),
        (["stats"], ["stats --storage"]),
        (["purge"], ["purge --days 365 --action recall=30 --dry-run", "RETENTION_DAYS", "eu-ai-act, hipaa"]),
        (["migrate"], ["migrate --partition-by month --dry-run"]),
    ],
)
def test_help_teaches_with_an_example(command, arguments, taught):
    code, out, _ = command(*arguments, "--help")
    assert code == 0
    plain = re.sub(r"[\s│]+", " ", re.sub(r"\x1b\[[\d;]*m", "", out))
    for each in taught:
        assert each in plain


def test_every_command_closes_its_connections(command, table, database):
    table.append(aged(41))
    for arguments in (["hold", "list"], ["stats", "--storage"], ["purge", "--days", "40", "--yes"]):
        assert command(*arguments)[0] == 0
    with psycopg.connect(database) as connection:
        ours = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name ="
            " 'astrocyte-otel-audit' AND pid <> pg_backend_pid()"
        )
        assert ours.fetchone() == (1,)  # the fixture's own
