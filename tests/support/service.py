"""What services that tests start, each with a process of its own, have in common."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import NoReturn

import pytest


def is_missing(program: str, package: str = "it") -> NoReturn:
    """Skips a test whose program is not installed, but not on CI."""
    why = f"{program} is missing: scripts/setup.sh installs {package}"
    assert not os.environ.get("CI"), why
    pytest.skip(why)


def send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Sends a signal. After SIGSTOP nothing of the process runs any more: each of its threads stops when it
    gets a processor to do so."""
    process.send_signal(number)
    if number == signal.SIGSTOP:
        threads = Path(f"/proc/{process.pid}/task")
        while any(
            stat.read_text().rpartition(")")[2].split()[0] not in "Tt" for stat in threads.glob("*/stat")
        ):
            time.sleep(0.001)


class Service:
    """What can be done to a process that runs."""

    _process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        send(self._process, number)

    def stop(self) -> None:
        """As a machine stops that loses its power."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
