"""A Redis server of a test's own: on loopback, on a port that was free, in a directory of the test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

_STARTS_WITHIN_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """Started when it is made. Where there is no redis-server the test is skipped, but not on CI."""

    def __init__(self, directory: Path, *options: str, port: int | None = None) -> None:
        # One program, which goes by the name it is called by: Debian has it twice.
        self._binary = shutil.which("redis-server") or shutil.which("redis-check-rdb")
        if self._binary is None:
            if os.environ.get("CI"):
                raise AssertionError("redis-server is missing: scripts/setup.sh installs it")
            pytest.skip("redis-server is missing: scripts/setup.sh installs it")
        self._directory, self._options = directory, options
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        arguments: Sequence[str] = (
            "redis-server",
            *("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._directory)),
            *("--save", "", "--appendonly", "no", "--daemonize", "no"),
            *self._options,
        )
        log = (self._directory / "redis.log").open("ab")
        self._process = subprocess.Popen(arguments, executable=self._binary, stdout=log, stderr=log)
        log.close()
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 0.2):
                    return
            except OSError:
                assert self._process.poll() is None, (self._directory / "redis.log").read_text()
                assert time.monotonic() < deadline, "redis-server does not start"
                time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        """As a machine stops that loses its power."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
