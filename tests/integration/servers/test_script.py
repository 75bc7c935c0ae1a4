"""A script that turns SIGTERM into an ordinary end."""

import signal

import pytest


@pytest.mark.usefixtures("without_spool")
def test_a_script_writes_what_waits_at_sigterm(start, banks):
    script = start("examples/servers/script.py")
    script.wait_until_said("consolidated", 3)
    assert banks() == []
    script.end(signal.SIGTERM)
    # The signal may have come before the last one could say that it had returned.
    assert len(banks()) - script.said.count("consolidated") in (0, 1)
