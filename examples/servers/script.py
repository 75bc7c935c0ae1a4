"""A script that works until SIGTERM, which it turns into an ordinary end, so that exit handlers run.

Run it with OTEL_ASTROCYTE_AUDIT_DSN set.
"""

import signal
import sys
import time
from types import FrameType

from astrocyte_otel_audit import audit_operation, configure_audit


def end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    configure_audit(actions=["consolidate"])
    while True:
        with audit_operation("consolidate", bank_id="user-calvin") as operation:
            operation.response = {"merged": 3}
        print("consolidated", flush=True)
        time.sleep(0.1)
