"""What `doctor` finds in a process and in a spool, and how it says it; the database is in the integration tests."""

import contextlib
import fcntl
import logging
import os
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from astrocyte_otel_audit import ConfigurationError, doctor
from astrocyte_otel_audit.doctor import (
    Check,
    Examination,
    Finding,
    beside,
    database,
    examine,
    exit_status,
    process,
    wiring,
)
from astrocyte_otel_audit.doctor import spool as spool_checks
from astrocyte_otel_audit.doctor.mounts import Mount, mount_of, trouble_with
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.pipeline import AuditSampler
from astrocyte_otel_audit.pipeline.acknowledgement import Acknowledged, write_acknowledged
from astrocyte_otel_audit.pipeline.beside import _alone
from astrocyte_otel_audit.pipeline.directory import ACKNOWLEDGED
from astrocyte_otel_audit.pipeline.segment import RECORD, captured_frame
from astrocyte_otel_audit.pipeline.spool import Spool
from astrocyte_otel_audit.postgres.inspection import Canary, Relation, Rights, Server, _is_local, hosts
from astrocyte_otel_audit.view.doctor import plain_line, styled_line, summary
from tests.records import full_captured

PREFIX = "OTEL_ASTROCYTE_AUDIT_"


def the_only(findings) -> Finding:
    (finding,) = findings
    return finding


def statuses(findings) -> dict[str, str]:
    return {finding.check: finding.status for finding in findings}


# Settings


def test_without_a_variable_there_is_nothing_to_refuse():
    assert the_only(process.check_settings(Examination())) == ("settings", "ok", "no variable is set", None)


def test_variables_that_are_accepted_are_named_and_their_values_are_not(monkeypatch):
    monkeypatch.setenv(PREFIX + "DSN", "postgresql://writer:hunter2@host/db")
    monkeypatch.setenv(PREFIX + "ACTIONS", "recall")
    monkeypatch.setenv(PREFIX + "SCHEMA", " ")
    found = the_only(process.check_settings(Examination()))
    assert (found.status, found.what) == ("ok", f"accepted: {PREFIX}ACTIONS, _DSN")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        (PREFIX + "ACTION", f"did you mean {PREFIX}ACTIONS?"),
        (PREFIX + "SPOOLDIR", f"did you mean {PREFIX}SPOOL_DIR?"),
        (PREFIX.lower() + "dsn", f"did you mean {PREFIX}DSN?"),
        (PREFIX + "XYZZY", "unset it; the README lists the settings"),
    ],
)
def test_a_misspelt_variable_is_a_warning_with_the_nearest_name(monkeypatch, name, advice):
    monkeypatch.setenv(name, "recall")
    found = the_only(process.check_settings(Examination()))
    assert found == ("settings", "warning", f"{name} is not a setting, and nobody reads it", advice)


@pytest.mark.parametrize(
    ("name", "value", "what", "advice"),
    [
        (PREFIX + "TABLE", "a;b", "got 'a;b'", "accepted is a name of 1 to 44 letters"),
        (PREFIX + "SPOOL_FSYNC", "sometimes", "got 'sometimes'", "accepted is never, interval or always"),
        (PREFIX + "MAPPINGS", "hindsite", "holds 'hindsite'", "accepted are SpanMapping and astrocyte"),
        (PREFIX + "MAX_QUEUE_SIZE", "many", "got 'many'", "accepted is a whole number"),
        ("OTEL_BSP_SCHEDULE_DELAY", "-1", "got -1", "accepted is a number above 0"),
        (PREFIX + "SCHEMA", "host=x password=hunter2", "got what looks like a connection string", "accepted is a name"),
    ],
)
def test_a_value_that_is_not_accepted_has_failed(monkeypatch, name, value, what, advice):
    monkeypatch.setenv(name, value)
    found = the_only(process.check_settings(Examination()))
    assert (found.check, found.status) == ("settings", "failed")
    assert found.what.startswith(f"{name}: {what}")
    assert found.advice.startswith(advice)
    assert "hunter2" not in str(found)


@pytest.mark.parametrize(
    ("argument", "option"), [({"schema": "a;b"}, "--schema"), ({"table": "a;b"}, "--table"), ({"dsn": " "}, "--dsn")]
)
def test_an_argument_that_is_not_accepted_is_wrong_usage(argument, option):
    with pytest.raises(ConfigurationError, match=f"^{option}: "):
        Examination(**argument)


