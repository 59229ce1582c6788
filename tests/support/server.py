"""A real SGLang server as a subprocess, for tests, benchmarks and the demo.

    with SGLangServer("models/tiny-gqa", {"page-size": 16}) as server:
        result = server.generate("def main():", max_new_tokens=8, extra_key="tenant-a")
        print(result["text"], result["meta_info"]["cached_tokens"])

The server runs under the interpreter that runs this code, so it has the same packages. A start
takes about 20 s on two CPU cores, nearly all of it imports: share one server between tests
where the tests allow it (`flush_cache()` between them), and fork those that need not show how
a server starts (forked_server.py).

Guarantees: after `start()` returns the server answers requests; after `stop()` returns, or when
this interpreter exits, no process of it is left. If it cannot start, `ServerStartError` carries the end
of its log.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

Prompt = str | Sequence[int]
FlagValue = str | int | float | bool | None | Sequence[str | int]

START_TIMEOUT_S = 300.0
# A graceful stop takes 1.5 to 10 s: SGLang looks for the signal every 5 s, then stops its schedulers.
STOP_GRACE_S = 30.0
REQUEST_TIMEOUT_S = 300.0
LOG_TAIL_LINES = 60
POLL_INTERVAL_S = 0.1

# The development environment sets this variable where there is no GPU.
ON_CPU = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
# What models compute in, and KV is stored in. On a CPU float32, in which answers can be compared token by
# token; the attention kernels of a GPU refuse it. SERVER_DTYPE=bfloat16 tries out on a CPU what a GPU does.
DTYPE = os.environ.get("SERVER_DTYPE") or ("float32" if ON_CPU else "bfloat16")
KV_ITEM_BYTES = 4 if DTYPE == "float32" else 2

# What a short, repeatable start needs. Each can be overridden, or dropped with None.
DEFAULT_FLAGS: dict[str, FlagValue] = {
    # Left alone, a server takes most of the memory for its KV pool.
    "max-total-tokens": 16384,
    "dtype": DTYPE,
    # The warm-up sends a request, whose tokens stay in the cache the tests look at.
    "skip-server-warmup": True,
    "enable-metrics": True,
    "random-seed": 1,
}
# For a machine that lacks what SGLang would choose, as JSON; scripts/gpu/run.sh says what it lacks there.
DEFAULT_FLAGS |= json.loads(os.environ.get("SERVER_FLAGS", "{}"))
DEFAULT_ENVIRONMENT = {
    # Without it every health check generates a token and leaves it in the cache.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
}


class ServerError(RuntimeError):
    """The server answered a request with an error status."""

    def __init__(self, path: str, status: int, body: str) -> None:
        super().__init__(f"{path}: HTTP {status}: {body[:2000]}")
        self.status = status
        self.body = body


class ServerStartError(RuntimeError):
    """The server exited, or was not ready in time. The message ends with the tail of its log."""


class MetricSample(NamedTuple):
    """One sample of `/metrics`: Prometheus name, labels, value."""

    name: str
    labels: dict[str, str]
    value: float


_taken: list[socket.socket] = []


def free_port() -> int:
    """A loopback port that nobody else is given until this interpreter ends.

    A server binds it seconds later, or again after it was killed. Until then the system would give it to any
    connection and to whoever else looks for a port, so it stays bound here. A server can bind it all the
    same, as nobody listens here and both say SO_REUSEADDR.
    """
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.bind(("127.0.0.1", 0))
    _taken.append(taken)
    return int(taken.getsockname()[1])


def flag_arguments(flags: Mapping[str, FlagValue]) -> list[str]:
    """Command line arguments: True is a bare flag, False and None leave it out."""
    arguments: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        arguments.append("--" + name.replace("_", "-"))
        if value is True:
            continue
        if isinstance(value, (str, int, float)):
            arguments.append(str(value))
        else:
            arguments.extend(str(item) for item in value)
    return arguments


def _has_ended(process: psutil.Process) -> bool:
    """Whether it does nothing any more. It may still be listed: when whoever adopts orphans looks at what has
    become of them is not ours to know, and takes a second on some machines."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_until_ended(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Waits for processes that need not be children of this one. Returns those that have not ended."""
    deadline_s = time.monotonic() + timeout_s
    while left := [process for process in processes if not _has_ended(process)]:
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.02)
    return left


