"""A process that has imported SGLang, and of which servers of tests are forks.

    python zygote.py DESCRIPTOR

forked_server.py says what this is for; it is at the other end of the socket with that descriptor. Nothing may
be imported here that a server imports late: prometheus_client, for one, looks at its import whether it is
used by several processes.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import context, popen_fork
from multiprocessing.process import BaseProcess
from typing import Any

import setproctitle

_MESSAGE_BYTES_MAX = 1 << 17  # an environment


def send(to: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    socket.send_fds(to, [json.dumps(message).encode()], descriptors)


def receive(source: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """None: the other side has gone."""
    text, descriptors, _, _ = socket.recv_fds(source, _MESSAGE_BYTES_MAX, 3)
    return json.loads(text) if text else None, descriptors


# What the processes of a server import before they do anything.
_IMPORTS = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "sglang_flexkv.integration.radix_cache",
)
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _start_like_new() -> None:
    """Undoes what a process inherits by a fork and would not by a start."""
    for signum in _SIGNALS:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)


class _ForkOfLauncher(popen_fork.Popen):
    """What SGLang starts as a new process: a fork of the launcher."""

    def __init__(self, process: BaseProcess) -> None:
        run = process.run

        def run_like_new() -> None:
            _start_like_new()
            run()

        process.run = run_like_new  # type: ignore[method-assign]
        super().__init__(process)
        del process.run  # type: ignore[method-assign]


def _fork_instead_of_spawn() -> None:
    spawn = context.SpawnProcess._Popen

    def start(process: BaseProcess) -> Any:
        # Other threads may hold locks, which nobody would release in the child.
        return _ForkOfLauncher(process) if _num_threads() == 1 else spawn(process)

    context.SpawnProcess._Popen = staticmethod(start)  # type: ignore[method-assign]


def _notice_sigterm_soon() -> None:
    """SGLang's launcher looks every 5 s whether it was told to end."""
    from sglang.srt.managers import tokenizer_manager

    class Hurried:
        @staticmethod
        async def sleep(seconds: float) -> None:
            await asyncio.sleep(seconds if seconds < 5 else 0.1)

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

    tokenizer_manager.asyncio = Hurried()  # type: ignore[attr-defined]


def _become_main(request: Mapping[str, Any], streams: Sequence[int]) -> None:
    """What a fork of the zygote does: SGLang's launcher with these arguments, or a script. Ends the process,
    with the status that an interpreter would have."""
    environment, arguments, script = (request[name] for name in ("environment", "arguments", "script"))
    status = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(environment)
        _start_like_new()
        _fork_instead_of_spawn()
        _notice_sigterm_soon()
        sys.argv = [script or "sglang.launch_server", *arguments]
        if script:
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(requests: socket.socket) -> None:
    """Forks itself and says how the forks ended, until nobody asks any more; then none is left."""
    send(requests, {"num_threads": _num_threads()})
    running: set[int] = set()
    while True:
        request, streams = receive(requests)
        if request is None:
            break
        if "status_of" in request:
            pid, wait_status = os.waitpid(request["status_of"], os.WNOHANG)
            running.discard(pid)
            send(requests, {"status": os.waitstatus_to_exitcode(wait_status) if pid else None})
            continue
        pid = os.fork()
        if pid == 0:
            requests.close()
            _become_main(request, streams)
        for stream in streams:
            os.close(stream)
        running.add(pid)
        send(requests, {"pid": pid})
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)  # to take down an interpreter with all of SGLang takes a second


def main() -> None:
    for module in _IMPORTS:
        importlib.import_module(module)
    # Where titles go is found out at the first call, from an environment that launchers change. SGLang waits
    # for its schedulers at the end only if it finds them by their titles.
    setproctitle.getproctitle()
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
