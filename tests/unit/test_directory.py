"""The directory of a process: its own alone, locked for as long as it lives, and gone once nothing is in it."""

import errno
import fcntl
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from astrocyte_otel_audit.pipeline.directory import (
    ACKNOWLEDGED,
    GAP,
    LOCK,
    ProcessDirectory,
    SpoolError,
    check,
    clear_unfinished,
    create,
    destination_of,
    directories,
    in_words,
    remove,
    try_lock,
)  # fmt: skip
from astrocyte_otel_audit.pipeline.segment import RECORD, captured_frame, frame, header_frame
from tests.records import full_captured

HEADER_LINE = header_frame("there")
RECORD_LINE = captured_frame(RECORD, full_captured())


@pytest.fixture
def root(tmp_path):
    return tmp_path / "state" / "spool"


@pytest.fixture
def make(root):
    made = []

    def make(gap=b"gap"):
        made.append(ProcessDirectory(root, gap))
        return made[-1]

    yield make
    for directory in made:
        directory.close()


@pytest.fixture
def leave(root):
    """Leaves what is not finished: a directory of files, so many seconds old."""

    def leave(name, files=(), age=61.0):
        path = root / name
        path.mkdir(parents=True)
        for each in files:
            (path / each).touch()
        os.utime(path, (time.time() - age,) * 2)
        return path

    return leave


def descriptors():
    """How many are open in this process."""
    return len(os.listdir("/dev/fd"))


