"""What every test run needs."""

from __future__ import annotations

import os
import signal
import sys


def pytest_configure() -> None:
    # A run that is told to stop must stop the servers it started; only an orderly exit does that.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def pytest_xdist_auto_num_workers() -> int:
    """Files of tests that run at a time: two, because servers wait a lot, for each other's imports and for
    their ends. On a GPU one: a server takes most of its memory."""
    on_cpu = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
    return 2 if on_cpu else 1
