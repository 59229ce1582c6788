"""Servers that are forked from a process which has imported SGLang already.

    with ForkedServer("models/tiny-gqa", {"page-size": 16}) as server: ...

Nearly all of what a server's start costs is imports of SGLang and PyTorch: 8 to 25 s of CPU time in each of
its processes (launcher, schedulers, detokenizer), and a test run starts dozens of servers. So one process of
the run, the zygote (zygote.py), imports them once and has one thread. A launcher is a fork of it, and
schedulers and detokenizer are forks of the launcher. Everything else is what ``python -m
sglang.launch_server`` does: that module runs as ``__main__`` with those arguments, loads its plug-ins and
patches itself; the processes, their sockets, signals and parents are the same.

Other programs that want SGLang are forks of the zygote, too: ``start_python``. So are the processes of xdist
(forked_python.py). The zygote is at the other end of a socket, whose name is in the environment of all
processes of a run. The first one that wants it starts it. It ends when nobody is connected to it any more.

What this does not show, and tests with servers that start as those of users do have to:

* that each process finds our plug-in by itself. Here the launcher does, and its children inherit what it has
  patched;
* what happens in an import, and settings that are read in one: ``ForkedServer`` takes those variables only
  that are known to be read later;
* that what processes are given can be pickled;
* how long a stop takes: SGLang's launcher looks every 5 s whether it was told to end, and here more often;
* processes without work that ask for some all the time (schedulers, and what shares requests out among
  ranks): each takes a processor for as long as a server lives, which the tests beside it want. Here they wait
  20 ms for a message each time (``--sleep-on-idle`` for schedulers).

On a GPU servers start in the ordinary way: a process cannot use a device that its parent has used.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import zygote
from server import DEFAULT_ENVIRONMENT, ON_CPU, FlagValue, ServerStartError, SGLangServer, flag_arguments

# What SGLang, or a remote store's client, reads when it is used, not when it is imported. So are all of ours.
_READ_LATE = {
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "MC_TCP_BIND_ADDRESS",
    "SGLANG_CPU_OMP_THREADS_BIND",
    "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR",
    "SGLANG_MAMBA_CONV_DTYPE",
    "SGLANG_PLUGINS",
    "SGLANG_REQ_WAITING_TIMEOUT",
    "SGLANG_ROPE_CACHE_FP32",
    "SGLANG_ZMQ_SOURCE_IP",
    "TORCH_EXTENSIONS_DIR",
}


_ADDRESS = "SERVER_ZYGOTE"


def _start(address: Path, listener: socket.socket) -> subprocess.Popen[bytes]:
    with address.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, zygote.__file__, str(listener.fileno())],
            # The pool of threads that OpenBLAS starts when it is loaded would be none of ours.
            env={**os.environ, **DEFAULT_ENVIRONMENT, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )


class _Zygote:
    """A connection to it. May be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        share_zygote()
        address = Path(os.environ[_ADDRESS])
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process: subprocess.Popen[bytes] | None = None
        with address.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._socket.connect(str(address))
            except (FileNotFoundError, ConnectionRefusedError):
                address.unlink(missing_ok=True)
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                    listener.bind(str(address))
                    listener.listen(64)
                    self._process = _start(address, listener)
                self._socket.connect(str(address))
        hello, _ = zygote.receive(self._socket)
        if hello is None:
            raise ServerStartError(
                f"the zygote of the servers ended:\n{address.with_suffix('.log').read_text()}"
            )
        assert hello["num_threads"] == 1, "a process with several threads cannot be forked safely"
        atexit.register(self.close)

    def close(self) -> None:
        """Ends the servers that were started here. Returns when they have ended."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.recv(1)
        self._socket.close()

    def _ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        with self._lock:
            zygote.send(self._socket, request, descriptors)
            answer, _ = zygote.receive(self._socket)
        assert answer is not None, "the zygote of the servers has ended"
        return answer

    def fork(
        self,
        kind: str,
        what: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        streams: tuple[int, int, int],
    ) -> ForkedProcess:
        """Something to run (``zygote._run``), in a session of its own, with these as its standard streams."""
        request = {
            "kind": kind,
            "what": what,
            "arguments": list(arguments),
            "environment": dict(environment),
            "directory": os.getcwd(),
        }
        return ForkedProcess(self, self._ask(request, streams)["pid"])

    def status_of(self, pid: int) -> int | None:
        return self._ask({"status_of": pid})["status"]


class ForkedProcess:
    """A child of the zygote's, with the methods of a ``Popen`` that a server needs."""

    def __init__(self, of: _Zygote, pid: int) -> None:
        self._zygote, self.pid = of, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.status_of(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if (status := self.poll()) is None:
            process = os.pidfd_open(self.pid)  # it is kept as a zombie until it is asked for
            try:
                if not select.select([process], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("a forked server", timeout or 0.0)
            finally:
                os.close(process)
            status = self.poll()
            assert status is not None
        return status

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


_one_at_a_time = threading.Lock()


def share_zygote() -> None:
    """Has this process, and those that it starts, use one zygote."""
    if _ADDRESS not in os.environ:
        directory = tempfile.mkdtemp(prefix="zygote-")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        os.environ[_ADDRESS] = f"{directory}/socket"


@functools.cache
def _the_zygote() -> _Zygote:
    return _Zygote()


def _one_zygote() -> _Zygote:
    with _one_at_a_time:
        return _the_zygote()


class ForkedServer(SGLangServer):
    """A server whose processes are forks of the zygote's; on a GPU an ordinary one.

    Raises:
        ValueError: it is given a variable that may be read by an import.
    """

    def __init__(
        self,
        model: str | Path,
        flags: Mapping[str, FlagValue] | None = None,
        *,
        env: Mapping[str, str | None] | None = None,
        **options: Any,
    ) -> None:
        early = [name for name in env or {} if name not in _READ_LATE and not name.startswith("FLEXKV_")]
        if early:
            raise ValueError(f"with {', '.join(early)} a server has to start in the ordinary way")
        super().__init__(model, {"sleep-on-idle": True, **(flags or {})}, env=env, **options)

    def _launch(self, log: BinaryIO) -> Any:
        if not ON_CPU:
            return super()._launch(log)
        with open(os.devnull, "rb") as nothing:
            streams = (nothing.fileno(), log.fileno(), log.fileno())
            module = "sglang.launch_server"
            return _one_zygote().fork(
                "module", module, flag_arguments(self.flags), self._environment, streams
            )


def start_python(
    program: Path | str, arguments: Sequence[str], streams: tuple[int, int, int], **environment: str
) -> Any:
    """``python SCRIPT ARGUMENTS`` or ``python -c TEXT ARGUMENTS``, in a session of its own: a fork as servers
    are, and as they are not on a GPU."""
    env = {**os.environ, **environment}
    if ON_CPU:
        kind = "text" if isinstance(program, str) else "script"
        return _one_zygote().fork(kind, str(program), arguments, env, streams)
    command = [sys.executable, *(["-c"] if isinstance(program, str) else []), str(program), *arguments]
    stdin, stdout, stderr = streams
    return subprocess.Popen(
        command, env=env, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
    )