def test_an_argument_goes_before_its_variable(monkeypatch, tmp_path):
    for name in ("SCHEMA", "ACTIONS", "SPOOL_DIR"):
        monkeypatch.setenv(PREFIX + name, "variable")
    examination = Examination(schema="argument", actions="retain, recall", spool_dir="off")
    assert examination.value("schema") == "argument"
    assert examination.value("actions") == ("retain", "recall")
    assert examination.spool is None


# Allowlist, SDK, limits, sampler, versions


@pytest.mark.parametrize(
    ("actions", "status", "what"),
    [
        (None, "failed", "nothing is audited"),
        (" , ", "failed", "nothing is audited"),
        ("*", "ok", "all actions"),
        ("retain,recall.*", "ok", "retain, recall.*"),
    ],
)
def test_the_allowlist(actions, status, what):
    found = the_only(process.check_allowlist(Examination(actions=actions)))
    assert (found.check, found.status) == ("allowlist", status)
    assert found.what.startswith(what)
    assert (found.advice is not None and f"{PREFIX}ACTIONS=" in found.advice) is (status == "failed")


def test_the_allowlist_names_what_is_mapped(monkeypatch):
    monkeypatch.setenv(PREFIX + "MAPPINGS", "astrocyte")
    assert "of spans of others too: astrocyte" in the_only(process.check_allowlist(Examination(actions="*"))).what


@pytest.mark.parametrize(("value", "status"), [("", "ok"), ("false", "ok"), ("true", "failed"), (" TRUE ", "failed")])
def test_a_disabled_sdk_has_failed(monkeypatch, value, status):
    monkeypatch.setenv("OTEL_SDK_DISABLED", value)
    assert the_only(process.check_sdk(Examination())).status == status


@pytest.mark.parametrize(
    ("variable", "value", "status"),
    [
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "31", "warning"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "32", "ok"),
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", "31", "warning"),
        ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "127", "warning"),
        ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "128", "ok"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "few", "failed"),
    ],
)
def test_limits_that_cut_records(monkeypatch, variable, value, status):
    monkeypatch.setenv(variable, value)
    found = the_only(process.check_limits(Examination()))
    assert (found.check, found.status) == ("limits", status)
    if status == "warning":
        assert f"set {variable.replace('OTEL_ATTR', 'OTEL_SPAN_ATTR')} to " in found.advice


@pytest.mark.parametrize(
    ("name", "argument", "status", "what"),
    [
        ("", "", "ok", "the SDK's default; audited"),
        ("always_off", "", "ok", "always_off; audited"),
        ("parentbased_traceidratio", "0.1", "ok", "parentbased_traceidratio 0.1; audited"),
    ],
)
def test_the_sampler(monkeypatch, name, argument, status, what):
    if name:
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", name)
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    found = the_only(process.check_sampler(Examination()))
    assert found.status == status
    assert found.what.startswith(what)


def test_a_sampler_that_can_not_be_made_has_failed(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setattr(process, "TracerProvider", lambda **_: float("two"))
    found = the_only(process.check_sampler(Examination()))
    assert (found.status, found.what) == ("failed", "traceidratio can't be made")


def test_versions_that_are_supported():
    found = the_only(process.check_versions(Examination()))
    assert found.status == "ok"
    for name in ("opentelemetry-sdk", "psycopg"):
        assert f"{name} {metadata.version(name)}" in found.what


@pytest.mark.parametrize("installed", ["3.1.20", "4.0"])
def test_a_version_that_is_not_supported_is_a_warning(monkeypatch, installed):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: installed if name == "psycopg" else real(name))
    found = the_only(process.check_versions(Examination()))
    assert found.status == "warning"
    assert found.what == f"psycopg {installed} is installed; supported is >=3.2.1, <4"
    assert found.advice == "pip install 'psycopg>=3.2.1,<4'"


# Wiring


