"""LMCache as a contender: an environment of its own, and its daemon, which the server's connector talks to.

No stand-in is needed: its wheel finds out that there is no GPU. Server and daemon then share memory, and the
server's process copies with torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import serving
from common import ROOT, console

VERSION = "0.5.6"
_REQUIREMENTS = ROOT / "benchmarks" / "peers" / "requirements-lmcache.txt"
_DISK_HITS = re.compile(r"lmcache_mp_lookup_hit_l2(_tokens)?(_total)?[ {]")
_START_TIMEOUT_S = 120.0
_INSTALL_TIMEOUT_S = 900.0


@functools.cache
def interpreter() -> Path | str:
    """That of LMCache's environment, made if it is not there; or why there is none.

    The environment lies over that of the project, whose SGLang and torch it uses, and changes nothing in it.
    """
    directory = ROOT / "build" / "peers" / f"lmcache-{VERSION}"
    python = directory / "bin" / "python"
    stamp = directory / "installed"
    recipe = hashlib.sha256(_REQUIREMENTS.read_bytes() + sys.prefix.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == recipe:
        return python
    console.print(f"installing LMCache {VERSION} in {directory.relative_to(ROOT)} ...")
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    below = sysconfig.get_path("purelib")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    over = directory / "lib" / version / "site-packages" / "project.pth"
    over.write_text(f"import site; site.addsitedir({below!r})\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-input"]
    wanted: list[list[str]] = [[f"lmcache=={VERSION}"]]
    if serving.ON_CPU:
        wanted = [["--no-deps", f"lmcache=={VERSION}"], ["-r", str(_REQUIREMENTS)]]
    for arguments in wanted:
        try:
            done = subprocess.run(
                [*pip, *arguments], capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"pip install lmcache=={VERSION} had not ended after {_INSTALL_TIMEOUT_S:.0f} s"
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            return f"pip install lmcache=={VERSION} failed: {' '.join(last)}"
    stamp.write_text(recipe)
    return python


class Daemon:
    """``lmcache server`` on ports of its own.

    Args:
        directory: for its configuration.
        host_gib: of its pool in memory.
        disk: where it keeps what leaves that, if anywhere.
    """

    def __init__(
        self, python: Path, directory: Path, *, host_gib: float, chunk_tokens: int, disk: Path | None
    ) -> None:
        self._directory = directory
        self._port, self._http_port, unused = (serving.free_port() for _ in range(3))
        self._segment = f"compare_{self._port}"
        self.log_path = directory / "daemon.log"
        self.environment = {"LMCACHE_TRACK_USAGE": "false"}
        self._process: subprocess.Popen[bytes] | None = None
        options = {
            "host": "127.0.0.1",
            "port": self._port,
            "http-port": self._http_port,
            "prometheus-port": unused,  # it would claim 9090; metrics are at the port above
            "chunk-size": chunk_tokens,
            "l1-size-gb": f"{host_gib:.6f}",
            # No default of its own. When and how much it evicts is left at its defaults: in a pool of a few
            # chunks a watermark near 1 is never reached, and stores fail.
            "eviction-policy": "LRU",
            # It takes a server that stands still while others are measured for a dead one.
            "worker-reap-timeout-seconds": 0,
            "session-ttl-seconds": 3600,
        }
        self._command = [str(python), "-m", "lmcache.cli.main", "server"]
        self._command += [item for name, value in options.items() for item in (f"--{name}", str(value))]
        if serving.ON_CPU:
            # Without shared memory KV goes over a socket.
            self._command += ["--supported-transfer-mode", "engine_driven", "--no-l1-use-lazy"]
            self._command += ["--shm-name", self._segment]
        if disk:
            disk.mkdir()
            self._command += ["--l2-adapter", json.dumps({"type": "fs", "base_path": str(disk)})]

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def client_config(self) -> Path:
        """The file that tells SGLang where it is."""
        path = self._directory / "lmcache.yaml"
        path.write_text(f"mp_host: 127.0.0.1\nmp_port: {self._port}\n")
        return path

    def start(self, log_path: Path) -> None:
        """Raises: RuntimeError: it does not listen."""
        self.log_path = log_path
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self.environment, "LMCACHE_DISABLE_BANNER": "1", "NO_COLOR": "1"},
            )
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(0.1)
        end = "\n".join(log_path.read_text(errors="replace").splitlines()[-20:])
        self.stop()
        raise RuntimeError(f"LMCache's daemon does not listen:\n{end}")

    def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        for left in Path("/dev/shm").glob(f"*{self._segment}*"):
            left.unlink(missing_ok=True)

    def tokens_from_disk(self) -> int:
        """How many it has served that were on disk only, by its own counters."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._http_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return int(
            sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if _DISK_HITS.match(line))
        )
