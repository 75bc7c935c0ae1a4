"""Interpreters, and virtual environments that are kept between runs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

from tests.matrix.cells import Cell

ROOT = Path(__file__).resolve().parents[2]

#: What the tests need of the extra `dev`, beside the extra `demo`. The rest checks code, or is made for one SDK alone.
_NEEDED = {
    "hypothesis", "opentelemetry-distro", "opentelemetry-instrumentation-psycopg", "psutil", "pytest", "pytest-asyncio",
}  # fmt: skip


class MissingError(Exception):
    """This machine lacks something that a cell needs; the message says what, and what to do."""


def environment(cell: Cell, cache: Path) -> Path:
    """Make a cell's virtual environment, unless one with the same contents is there.

    Args:
        cell: whose.
        cache: where environments are kept.

    Returns:
        Its interpreter.

    Raises:
        MissingError: there is no such interpreter, or pip can't install what the cell names.
    """
    base, version = _interpreter(cell.python)
    # The package itself is installed editable, so its code is no part of the key; what it depends on is.
    project = (ROOT / "pyproject.toml").read_text()
    contents = "\n".join([version, *cell.requirements, project])
    directory = cache / "environments" / hashlib.sha256(contents.encode()).hexdigest()[:16]
    python = directory / "bin" / "python"
    complete = directory / "complete"
    if complete.exists():
        return python
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([base, "-m", "venv", directory], check=True)
    dev = tomllib.loads(project)["project"]["optional-dependencies"]["dev"]
    needed = [requirement for requirement in dev if re.match(r"[\w-]+", requirement)[0] in _NEEDED]
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", f"{ROOT}[demo]"]
    installed = subprocess.run([*command, *needed, *cell.requirements], capture_output=True, text=True)
    if installed.returncode:
        errors = [line for line in installed.stderr.splitlines() if line.startswith("ERROR")]
        raise MissingError("\n".join([f"pip can't install {', '.join(cell.requirements)}", *errors]))
    complete.touch()
    return python


def versions(python: Path) -> str:
    """Say which versions an environment has in fact: what is named `1.45.*` is one of them."""
    program = (
        "import platform; from importlib.metadata import version as v;"
        "print('CPython', platform.python_version(), *(f'· {n} {v(n)}' for n in ('opentelemetry-sdk', 'psycopg')))"
    )
    return subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def _interpreter(minor: str) -> tuple[str, str]:
    """Return the command of an interpreter, and its full version."""
    variable = f"MATRIX_PYTHON_{minor.replace('.', '_')}"
    found = shutil.which(os.environ.get(variable) or f"python{minor}")
    if found is not None:
        # Asked, not believed: what is found by name may be a shim that leads nowhere.
        asked = subprocess.run([found, "-c", "import sys; print(sys.version)"], capture_output=True, text=True)
        if asked.returncode == 0 and asked.stdout.startswith(f"{minor}."):
            return found, asked.stdout
    raise MissingError(f"no python{minor} on PATH, or named by {variable}, that runs")