@pytest.mark.parametrize("actions", ["*", "recall", "audit.*", "re?all", "[mrs]ecall,x*"])
def test_an_operation_that_is_not_sampled_becomes_a_record_and_nothing_is_spooled(actions, tmp_path):
    found = the_only(wiring.check_wiring(Examination(actions=actions)))
    assert (found.check, found.status) == ("wiring", "ok"), found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", 32), ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", 128)],
)
def test_a_record_that_the_limits_cut_is_a_warning(monkeypatch, variable, value):
    monkeypatch.setenv(variable, str(value))
    assert the_only(wiring.check_wiring(Examination(actions="*"))).status == "ok"
    monkeypatch.setenv(variable, str(value - 1))
    assert the_only(wiring.check_wiring(Examination(actions="*"))).status == "warning"


def test_a_sampler_that_drops_the_operation_has_failed(monkeypatch):
    monkeypatch.setattr(AuditSampler, "should_sample", lambda self, *arguments: self.delegate.should_sample(*arguments))
    found = the_only(wiring.check_wiring(Examination(actions="*")))
    assert (found.status, "did not take" in found.what) == ("failed", True)


def test_a_storage_that_gets_nothing_has_failed(monkeypatch):
    monkeypatch.setattr(wiring._InMemory, "append", lambda self, records: wiring.Appended(stored=len(records)))
    found = the_only(wiring.check_wiring(Examination(actions="*")))
    assert (found.status, "became no record" in found.what) == ("failed", True)


@pytest.mark.parametrize(
    ("actions", "action"),
    [
        (("recall",), "recall"),
        (("*",), "audit.canary"),
        (("re*",), "recanary"),
        (("a?c",), "axc"),
        (("[ab]c*",), "accanary"),
        (("[!a]",), None),
        ((), None),
    ],
)
def test_an_action_that_an_allowlist_allows(actions, action):
    assert wiring.allowed_action(actions) == action


def test_without_an_action_to_try_the_wiring_is_skipped():
    assert the_only(wiring.check_wiring(Examination(actions="[!a]"))).status == "skipped"


# The database, as far as it needs no server


@pytest.mark.parametrize(
    ("dsn", "status", "what"),
    [
        (None, "failed", "no database is named"),
        ("postgresql://writer:hun%ter2@host/db", "failed", "can't be parsed"),
        ("host=a port=hunter2", "failed", "its port is no number"),
        ("postgresql://writer:hunter2@host/db", "ok", "the DSN can be parsed"),
    ],
)
def test_the_dsn_is_never_shown(dsn, status, what):
    found = the_only(database.check_dsn(Examination(dsn)))
    assert (found.status, found.what) == (status, what)
    assert "hun" not in str(found)


@pytest.mark.parametrize(
    ("dsn", "names"),
    [
        ("postgresql://a,b:5433/db", ["a", "b"]),
        ("postgresql://127.0.0.1/db", ["127.0.0.1"]),
        ("host=/tmp,a", ["a"]),
        ("host=@abstract", []),
        ("host=a hostaddr=10.0.0.1", []),
        ("service=memories", []),
        ("dbname=db", []),
    ],
)
def test_hosts_whose_names_need_resolving(dsn, names, monkeypatch):
    for variable in ("PGHOST", "PGSERVICE"):
        monkeypatch.delenv(variable, raising=False)
    assert hosts(dsn) == names