def lives(path):
    """Say whether the process of a directory does."""
    descriptor = try_lock(path / LOCK)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def in_a_child(body):
    """Call it in a forked child, and return the child's id and what it gave, a line."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(body()).encode() + b"\n")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as said:
        return child, said.readline().strip()


# Making it.


def test_it_has_a_lock_and_a_gap_and_is_found(make, root):
    directory = make(b"nothing is missing")
    assert sorted(path.name for path in directory.path.iterdir()) == [GAP, LOCK]
    assert (directory.path / GAP).read_bytes() == b"nothing is missing"
    assert directories(root) == [directory.path]
    assert directory.path.name.startswith(f"{os.getpid()}-")


def test_each_is_another(make, root):
    made = {make().path for _ in range(5)}
    assert len(made) == 5
    assert set(directories(root)) == made


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_it_is_its_owners_alone(make, root, umask):
    before = os.umask(umask)
    try:
        path = make().path
    finally:
        os.umask(before)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (root, path)] == [0o700, 0o700]
    assert [stat.S_IMODE(each.stat().st_mode) for each in path.iterdir()] == [0o600, 0o600]


def test_it_is_hidden_until_it_is_locked(make, root, monkeypatch):
    real, seen = fcntl.flock, []

    def flock(descriptor, operation):
        seen.append(([path.name[0] for path in root.iterdir()], directories(root)))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    make()
    assert seen == [(["."], [])]
    assert [path.name[0] for path in root.iterdir()] != ["."]


def test_a_root_that_is_a_file_is_the_systems_error(make, root):
    root.parent.mkdir()
    root.touch()
    with pytest.raises(OSError):
        make()


def test_its_gap_is_written_over(make):
    directory = make(b"0000")
    for gap in (b"1111", b"2222"):
        directory.write_gap(gap)
        assert (directory.path / GAP).read_bytes() == gap


@pytest.mark.parametrize("trouble", ["no lock", "no gap", "half a gap", "no descriptors", "no name"])
def test_one_that_cant_be_made_leaves_nothing(root, monkeypatch, trouble):
    def failing(*arguments, **options):
        raise OSError(errno.ENOLCK, "")

    if trouble == "no lock":
        monkeypatch.setattr(fcntl, "flock", failing)
    elif trouble == "no gap":
        monkeypatch.setattr(os, "pwrite", failing)
    elif trouble == "half a gap":
        monkeypatch.setattr(os, "pwrite", lambda descriptor, gap, offset: len(gap) - 1)
    elif trouble == "no descriptors":
        real = os.open  # which is needed to remove a directory, too

        def open_all_but_the_gap(path, *arguments, **options):
            return failing() if Path(path).name == GAP else real(path, *arguments, **options)

        monkeypatch.setattr(os, "open", open_all_but_the_gap)
    else:
        monkeypatch.setattr(type(root), "rename", failing)
    before = descriptors()
    for _ in range(3):
        with pytest.raises(OSError):
            ProcessDirectory(root, b"gap")
    assert descriptors() == before
    monkeypatch.undo()
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("written", [0, 3])
def test_a_gap_of_which_only_a_part_was_written_is_an_error(make, monkeypatch, written):
    directory = make(b"0000")
    monkeypatch.setattr(os, "pwrite", lambda descriptor, gap, offset: written)
    with pytest.raises(OSError) as caught:
        directory.write_gap(b"1111")
    assert caught.value.errno == errno.ENOSPC


def test_closing_it_costs_no_descriptor(root):
    before = descriptors()
    for _ in range(3):
        ProcessDirectory(root, b"").close()
    assert descriptors() == before


# Its lock.


def test_it_is_locked_as_long_as_it_is_open(root):
    directory = ProcessDirectory(root, b"")
    assert lives(directory.path)
    directory.close()
    assert not lives(directory.path)
    assert directories(root) == [directory.path]  # somebody else's to adopt


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_its_lock_ends_with_its_process_however_that_ends(root, end):
    child, _ = in_a_child(lambda: ProcessDirectory(root, b"").path)
    (path,) = directories(root)
    assert lives(path)
    os.kill(child, end)
    os.waitpid(child, 0)
    assert not lives(path)


def test_a_child_that_closes_it_does_not_unlock_it(make):
    directory = make()
    child, said = in_a_child(directory.close)
    assert said == "None"
    assert lives(directory.path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert lives(directory.path)


def test_a_lock_that_is_gone_or_held_is_none(tmp_path):
    assert try_lock(tmp_path / "absent") is None
    held = os.open(tmp_path / "held", os.O_CREAT | os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert try_lock(tmp_path / "held") is None
    os.close(held)


def test_a_lock_that_was_got_is_nobody_elses(tmp_path):
    (tmp_path / "free").touch()
    descriptor = try_lock(tmp_path / "free")
    assert descriptor is not None
    assert not os.get_inheritable(descriptor)
    assert try_lock(tmp_path / "free") is None
    os.close(descriptor)
    descriptor = try_lock(tmp_path / "free")
    assert descriptor is not None
    os.close(descriptor)


def test_a_lock_that_was_not_got_costs_no_descriptor(make):
    path = make().path / LOCK
    before = descriptors()
    assert [try_lock(path) for _ in range(5)] == [None] * 5
    assert descriptors() == before


# Removing it.


@pytest.mark.parametrize("acknowledged", [False, True])
def test_it_is_removed_with_what_is_the_spools(make, root, acknowledged):
    directory = make()
    if acknowledged:
        (directory.path / ACKNOWLEDGED).touch()
    directory.remove()
    assert list(root.iterdir()) == []


def test_somebody_elses_file_in_it_is_not_removed(make):
    directory = make()
    (directory.path / "mine.txt").write_text("mine")
    directory.remove()
    assert (directory.path / "mine.txt").read_text() == "mine"


def test_one_that_is_gone_is_removed_without_a_word(make):
    directory = make()
    for path in directory.path.iterdir():
        path.unlink()
    directory.path.rmdir()
    directory.remove()


def test_only_one_that_holds_nothing_but_its_lock_and_what_is_acknowledged_is_removed(make):
    path = make().path
    (path / ACKNOWLEDGED).touch()
    with pytest.raises(OSError):
        remove(path)
    assert [each.name for each in path.iterdir()] == [GAP]
    (path / GAP).unlink()
    remove(path)
    assert not path.exists()


# What others have left.


def test_directories_are_those_that_have_a_lock_and_are_not_hidden(root, leave):
    leave("17-dead", [LOCK])
    leave(".18-unfinished", [LOCK])
    leave("notes", ["mine.txt"])
    (root / "damaged-17-dead-000001").touch()
    (root / "19-odd" / LOCK).mkdir(parents=True)
    assert [path.name for path in directories(root)] == ["17-dead"]
    assert directories(root / "absent") == []


@pytest.mark.parametrize("files", [[], [LOCK], [LOCK, GAP], [GAP]])
def test_what_was_left_unfinished_for_more_than_a_minute_is_cleared_away(root, leave, files):
    leave(".17-dead", files)
    leave(".18-dead", files)
    before = descriptors()
    clear_unfinished(root)
    assert list(root.iterdir()) == []
    assert descriptors() == before


@pytest.mark.parametrize("age", [0.0, 50.0, -1_000.0])
def test_what_is_younger_may_be_finished_yet(root, leave, age):
    path = leave(".17-young", [LOCK, GAP], age)
    clear_unfinished(root)
    assert sorted(each.name for each in path.iterdir()) == [GAP, LOCK]


def test_what_is_locked_is_left_to_its_process_however_old_it_is(root, leave):
    path = leave(".17-slow", [LOCK, GAP])
    held = os.open(path / LOCK, os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    clear_unfinished(root)
    assert sorted(each.name for each in path.iterdir()) == [GAP, LOCK]
    os.close(held)
    clear_unfinished(root)
    assert list(root.iterdir()) == []


def test_what_is_nothing_unfinished_is_left(root, leave, make):
    directory = make()
    os.utime(directory.path, (0, 0))
    left = [leave("17-dead", [LOCK, GAP]), leave(".hidden", [LOCK])]
    (root / ".a-file").touch()
    os.utime(root / ".a-file", (0, 0))
    clear_unfinished(root)
    assert {directory.path, *left, root / ".a-file"} == set(root.iterdir())
    assert [(path / LOCK).exists() for path in left] == [True, True]


def test_somebody_elses_file_in_what_is_unfinished_is_left_and_keeps_nothing_else(root, leave):
    path = leave(".17-odd", [LOCK, GAP, "mine.txt"])
    leave(".18-dead", [LOCK])
    before = descriptors()
    clear_unfinished(root)
    assert descriptors() == before
    assert (list(root.iterdir()), (path / "mine.txt").exists()) == ([path], True)


def test_where_there_is_no_spool_there_is_nothing_to_clear_away(root):
    clear_unfinished(root)
    assert not root.exists()


def test_what_a_process_left_that_died_while_it_made_its_directory_is_cleared_away(root, monkeypatch):
    def make_and_die():
        monkeypatch.setattr(os, "pwrite", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
        ProcessDirectory(root, b"")

    child, _ = in_a_child(make_and_die)
    os.waitpid(child, 0)
    (path,) = root.iterdir()
    assert (path.name[0], directories(root)) == (".", [])
    os.utime(path, (0, 0))
    clear_unfinished(root)
    assert list(root.iterdir()) == []


# Where it belongs.


@pytest.mark.parametrize(("files", "destination"), [
    ({}, None),
    ({"000001.segment": HEADER_LINE + RECORD_LINE}, "there"),
    ({"000001.segment": b""}, None),
    ({"000001.segment": HEADER_LINE[:-1]}, None),
    ({"000001.segment": RECORD_LINE}, None),
    ({"000001.segment": b"\xff\x00\n" + HEADER_LINE}, None),
    ({"000001.segment": frame(b"H", b'{"format":2,"destination":"x","fields":[]}'), "2.segment": HEADER_LINE}, "there"),
    ({"000001.segment": b"?" + HEADER_LINE[1:], "000002.segment": HEADER_LINE}, "there"),
    ({"000001.segment": header_frame("here"), GAP: HEADER_LINE}, "here"),
    ({"000001.segment": b"?" + HEADER_LINE[1:], GAP: HEADER_LINE}, "there"),
    ({"notes.txt": HEADER_LINE}, None),
])  # fmt: skip
def test_the_first_header_that_can_be_read_says_where_it_belongs(root, leave, files, destination):
    path = leave("17-dead", [LOCK])
    for name, content in files.items():
        (path / name).write_bytes(content)
    assert destination_of(path) == destination


def test_a_gap_alone_says_where_it_belongs(make):
    assert destination_of(make(HEADER_LINE + RECORD_LINE).path) == "there"
    assert destination_of(make(HEADER_LINE).path) == "there"


def test_a_segment_that_cant_be_opened_does_not_say_where_it_belongs(leave):
    path = leave("17-dead", [LOCK])
    (path / "000001.segment").mkdir()
    (path / "000002.segment").symlink_to(path / "absent")
    assert destination_of(path) is None
    (path / "000003.segment").write_bytes(HEADER_LINE)
    assert destination_of(path) == "there"
    assert destination_of(path / "absent") is None


# Whether the spool can be used at all.


def test_checking_makes_the_spools_directory_and_no_other(root):
    check(root)
    check(root)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(("trouble", "said"), [
    ("a file is in the way", "its directory can't be made: File exists"),
    ("a file is above it", "its directory can't be made: Not a directory"),
    ("not writable", "its directory can't be written to"),
    ("no locks", "this system has no file locks that end with their process"),
])  # fmt: skip
def test_a_directory_that_cant_be_used_is_known_early(root, monkeypatch, trouble, said):
    if trouble == "a file is in the way":
        root.parent.mkdir()
        root.touch()
    elif trouble == "a file is above it":
        root.parent.touch()
    elif trouble == "not writable":
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # these tests may be root's, who may all
    else:
        monkeypatch.setattr("astrocyte_otel_audit.pipeline.directory.fcntl", None)
    with pytest.raises(SpoolError) as caught:
        check(root)
    assert str(caught.value) == said


# What the others build on.


def test_a_file_is_made_once_and_appended_to(tmp_path):
    descriptor = create(tmp_path / "new")
    with pytest.raises(FileExistsError):
        create(tmp_path / "new")
    assert not os.get_inheritable(descriptor)
    os.write(descriptor, b"one")
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, b"two")
    os.close(descriptor)
    assert (tmp_path / "new").read_bytes() == b"onetwo"


@pytest.mark.parametrize(("error", "said"), [
    (OSError(errno.ENOSPC, "secret", "/secret/path"), "it is bad: No space left on device"),
    (PermissionError(errno.EACCES, "secret"), "it is bad: Permission denied"),
    (OSError("secret"), "it is bad: Input/output error"),
    (OSError(), "it is bad: Input/output error"),
])  # fmt: skip
def test_what_the_system_says_is_put_in_words_that_name_no_path(error, said):
    with pytest.raises(SpoolError) as caught, in_words("it is bad"):
        raise error
    assert str(caught.value) == said
    assert (caught.value.__cause__, caught.value.__suppress_context__) == (None, True)


def test_what_is_not_the_systems_is_left_as_it_is():
    with pytest.raises(KeyError), in_words("it is bad"):
        raise KeyError