def _shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """The files in /dev/shm that processes have mapped, by names that still are theirs."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                name = line.partition("/dev/shm/")[2]
                if name and not name.endswith(" (deleted)"):
                    found.add(Path("/dev/shm", name))
    return found


class SGLangServer:
    """One `sglang.launch_server` process tree. Use as a context manager, or `start()`/`stop()`.

    Requests may be sent from several threads at once.

    Args:
        model: model directory (or anything `--model-path` takes).
        flags: launch flags by name without dashes, e.g. `{"page-size": 16, "disable-radix-cache":
            True}`; they override `DEFAULT_FLAGS`, and None or False drops one.
        env: environment variables on top of this process's. None as a value unsets one.
        log_path: where stdout and stderr go (appended); default: a new file in the temporary
            directory, kept for reading afterwards.
        start_timeout_s: how long `start()` waits for the server to become ready.
        stop_grace_s: how long `stop()` waits for an orderly shutdown, which takes 1.5 to 10 s; with
            0 it kills the server at once, for tests that do not look at the shutdown.
        python: the interpreter that runs it; default: this one.
    """

    def __init__(
        self,
        model: str | Path,
        flags: Mapping[str, FlagValue] | None = None,
        *,
        env: Mapping[str, str | None] | None = None,
        log_path: str | Path | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        stop_grace_s: float = STOP_GRACE_S,
        python: str | Path = sys.executable,
    ) -> None:
        self.model = Path(model)
        self.python = str(python)
        self.port = free_port()
        self.start_timeout_s = start_timeout_s
        self.stop_grace_s = stop_grace_s
        self.start_duration_s: float | None = None
        self.flags: dict[str, FlagValue] = {
            "model-path": str(model),
            "host": "127.0.0.1",
            "port": self.port,
            **DEFAULT_FLAGS,
            "device": "cpu" if ON_CPU else None,
            **{name.replace("_", "-"): value for name, value in (flags or {}).items()},
        }
        if self.flags.get("enable-dp-attention"):
            # It takes a dozen ports of its own, from one that is told, or near that of the server, where any
            # connection may have them. Below 32,768 the system gives none away.
            self.flags.setdefault("dist-init-addr", f"127.0.0.1:{16_000 + self.port % 1_000 * 16}")
        self._environment = {**os.environ, **DEFAULT_ENVIRONMENT}
        if (num_ranks := int(str(self.flags.get("tp-size") or 1))) > 1:  # on a CPU each is told its core
            self._environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(num_ranks)))
        for name, value in (env or {}).items():
            if value is None:
                self._environment.pop(name, None)
            else:
                self._environment[name] = value
        if log_path is None:
            descriptor, temporary = tempfile.mkstemp(prefix="sglang-server-", suffix=".log")
            os.close(descriptor)
            log_path = temporary
        self.log_path = Path(log_path)
        self._process: subprocess.Popen[bytes] | None = None
        self._client: httpx.Client | None = None

    @property
    def url(self) -> str:
        """Base URL, without a trailing slash."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def command(self) -> list[str]:
        """The command line `start()` runs."""
        return [self.python, "-m", "sglang.launch_server", *flag_arguments(self.flags)]

    @property
    def pid(self) -> int | None:
        """Process id of the launcher, None while not running."""
        return self._process.pid if self._process else None

    # -- life cycle ---------------------------------------------------------------------------

    def start(self) -> SGLangServer:
        """Launch and wait until ready. On failure nothing is left running.

        Raises:
            ServerStartError: it exited or was not ready within `start_timeout_s`.
        """
        if self._process is not None:
            raise RuntimeError("the server is already running")
        begin_s = time.monotonic()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = self._launch(log)
        atexit.register(self.stop)
        # One request per connection at a time, and `generate_many` may open many. The server closes those
        # that are idle for 5 s. The next request must not meet that.
        self._client = httpx.Client(
            base_url=self.url,
            timeout=REQUEST_TIMEOUT_S,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=2.0),
            trust_env=False,
        )
        try:
            self._wait_until_ready(begin_s + self.start_timeout_s)
        except BaseException:
            self.stop()
            raise
        self.start_duration_s = time.monotonic() - begin_s
        return self

    def _launch(self, log: BinaryIO) -> subprocess.Popen[bytes]:
        """Starts the launcher, in a session of its own: `stop()` can signal the whole tree at once, and
        Ctrl-C in a terminal reaches only us, who then stop the server in order."""
        return subprocess.Popen(
            self.command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _wait_until_ready(self, deadline_s: float) -> None:
        assert self._process is not None
        assert self._client is not None
        while True:
            if self._process.poll() is not None:
                raise ServerStartError(
                    f"the server exited with status {self._process.returncode} while starting: "
                    f"{' '.join(self.command)}\n{self.log_tail()}"
                )
            with contextlib.suppress(httpx.TransportError):
                if self._client.get("/health", timeout=5.0).status_code == 200:
                    return
            if time.monotonic() > deadline_s:
                raise ServerStartError(
                    f"the server was not ready after {self.start_timeout_s:.0f} s: "
                    f"{' '.join(self.command)}\n{self.log_tail()}"
                )
            time.sleep(POLL_INTERVAL_S)

    def stop(self, grace_s: float | None = None) -> None:
        """Terminate the process tree: SIGTERM, and SIGKILL to what is left after the grace period.

        SIGTERM goes to the launcher alone, which shuts its children down in order; that is the
        path on which caches are closed. With a grace period of 0 there is only SIGKILL, as in
        a crash. Stopping a server that is not running does nothing.

        Args:
            grace_s: seconds; default: `stop_grace_s` of this server.
        """
        process, self._process = self._process, None
        if self._client is not None:
            self._client.close()
            self._client = None
        if process is None:
            return
        atexit.unregister(self.stop)
        grace_s = self.stop_grace_s if grace_s is None else grace_s
        tree = self._tree(process.pid)
        left_behind = _shared_memory(tree)  # by those that are killed, and some by SGLang always
        if grace_s > 0 and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
            # Its children may outlive it for a moment.
            wait_until_ended(tree, 1.0)
        # A process started since `tree` was taken is in the session; one that left the session
        # is in `tree`. Both kills are harmless for what has already ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()
        wait_until_ended(tree, 5.0)
        for path in left_behind:
            path.unlink(missing_ok=True)

    def signal_group(self, signum: int) -> list[str]:
        """Send a signal to all processes at once, as a terminal or a supervisor does, and wait until they
        have ended. `stop()` has to be called all the same.

        Returns:
            The names of those that have not ended after the grace period of a stop.
        """
        if self._process is None:
            raise RuntimeError("the server is not running")
        tree = self._tree(self._process.pid)
        os.killpg(self._process.pid, signum)
        return [process.name() for process in wait_until_ended(tree, STOP_GRACE_S)]

    @staticmethod
    def _tree(pid: int) -> list[psutil.Process]:
        try:
            root = psutil.Process(pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def __enter__(self) -> SGLangServer:
        return self.start()

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # -- log ----------------------------------------------------------------------------------

    def log(self) -> str:
        """Everything the server has written so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The last lines of the log, under a heading that names the file."""
        tail = self.log().splitlines()[-lines:]
        return "\n".join([f"--- last lines of {self.log_path} ---", *tail])

    # -- requests -----------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, str | int | float] | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> httpx.Response:
        """Send any request to the server.

        Raises:
            ServerError: the status was 400 or above.
            httpx.TransportError: no answer (the server died, or `timeout_s` passed).
        """
        if self._client is None:
            raise RuntimeError("the server is not running")
        response = self._client.request(method, path, json=json, params=params, timeout=timeout_s)
        if response.status_code >= 400:
            raise ServerError(path, response.status_code, response.text)
        return response

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 16,
        *,
        sampling_params: Mapping[str, Any] | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
        **fields: Any,
    ) -> dict[str, Any]:
        """Complete one prompt, greedily unless `sampling_params` says otherwise.

        Args:
            prompt: text, or token ids.
            max_new_tokens: upper limit of generated tokens.
            sampling_params: merged over `temperature` 0 and `max_new_tokens`.
            timeout_s: for the whole answer.
            fields: further top-level fields of `/generate`, e.g. `extra_key`, `cache_salt`,
                `rid`, `return_logprob`.

        Returns:
            SGLang's answer: `text`, `output_ids`, and `meta_info` (`id`, `prompt_tokens`,
            `cached_tokens`, `cached_tokens_details`, `finish_reason`, `e2e_latency`, …).

        Raises:
            ServerError: SGLang refused or aborted the request.
        """
        body: dict[str, Any] = {
            "sampling_params": {
                "temperature": 0.0,
                "max_new_tokens": max_new_tokens,
                **(sampling_params or {}),
            },
            **fields,
        }
        if isinstance(prompt, str):
            body["text"] = prompt
        else:
            body["input_ids"] = list(prompt)
        answer = self.request("POST", "/generate", json=body, timeout_s=timeout_s).json()
        assert isinstance(answer, dict)
        return answer

    def generate_many(
        self,
        prompts: Iterable[Prompt | Mapping[str, Any]],
        max_new_tokens: int = 16,
        *,
        concurrency: int = 4,
        **fields: Any,
    ) -> list[dict[str, Any]]:
        """Complete several prompts, `concurrency` at a time, each in a request of its own.

        A prompt may be a mapping of `generate` arguments (with `prompt`), for fields that differ
        from one to the next. Results are in the order of the prompts. The first error is raised,
        after all requests have ended.
        """
        calls: list[dict[str, Any]] = [
            {
                "max_new_tokens": max_new_tokens,
                **fields,
                **(prompt if isinstance(prompt, Mapping) else {"prompt": prompt}),
            }
            for prompt in prompts
        ]
        with ThreadPoolExecutor(max_workers=concurrency) as pool:
            futures = [pool.submit(self.generate, **call) for call in calls]
        return [future.result() for future in futures]

    def abort(self, rid: str = "", *, abort_all: bool = False) -> None:
        """Abort the request with this `rid` (or every request). Unknown ids are ignored.

        The aborted `generate` call still returns, with `finish_reason` of type "abort", or raises
        `ServerError` if it had not started.
        """
        self.request("POST", "/abort_request", json={"rid": rid, "abort_all": abort_all})

    def flush_cache(self, timeout_s: float = 10.0) -> None:
        """Empty the radix cache, waiting up to `timeout_s` for running requests to end.

        Raises:
            ServerError: requests were still running.
        """
        self.request("POST", "/flush_cache", params={"timeout": timeout_s}, timeout_s=timeout_s + 30.0)

    def metrics(self) -> list[MetricSample]:
        """All Prometheus samples (needs the flag `enable-metrics`, on by default)."""
        text = self.request("GET", "/metrics").text
        return [
            MetricSample(sample.name, dict(sample.labels), sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of this name that have these labels; 0 if there are none."""
        return sum(
            sample.value
            for sample in self.metrics()
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def server_info(self) -> dict[str, Any]:
        """Resolved launch arguments and live scheduler state (`internal_states`)."""
        info = self.request("GET", "/server_info").json()
        assert isinstance(info, dict)
        return info