@pytest.mark.parametrize(
    ("names", "status", "what"),
    [
        ("good", "ok", "resolved in"),
        ("good,better", "ok", "resolved in"),
        ("bad", "failed", "the host's name can't be resolved"),
        ("silent", "failed", "the host's name can't be resolved"),
        ("good,bad", "warning", "of 2 hosts, the name of number 2 can't be resolved"),
        ("silent,bad", "failed", "of 2 hosts, the name of number 1, 2 can't be resolved"),
    ],
)
def test_host_names_are_resolved_within_a_time(monkeypatch, names, status, what):
    ended = threading.Event()

    def resolve(name, port):
        if name == "silent":
            ended.wait(10)
        if name in ("silent", "bad"):
            raise socket.gaierror
        return [("address",)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    try:
        found = the_only(database.check_host(Examination(f"postgresql://{names}/db", timeout_seconds=0.05)))
    finally:
        ended.set()
    assert found.status == status
    assert found.what.startswith(what)
    assert "bad" not in str(found)


SERVER = Server("memories", "writer", "18.4", 180_004, False, False, 0.004, False, False, True, False)


@pytest.mark.parametrize(
    ("changes", "check", "status", "said"),
    [
        ({}, "connection", "ok", "to memories as writer, in 4 ms"),
        ({}, "tls", "ok", "on this machine"),
        ({"pooled": True}, "tls", "ok", "the pooler is on this machine"),
        ({"encrypted": True}, "tls", "ok", "TLS is in use"),
        ({"local": False}, "tls", "warning", "sslmode=verify-full"),
        ({}, "server", "ok", "PostgreSQL 18.4"),
        ({"version_number": 130_010, "version": "13.10"}, "server", "failed", "upgrade to 14 or later"),
        ({"version_number": 140_000}, "server", "ok", ""),
        ({"in_recovery": True}, "server", "failed", "target_session_attrs"),
        ({"read_only": True}, "server", "failed", "default_transaction_read_only"),
        ({"pooled": True}, "server", "ok", "pool sessions or transactions, not statements"),
    ],
)
def test_what_a_server_is_like(changes, check, status, said):
    examination = Examination()
    examination.inspector = SimpleNamespace(server=lambda: SERVER._replace(**changes))
    (found,) = [finding for finding in database.check_connection(examination) if finding.check == check]
    assert found.status == status
    assert said in str(found)


@pytest.mark.parametrize(("proves", "status"), [(True, "ok"), (False, "warning")])
def test_a_server_on_another_machine_has_to_prove_which_it_is(proves, status):
    examination = Examination()
    examination.inspector = SimpleNamespace(
        server=lambda: SERVER._replace(encrypted=True, verified=proves, local=False)
    )
    (found,) = [finding for finding in database.check_connection(examination) if finding.check == "tls"]
    assert found.status == status
    assert ("sslmode=verify-full" in str(found)) is not proves


@pytest.mark.parametrize(
    ("host", "address", "local"),
    [
        ("", "", True),
        ("/tmp", "", True),
        ("@abstract", None, True),
        ("localhost", "127.0.0.1", True),
        ("localhost", "", True),
        ("db", "::1", True),
        ("db", "10.0.0.1", False),
        ("db", "", False),
        ("localhost", "10.0.0.1", False),
    ],
)
def test_which_servers_are_on_this_machine(host, address, local):
    assert _is_local(host, address) is local


@pytest.mark.parametrize(
    ("skew", "status", "what"),
    [
        (0.0001, "ok", "to 1 ms"),
        (-0.9, "ok", "to 900 ms"),
        (1.5, "warning", "1.5 s ahead of this machine's"),
        (-59, "warning", "59 s behind this machine's"),
        (61, "failed", "61 s ahead of"),
        (-3600, "failed", "3.6e+03 s behind"),
    ],
)
def test_clocks_that_differ(skew, status, what):
    examination = Examination()
    examination.inspector = SimpleNamespace(clock_skew=lambda: skew)
    found = the_only(database.check_clock(examination))
    assert found.status == status
    assert what in found.what


# The spool


def leave(root: Path, destination: str = "elsewhere", *, gap: int = 0) -> Path:
    """Leave what a process leaves that was killed; return its directory."""
    spool = Spool(root, destination, max_bytes=10**6, max_in_memory=100)
    for number in range(3):
        spool.append(captured_frame(RECORD, full_captured(number)))
    if gap:
        spool.note_gap(full_captured(9, action="audit.gap", metadata={"missing": gap}))
    spool.after_fork()
    (directory,) = [path for path in root.iterdir() if path.is_dir()]
    return directory


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "spool"
    root.mkdir(mode=0o700)
    return root


def look(check, root: Path | str, **arguments) -> dict[str, Finding]:
    return {finding.check: finding for finding in check(Examination(spool_dir=root, **arguments))}


def test_a_spool_that_is_not_there_is_not_made(tmp_path):
    found = look(spool_checks.check_directory, tmp_path / "a" / "spool")
    assert found["spool"] == ("spool", "ok", f"{tmp_path}/a/spool will be made", None)
    assert found["spool-locks"].status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_spool_that_is_there_is_left_as_it_was(root):
    leave(root)
    before = sorted(root.rglob("*"))
    found = look(spool_checks.check_directory, root)
    assert statuses(found.values()) == {"spool": "ok", "spool-locks": "ok"}
    assert sorted(root.rglob("*")) == before


def test_a_spool_that_is_off_is_a_warning_and_nothing_else_is_looked_at():
    assert look(spool_checks.check_directory, "off")["spool"].status == "warning"
    for check in (spool_checks.check_disk, spool_checks.check_file_system, spool_checks.check_what_is_left):
        assert look(check, "off") == {}


def test_a_file_where_the_spool_should_be_has_failed(tmp_path):
    (tmp_path / "spool").write_text("")
    for root in (tmp_path / "spool", tmp_path / "spool" / "below"):
        assert look(spool_checks.check_directory, root)["spool"].what == f"{tmp_path}/spool is no directory"


def test_a_spool_that_can_not_be_written_to_has_failed(root, monkeypatch):
    def refuse(*arguments, **named):
        raise PermissionError(13, "no")

    monkeypatch.setattr(spool_checks.tempfile, "mkdtemp", refuse)
    found = look(spool_checks.check_directory, root)
    assert list(found) == ["spool"]
    assert found["spool"].what == f"{root} can't be written to: Permission denied"
    assert found["spool"].advice.startswith("run doctor as the user that your service runs as")


def test_a_spool_that_others_may_read_is_a_warning(root):
    root.chmod(0o750)
    found = look(spool_checks.check_directory, root)["spool"]
    assert (found.status, found.advice) == ("warning", f"chmod 700 {root}")


def test_a_spool_of_somebody_else_is_a_warning(root, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12_345_678)
    found = look(spool_checks.check_directory, root)["spool"]
    assert found.status == "warning"
    assert "this is user 12345678" in found.what


@pytest.mark.parametrize("fault", [lambda *_: None, lambda *_: (_ for _ in ()).throw(OSError(38, "no locks"))])
def test_locks_that_do_not_hold_have_failed(root, monkeypatch, fault):
    monkeypatch.setattr(fcntl, "flock", fault)
    found = look(spool_checks.check_directory, root)["spool-locks"]
    assert (found.status, "do not hold" in found.what) == ("failed", True)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "files", "status", "what"),
    [
        (1 << 40, 10**6, "ok", "1,024 GiB are free, and a process may take 1,024 MiB"),
        (1 << 29, 10**6, "warning", "512 MiB are free"),
        (1 << 19, 10**6, "failed", "512 KiB are free"),
        (1 << 40, 99, "failed", "99 more files can be made"),
        (1 << 40, None, "ok", ""),
    ],
)
def test_a_disk_that_is_full_or_nearly_so(root, monkeypatch, free, files, status, what):
    facts = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096, f_files=0 if files is None else 10**7, f_favail=files)
    monkeypatch.setattr(os, "statvfs", lambda path: facts)
    found = look(spool_checks.check_disk, root)["spool-disk"]
    assert found.status == status
    assert what in found.what


