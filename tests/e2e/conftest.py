"""Commands, run in the test's own process."""

import sys

import pytest

from astrocyte_otel_audit import cli


@pytest.fixture
def command(database, capsys, monkeypatch):
    """Run a command in this process on the test's database; gives exit code, output and remarks."""

    def run(*arguments, dsn=database):
        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_DSN", dsn)
        monkeypatch.setattr(sys, "argv", ["astrocyte-otel-audit", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run()
        output = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), output.out, output.err

    return run
