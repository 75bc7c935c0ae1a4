"""Runs every benchmark and prints one table: ratios against a peer measured in the same run."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from astrocyte_otel_audit.embedded import embedded_postgres
from benchmarks import append, call, end_to_end


def main() -> None:
    logging.disable(logging.WARNING)
    directory = Path(tempfile.mkdtemp(prefix="audit-bench-"))
    table = Table(title=f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}")
    for column in ("what", "ours", "peer", "ratio", "aim"):
        table.add_column(column, justify="left" if column == "what" else "right")
    try:
        for row in call.measure():
            table.add_row(*row)
        with embedded_postgres(directory) as dsn:
            for row in (*append.measure(dsn), *end_to_end.measure(dsn)):
                table.add_row(*row)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
