"""`doctor`, as a person and as a script run it."""

import json
import os
import pty
import re
import subprocess
import sys

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.servers import role

GRANTS = ("USAGE ON SCHEMA public", "INSERT ON astrocyte_audit_log, astrocyte_audit_log_set_aside")
COMMAND = [sys.executable, "-m", "astrocyte_otel_audit", "doctor"]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def writer(database):
    with role(database, *GRANTS) as dsn:
        yield dsn


def test_where_all_is_well_it_says_so_on_a_line_each_and_leaves_nothing(database, writer, tmp_path):
    result = run(OTEL_ASTROCYTE_AUDIT_DSN=writer, OTEL_ASTROCYTE_AUDIT_ACTIONS="retain,recall")
    assert (result.returncode, "failed" in result.stdout) == (0, False), result.stdout
    lines = result.stdout.splitlines()
    assert all(re.fullmatch(r"(ok|warning|skipped) +[a-z-]+ +\S.*", line) for line in lines)
    checks = [line.split()[1] for line in lines]
    assert len(set(checks)) == len(checks) > 20
    assert re.fullmatch(r"((\d+) warning \(spool-.*\), )?1 skipped, \d+ ok\n", result.stderr)
    assert list(tmp_path.iterdir()) == []
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT count(*) FROM astrocyte_audit_log").fetchone() == (0,)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--actions", "recall"), 0),
        ((), 1),
        (("--actions", "recall", "--table", "nowhere"), 1),
        (("--actions", "recall", "--schema", "a;b"), 2),
        (("--timeout", "0"), 2),
        (("--no-such-option",), 2),
        (("--dsn", "postgresql://writer:hunter2@127.0.0.1:1/memories"), 3),
        (("--dsn", "postgresql://writer:hun%ter2@127.0.0.1/memories"), 1),
    ],
)
def test_exit_codes(writer, arguments, code):
    result = run(*arguments, OTEL_ASTROCYTE_AUDIT_DSN=writer)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert "hun" not in result.stdout + result.stderr
    assert (result.stdout == "") is (code == 2)


def test_without_a_database_that_is_what_failed():
    result = run("--actions", "recall")
    assert result.returncode == 1
    assert "failed   dsn               no database is named -> set OTEL_ASTROCYTE_AUDIT_DSN=" in result.stdout


def test_variables_are_read_and_a_misspelt_one_is_named(database):
    result = run(
        OTEL_ASTROCYTE_AUDIT_DSN=database,
        OTEL_ASTROCYTE_AUDIT_ACTION="recall",
        OTEL_ASTROCYTE_AUDIT_TABLE="a;b",
        OTEL_ASTROCYTE_AUDIT_SPOOL_DIR="off",
    )
    assert result.returncode == 1
    for expected in (
        "is not a setting, and nobody reads it -> did you mean OTEL_ASTROCYTE_AUDIT_ACTIONS?",
        "failed   settings          OTEL_ASTROCYTE_AUDIT_TABLE: got 'a;b' -> accepted is a name",
        "warning  spool             it is off",
        "ok       canary",
    ):
        assert expected in result.stdout


def test_as_json_it_is_an_object_a_line(writer):
    result = run("--json", "--no-canary", OTEL_ASTROCYTE_AUDIT_DSN=writer, OTEL_ASTROCYTE_AUDIT_ACTION="\x1b[31m")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 1
    assert all(list(finding) == ["check", "status", "what", "advice"] for finding in found)
    assert {finding["status"] for finding in found} == {"ok", "warning", "failed", "skipped"}
    assert [finding["status"] for finding in found if finding["check"] == "canary"] == ["skipped"]


def test_a_role_that_may_do_more_than_write_is_a_warning_and_no_failure(database):
    result = run("--dsn", make_conninfo(database), "--actions", "*")
    assert result.returncode == 0
    assert re.search(
        r"^warning  rights            the role is a superuser: .* -> `.*migrate --roles`", result.stdout, re.M
    )


def test_a_terminal_gets_colours_and_no_line_is_wider_than_it(writer):
    master, slave = pty.openpty()
    environment = {**os.environ, "OTEL_ASTROCYTE_AUDIT_DSN": writer, "COLUMNS": "100", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(COMMAND, env=environment, stdout=slave, stderr=subprocess.PIPE, stdin=slave)
    os.close(slave)
    said = b""
    try:
        while piece := os.read(master, 65536):
            said += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(master)
    summary = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 1
    shown = said.decode()
    assert "\x1b[1;31mfailed \x1b[0m" in shown
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in shown.splitlines()]
    assert all(len(line) <= 100 for line in lines)
    assert any(line.strip().startswith("→ set OTEL_ASTROCYTE_AUDIT_ACTIONS=") for line in lines)
    assert summary.startswith("1 failed (allowlist), ")
