"""What every test run needs."""

from __future__ import annotations

import signal
import sys


def pytest_configure() -> None:
    # A run that is told to stop must stop the servers it started; only an orderly exit does that.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