MOUNTINFO = r"""
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 27 0:50 / /srv rw,relatime shared:1 master:2 - nfs4 server:/export rw,vers=4.2
41 40 0:51 / /srv/local\040disk rw - xfs /dev/vdb rw
42 27 0:52 / /over rw - ext4 /dev/vdc rw
43 42 0:53 / /over rw - tmpfs tmpfs rw
garbage
"""


@pytest.mark.parametrize(
    ("path", "mount"),
    [
        ("/var/spool", ("/", "ext4")),
        ("/srv/spool", ("/srv", "nfs4")),
        ("/srv", ("/srv", "nfs4")),
        ("/srvs", ("/", "ext4")),
        ("/srv/local disk/spool", ("/srv/local disk", "xfs")),
        ("/over/spool", ("/over", "tmpfs")),
    ],
)
def test_the_mount_of_a_path(path, mount):
    assert mount_of(Path(path), MOUNTINFO) == Mount(*mount)
    assert mount_of(Path(path), "") is None


@pytest.mark.parametrize(
    ("file_system", "said"),
    [
        *((name, "locks and fsync may not hold") for name in ("nfs", "nfs4", "cifs", "fuse.sshfs", "9p", "fuseblk")),
        ("overlay", "mount a volume"),
        ("tmpfs", "lost when the machine restarts"),
        *((name, None) for name in ("ext4", "xfs", "btrfs", "zfs", "f2fs", "apfs")),
    ],
)
def test_what_is_to_be_feared_of_a_file_system(file_system, said, root, monkeypatch, tmp_path):
    trouble = trouble_with(file_system)
    assert said is None if trouble is None else said in " ".join(trouble)
    (tmp_path / "mountinfo").write_text(f"1 1 0:1 / / rw - {file_system} x rw\n")
    monkeypatch.setattr(spool_checks, "MOUNTS", tmp_path / "mountinfo")
    found = look(spool_checks.check_file_system, root)["spool-filesystem"]
    assert found.status == ("ok" if said is None else "warning")


