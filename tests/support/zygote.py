"""A process that has imported SGLang, and of which servers of tests are forks.

    python zygote.py SOCKET

SOCKET is the descriptor of a socket that listens. forked_server.py says what this is for, and connects to it.
The process ends with the last connection. Nothing may be imported here that a server imports late:
prometheus_client, for one, looks at its import whether it is used by several processes.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
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
    "sglang.srt.managers.data_parallel_controller",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "sglang_flexkv.integration.radix_cache",
)
# How long a process without work waits for some before it looks after what else it has to do.
_IDLE_MS = 20
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


def _look_around_when_idle() -> None:
    """With ``--sleep-on-idle`` SGLang's scheduler sleeps for a second if no message wakes it."""
    from sglang.srt.managers.scheduler import IdleSleeper

    def sleep(sleeper: IdleSleeper) -> None:
        sleeper.poller.poll(_IDLE_MS)

    IdleSleeper.maybe_sleep = sleep  # type: ignore[method-assign]


def _pass_on_without_spinning() -> None:
    """Where requests are shared out among ranks, SGLang has a process for that which asks for some all the
    time."""
    from sglang.srt.managers.data_parallel_controller import DataParallelController, sock_recv

    def pass_on(controller: DataParallelController) -> None:
        while True:
            controller.soft_watchdog.feed()
            if controller.recv_from_tokenizer.poll(_IDLE_MS):
                controller._request_dispatcher(sock_recv(controller.recv_from_tokenizer))

    DataParallelController.event_loop = pass_on  # type: ignore[method-assign]


def _run(kind: str, what: str, arguments: Sequence[str]) -> None:
    """What ``python`` does with a script, the text of a program, or the module of SGLang's launcher."""
    sys.argv = ["-c" if kind == "text" else what, *arguments]
    if kind == "script":
        sys.path[0] = os.path.dirname(what)
        runpy.run_path(what, run_name="__main__")
    elif kind == "text":
        sys.path[0] = ""
        exec(compile(what, "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        _notice_sigterm_soon()
        _look_around_when_idle()
        _pass_on_without_spinning()
        runpy.run_module(what, run_name="__main__", alter_sys=True)


def _become_main(request: Mapping[str, Any], streams: Sequence[int]) -> None:
    """What a fork of the zygote does. Ends the process, with the status that an interpreter would have."""
    status = 1
    try:
        os.setsid()
        os.chdir(request["directory"])
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(request["environment"])
        _start_like_new()
        _fork_instead_of_spawn()
        _run(request["kind"], request["what"], request["arguments"])
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


class _Connection:
    """A process that wants forks. None of them is left when it has gone."""

    def __init__(self, requests: socket.socket) -> None:
        self.requests = requests
        self._running: set[int] = set()
        send(requests, {"num_threads": _num_threads()})

    def serve(self, others: Sequence[socket.socket]) -> bool:
        """Answers a request. Returns whether there may be more of them."""
        request, streams = receive(self.requests)
        if request is None:
            for pid in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)  # which may not have a group of its own yet
                os.waitpid(pid, 0)
            self.requests.close()
            return False
        if "status_of" in request:
            pid, wait_status = os.waitpid(request["status_of"], os.WNOHANG)
            self._running.discard(pid)
            send(self.requests, {"status": os.waitstatus_to_exitcode(wait_status) if pid else None})
            return True
        pid = os.fork()
        if pid == 0:
            for each in others:
                each.close()
            _become_main(request, streams)
        for stream in streams:
            os.close(stream)
        self._running.add(pid)
        send(self.requests, {"pid": pid})
        return True


def serve(listener: socket.socket) -> None:
    """Forks itself and says how the forks ended, until nobody asks any more; then none is left."""
    connections: dict[socket.socket, _Connection] = {}
    begun = False
    while connections or not begun:
        ready, _, _ = select.select([listener, *connections], [], [])
        for each in ready:
            if each is listener:
                requests, _ = listener.accept()
                connections[requests] = _Connection(requests)
                begun = True
            elif not connections[each].serve([listener, *connections]):
                del connections[each]
    os._exit(0)  # to take down an interpreter with all of SGLang takes a second


def main() -> None:
    for module in _IMPORTS:
        importlib.import_module(module)
    # Where titles go is found out at the first call, from an environment that launchers change. SGLang waits
    # for its schedulers at the end only if it finds them by their titles.
    setproctitle.getproctitle()
    # What is there now stays: no fork looks through a million objects for garbage, and copies their pages.
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
