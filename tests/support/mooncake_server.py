"""A Mooncake Store of a test's own: a master, and a process that holds its memory, on loopback."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from server import free_port
from service import is_missing, send

_STARTS_WITHIN_S = 40.0


class MooncakeServer:
    """Started when it is made. Where there is no mooncake_master the test is skipped, but not on CI.

    Args:
        size: of the memory, as Mooncake writes it.
        missed_after_s: without a word of it an owner is taken for dead, with all that it holds. One that is
            well may be silent for more than a second where the cores are busy.
    """

    processes = ("master", "owner")

    def __init__(self, directory: Path, size: str = "256 MB", missed_after_s: int = 30) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        programs = [shutil.which(name, path=path) for name in ("mooncake_master", "mooncake_client")]
        if None in programs:
            is_missing("mooncake_master")
        self._master, self._client = map(str, programs)
        self._directory, self._size, self._missed_after_s = directory, size, missed_after_s
        self.port, self._metrics_port = free_port(), free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"mooncake://{self.address}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self._metrics_port}"

    def start(self) -> None:
        """What runs already goes on."""
        if "master" not in self._processes:
            self._run(
                "master",
                [
                    *(self._master, "--rpc_address=127.0.0.1", f"--rpc_port={self.port}"),
                    *("--metrics_host=127.0.0.1", f"--metrics_port={self._metrics_port}"),
                    # What has just been looked up may not be evicted for so long, in ms, and must have been
                    # brought by then: tests have little room, and run on slow machines.
                    "--default_kv_lease_ttl=1000",
                    f"--client_ttl={self._missed_after_s}",
                ],
            )
        if "owner" not in self._processes:
            self._wait_until(lambda: self._capacity() == 0)  # the one before is not counted on any more
            self._run(
                "owner",
                [
                    *(
                        self._client,
                        "-host=127.0.0.1",
                        f"-port={free_port()}",
                        "-metadata_server=P2PHANDSHAKE",
                    ),
                    *(f"-master_server_address=127.0.0.1:{self.port}", f"-global_segment_size={self._size}"),
                ],
            )
        self._wait_until(lambda: self._capacity() > 0)

    def _run(self, name: str, arguments: list[str]) -> None:
        log = (self._directory / f"{name}.log").open("ab")
        environment = {
            **os.environ,
            "MC_TCP_BIND_ADDRESS": "127.0.0.1",
            "MC_STORE_CLIENT_SETUP_RETRIES": "100",
        }
        self._processes[name] = subprocess.Popen(
            arguments, stdout=log, stderr=log, cwd=self._directory, env=environment
        )
        log.close()

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while not condition():
            for name, process in self._processes.items():
                log = self._directory / f"{name}.log"
                assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < deadline, "Mooncake Store does not start"
            time.sleep(0.02)

    def _capacity(self) -> int:
        """Bytes that the master counts on; negative if it does not say."""
        try:
            with urllib.request.urlopen(f"{self.metrics_url}/metrics", timeout=5) as answer:
                found = re.search(r"^master_total_capacity_bytes (\d+)", answer.read().decode(), re.MULTILINE)
        except OSError:
            return -1
        return int(found[1]) if found else -1

    def send(self, number: signal.Signals, name: str = "master") -> None:
        send(self._processes[name], number)

    def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        for name in list(self._processes):
            self.kill(name)