def test_a_system_that_does_not_say_its_mounts_is_skipped(root, monkeypatch, tmp_path):
    monkeypatch.setattr(spool_checks, "MOUNTS", tmp_path / "nowhere")
    assert look(spool_checks.check_file_system, root)["spool-filesystem"].status == "skipped"


def test_a_spool_with_nothing_left_in_it(root):
    for place in (root, root / "nowhere"):
        found = look(spool_checks.check_what_is_left, place)
        assert statuses(found.values()) == {"spool-left": "ok", "spool-gaps": "ok", "spool-damaged": "ok"}


def test_what_a_living_process_has_is_its_own(root):
    spool = Spool(root, "here", max_bytes=10**6, max_in_memory=100)
    spool.append(captured_frame(RECORD, full_captured()))
    found = look(spool_checks.check_what_is_left, root)["spool-left"]
    spool.close()
    assert (found.status, found.what) == ("ok", "no ended process has left anything; 1 live")


def test_what_ended_processes_have_left_is_a_warning(root):
    leave(root)
    found = look(spool_checks.check_what_is_left, root)
    assert statuses(found.values()) == {"spool-left": "warning", "spool-gaps": "ok", "spool-damaged": "ok"}
    assert found["spool-left"].what == "3 records of 1 ended processes wait, the oldest of 2026-03-04 05:06 UTC"
    assert "spool replay" in found["spool-left"].advice
    assert "--any-destination" not in found["spool-left"].advice


@pytest.mark.parametrize("same", [True, False])
def test_what_is_for_another_table_needs_more(root, same):
    examination = Examination(spool_dir=root)
    examination.inspector = SimpleNamespace(destination="here")
    leave(root, "here" if same else "elsewhere")
    found = next(spool_checks.check_what_is_left(examination))
    assert ("--any-destination" in found.advice) is not same


def test_a_gap_that_is_not_in_the_table_is_a_warning(root):
    leave(root, gap=17)
    found = look(spool_checks.check_what_is_left, root)["spool-gaps"]
    assert found.status == "warning"
    assert found.what.startswith("17 records could not be accepted")


def test_what_is_damaged_is_a_warning(root):
    directory = leave(root)
    with (directory / "000001.segment").open("ab") as segment:
        segment.write(b"torn")
    (root / "damaged-1-000001").write_text("x")
    found = look(spool_checks.check_what_is_left, root)["spool-damaged"]
    assert found.status == "warning"
    assert found.what == "1 lines can't be read, and 1 files of such lines are kept"


# The writer beside the processes


@pytest.fixture
def external(monkeypatch):
    monkeypatch.setenv(PREFIX + "WRITER", "external")


@pytest.fixture
def at_work(root):
    """Begins writers, as far as their locks."""
    with contextlib.ExitStack() as stack:
        yield lambda *destinations: stack.enter_context(_alone(root, destinations, threading.Event()))


@pytest.fixture
def application(root):
    """The spool of a process that leaves writing to another one, with an operation that ended so many seconds ago."""
    spools = []

    def application(seconds, *, external=True):
        spool = Spool(root, "default", max_bytes=10**6, max_in_memory=0, cleared_by_others=external)
        end = datetime.now(UTC) - timedelta(seconds=seconds)
        spool.append(captured_frame(RECORD, full_captured(ended_at=end)))
        spools.append(spool)
        return spool

    yield application
    for spool in spools:
        spool.after_fork()  # closes


def test_where_each_process_writes_no_other_is_needed(root, application):
    application(3_600, external=False)
    found = look(beside.check_writer, root)
    assert found == {"writer": ("writer", "ok", "each process writes its own records", None)}


def test_a_writer_at_work_for_the_destination_is_as_it_should_be(root, external, at_work, monkeypatch):
    at_work("default", "postgresql-1")
    found = look(beside.check_writer, root)
    assert statuses(found.values()) == {"writer": "ok", "writer-waiting": "ok"}
    monkeypatch.setenv(PREFIX + "DESTINATION", "postgresql-1")
    assert look(beside.check_writer, root)["writer"].status == "ok"


def test_no_writer_is_a_warning(root, external):
    with _alone(root, ["default"], threading.Event()):
        pass  # it has ended
    (root / "writer-of-nobody.lock").write_text("no JSON")
    found = look(beside.check_writer, root)
    assert statuses(found.values()) == {"writer": "warning", "writer-waiting": "ok"}
    assert found["writer"].what == "none is at work: records wait in the spool"
    assert "astrocyte-otel-audit writer" in found["writer"].advice


def test_a_writer_for_another_destination_is_a_warning(root, external, at_work):
    at_work("elsewhere")
    found = look(beside.check_writer, root)["writer"]
    assert found.status == "warning"
    assert found.advice == "start it with --destination default too"


def test_a_writer_needs_a_spool(external):
    found = look(beside.check_writer, "off")
    assert statuses(found.values()) == {"writer": "failed"}


@pytest.mark.parametrize(
    ("seconds", "said_seconds", "everything", "status"),
    [
        (10, None, False, "ok"),
        (3_600, None, False, "warning"),
        (3_600, 3_500, False, "warning"),
        (3_600, 10, False, "ok"),
        (3_600, 3_500, True, "ok"),
        (10, 3_500, False, "ok"),
    ],
)
def test_what_waits_while_nothing_is_written_is_a_warning(
    root, external, at_work, application, seconds, said_seconds, everything, status
):
    spool = application(seconds)
    if said_seconds is not None:
        write_acknowledged(spool.path, Acknowledged(*(spool.end() if everything else (1, 0)), 0, 0))
        said = time.time() - said_seconds
        os.utime(spool.path / ACKNOWLEDGED, (said, said))
    at_work("default")
    found = look(beside.check_writer, root)
    assert statuses(found.values()) == {"writer": "ok", "writer-waiting": status}
    assert ("what the writer says" in str(found["writer-waiting"])) is (status == "warning")


def test_what_waits_for_nobody_needs_a_writer(root, external, application):
    application(3_600)
    found = look(beside.check_writer, root)
    assert statuses(found.values()) == {"writer": "warning", "writer-waiting": "warning"}
    assert found["writer-waiting"].what == "records of 1 processes wait, and none was written for a minute"
    assert found["writer-waiting"].advice.startswith("run `astrocyte-otel-audit writer`")


def test_an_application_that_leaves_writing_to_another_needs_no_database(root, external):
    found = list(examine(Examination(spool_dir=root, actions="*")))
    assert [finding.check for finding in found if finding.status == "failed"] == []
    assert {finding.check for finding in found if finding.status == "skipped"} >= {"dsn", "connection", "canary"}
    assert all("--dsn" in finding.advice for finding in found if finding.check in ("dsn", "connection", "canary"))
    assert statuses(found)["wiring"] == "ok"
    assert exit_status(found) == 0


# All of them together


def test_every_check_says_something_and_what_to_do_unless_it_is_ok():
    found = list(examine(Examination()))
    said = {finding.check for finding in found}
    assert {check.name for check in doctor.CHECKS} <= said
    assert all((finding.advice is None) is (finding.status == "ok") for finding in found)
    assert [finding.check for finding in found if finding.status == "failed"] == ["allowlist", "dsn"]
    assert exit_status(found) == 1


def test_what_a_check_needs_comes_before_it():
    seen = {"server", "tls"}
    for check in doctor.CHECKS:
        assert set(check.needs) <= seen
        seen.add(check.name)


def test_what_needs_a_check_that_failed_is_skipped_and_names_the_root(monkeypatch):
    checks = (
        Check("first", lambda _: iter([Finding("first", "failed", "it failed", "mend it")])),
        Check("second", lambda _: pytest.fail("looked at"), ("first",)),
        Check("third", lambda _: pytest.fail("looked at"), ("second",)),
        Check("fourth", lambda _: iter([Finding("fourth", "ok", "well")])),
    )
    monkeypatch.setattr(doctor, "CHECKS", checks)
    _, second, third, fourth = examine(Examination())
    assert second == ("second", "skipped", "not looked at", "mend `first` first")
    assert third == ("third", "skipped", "not looked at", "mend `first` first")
    assert fourth.status == "ok"


def raising(error):
    def look(examination):
        raise error
        yield

    return look


def test_a_check_that_raises_has_failed_and_the_others_go_on(monkeypatch):
    checks = (Check("first", raising(RuntimeError("hunter2"))), Check("second", lambda _: iter([])))
    monkeypatch.setattr(doctor, "CHECKS", checks)
    (found,) = examine(Examination())
    assert found[:3] == ("first", "failed", "the check itself failed (RuntimeError)")


@pytest.mark.parametrize(
    ("sqlstate", "checks", "code"),
    [
        (None, ["connection", "table", "rights"], 3),
        ("57P01", ["connection", "table", "rights"], 3),
        ("53100", ["table", "rights"], 1),
    ],
)
def test_a_server_that_goes_away_on_the_way_is_told_from_one_that_refuses(monkeypatch, sqlstate, checks, code):
    error = DatabaseUnavailableError("it broke; mend it", sqlstate)
    monkeypatch.setattr(
        doctor, "CHECKS", (Check("table", raising(error)), Check("rights", lambda _: iter([]), ("connection",)))
    )
    found = list(examine(Examination()))
    assert [finding.check for finding in found] == (checks if code == 3 else ["table"])
    assert found[0].status == "failed"
    assert "it broke" in found[0].what
    assert found[0].advice == "mend it"
    assert exit_status(found) == code


def test_nothing_is_logged_beside_it_and_the_loggers_are_as_before(monkeypatch, caplog, capfd):
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "20")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "no such sampler")
    list(examine(Examination(actions="*")))
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("astrocyte_otel_audit").propagate
    assert logging.getLogger("astrocyte_otel_audit").handlers == []


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ([("tls", "warning")], 0),
        ([("tls", "ok"), ("table", "skipped")], 0),
        ([("table", "failed")], 1),
        ([("dsn", "failed")], 1),
        ([("allowlist", "failed"), ("connection", "failed")], 3),
        ([("host", "failed")], 3),
        ([("host", "warning")], 0),
    ],
)
def test_exit_codes(found, code):
    assert exit_status(Finding(check, status, "") for check, status in found) == code


# Rights and canary, where real ones are hard to come by


def test_a_canary_that_is_not_wanted_is_skipped():
    assert the_only(database.check_canary(Examination(canary=False))).status == "skipped"


def test_a_canary_that_reads_back_otherwise_is_a_warning():
    examination = Examination()
    rights = Rights(False, False, True, ["SELECT", "INSERT"])
    examination.inspector = SimpleNamespace(
        rights=lambda: (rights, rights), canary=lambda **_: Canary(True, True, unchanged=False)
    )
    assert the_only(database.check_canary(examination)).status == "warning"


def test_a_view_in_place_of_the_table_is_a_warning():
    view = Relation("v", {})
    assert next(iter(database._troubles("table", "public.log", view, {}))).status == "warning"


# How it is said

HOSTILE = "\x1b]0;owned\x07\u202ekcab [red]x[/red]\n"


@pytest.mark.parametrize("status", ["ok", "warning", "failed", "skipped"])
def test_hostile_text_is_inert(status):
    line = plain_line("settings", status, HOSTILE, HOSTILE)
    console = Console(width=100, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(styled_line("settings", status, HOSTILE, HOSTILE))
    shown = console.export_text()
    console.file.close()
    for text in (line, shown):
        assert not set("\x1b\x07\u202e") & set(text)
        assert "[red]x[/red]" in text
    assert "\n" not in line


def test_a_terminal_has_what_to_do_on_a_line_of_its_own_below_what_is_wrong(capsys):
    Console(width=60).print(styled_line("settings", "failed", "wrong " * 12, "do this"))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].split()[:3] == ["failed", "settings", "wrong"]
    assert lines[-1] == " " * 27 + "→ do this"
    assert all(len(line) <= 60 for line in lines)


def test_a_summary_names_what_needs_somebody():
    found = [("a", "ok"), ("b", "warning"), ("c", "failed"), ("b", "warning"), ("d", "skipped"), ("e", "ok")]
    assert summary(found) == "1 failed (c), 2 warning (b), 1 skipped, 2 ok"
    assert summary([("a", "ok")]) == "1 ok"
