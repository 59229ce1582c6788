"""The contenders: one SGLang server each, alike but for the cache below (or instead of) its radix tree.

Nothing here is tuned for one of them. Each has its own defaults, the same pools in tokens, and pages of 16;
what differs is in the function that has its name.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import serving
from common import GIB
from serving import PAGE_SIZE

from comparison import lmcache_peer

_SHIM = Path(__file__).resolve().parent.parent / "peers" / "hicache_cpu"
# Of servers and daemons. SGLang's own format does not say how bad a line is: `_log_configuration` does.
_ERROR = re.compile(r"^(\[[^]]*\] )?(ERROR|CRITICAL)\b|LMCache (ERROR|CRITICAL)|^Exception in thread")


class CannotRunError(Exception):
    """A contender cannot run here. The message says why, for the result."""


@dataclass(frozen=True)
class Place:
    """What a contender gets.

    Attributes:
        directory: its own, for what it keeps on disk.
        token_bytes: KV of a token.
        device_tokens, host_tokens, disk_tokens: room for KV on the device and below it.
    """

    directory: Path
    token_bytes: int
    device_tokens: int
    host_tokens: int
    disk_tokens: int

    def gib(self, tokens: int) -> float:
        return tokens * self.token_bytes / GIB


@dataclass
class Launch:
    """What a server is started with, beside what all have in common.

    Attributes:
        python: the interpreter, where it is not that of the project.
        daemon: what runs beside the server, if something has to.
    """

    flags: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    python: Path | None = None
    daemon: lmcache_peer.Daemon | None = None


@dataclass(frozen=True)
class Contender:
    """A cache that is compared.

    Attributes:
        launch: how it is started.
        served: sources, in SGLang's words, from which it must have served hits for its figures to count.
        reads_disk: the hits below the host pool come from files, which the page cache may hold.
    """

    launch: Callable[[Place], Launch]
    served: tuple[str, ...] = ()
    reads_disk: bool = False


def _no_cache(_place: Place) -> Launch:
    return Launch({"disable-radix-cache": True})


def _radix(_place: Place) -> Launch:
    return Launch()


def _ours(place: Place) -> Launch:
    size = {"FLEXKV_CPU_CACHE_GB": f"{place.gib(place.host_tokens):.6f}"}
    return Launch({"enable-flexkv": True}, {"SGLANG_PLUGINS": "flexkv", **size})


def _ours_ssd(place: Place) -> Launch:
    launch = _ours(place)
    launch.environment["FLEXKV_SSD_CACHE_GB"] = f"{place.gib(place.disk_tokens):.6f}"
    launch.environment["FLEXKV_SSD_CACHE_DIR"] = str(place.directory)
    return launch


def _ours_remote(place: Place) -> Launch:
    launch = _ours(place)
    room = place.gib(place.disk_tokens)
    launch.environment["FLEXKV_REMOTE"] = f"file://{place.directory}?max_gb={room:.6f}"
    return launch


def _hicache(place: Place) -> Launch:
    # Its --hicache-size takes whole GB only; the ratio says the same.
    ratio = place.host_tokens / place.device_tokens
    return Launch({"enable-hierarchical-cache": True, "hicache-ratio": ratio})


def _hicache_file(place: Place) -> Launch:
    launch = _hicache(place)
    launch.flags["hicache-storage-backend"] = "file"
    launch.environment["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(place.directory)
    return launch


def _lmcache(place: Place, chunk_tokens: int, disk: bool = False) -> Launch:
    python = lmcache_peer.interpreter()
    if isinstance(python, str):
        raise CannotRunError(python)
    daemon = lmcache_peer.Daemon(
        python,
        place.directory,
        host_gib=place.gib(place.host_tokens),
        chunk_tokens=chunk_tokens,
        disk=place.directory / "disk" if disk else None,
    )
    flags = {"enable-lmcache": True, "lmcache-config-file": str(daemon.client_config())}
    return Launch(flags, daemon.environment, python, daemon)


def _flexkv(_place: Place) -> Launch:
    raise CannotRunError(
        "upstream FlexKV (34ab141) and SGLang 0.5.23 do not fit: SGLang's integration hands its "
        "register_to_server indexer_buffers and indexer_layout, which that does not take. It is in no "
        "package index, and registers CUDA tensors only"
    )


CONTENDERS = {
    "nocache": Contender(_no_cache),
    "radix": Contender(_radix),
    "ours": Contender(_ours, ("host",)),
    "ours-again": Contender(_ours, ("host",)),
    "hicache": Contender(_hicache, ("host",)),
    # Whatever LMCache has is `storage` to SGLang.
    "lmcache-256": Contender(lambda place: _lmcache(place, 256), ("storage",)),
    "lmcache-64": Contender(lambda place: _lmcache(place, 64), ("storage",)),
    "flexkv": Contender(_flexkv),
    "ours-ssd": Contender(_ours_ssd, ("host", "storage"), reads_disk=True),
    "ours-ssd-again": Contender(_ours_ssd, ("host", "storage"), reads_disk=True),
    "ours-remote": Contender(_ours_remote, ("host", "storage"), reads_disk=True),
    "hicache-file": Contender(_hicache_file, ("host", "storage"), reads_disk=True),
    "lmcache-fs": Contender(lambda place: _lmcache(place, 256, disk=True), ("storage",), reads_disk=True),
}


def environment_of_all(directory: Path) -> None:
    """Sets in this process what every contender's servers are to have.

    A log whose lines say how bad they are; and on a CPU the stand-in for HiCache's kernels, which touches
    nothing that another one uses, and one thread to compute with: two that wait for each other at every layer
    are hardly faster beside schedulers and copies, and times spread ten times as far.
    """
    path = directory / "logging.json"
    path.write_text(json.dumps(_log_configuration()))
    os.environ["SGLANG_LOGGING_CONFIG_PATH"] = str(path)
    if serving.ON_CPU:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(_SHIM), *([before] if before else [])])


def _log_configuration() -> dict[str, Any]:
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(levelname)s %(asctime)s %(name)s: %(message)s"}},
        "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "plain"}},
        "root": {"level": "INFO", "handlers": ["out"]},
        "loggers": {name: {"level": "WARNING"} for name in ("httpx", "httpcore")},
    }


class Running:
    """A contender that has been started. It stands still but within ``awake``."""

    def __init__(self, name: str, server: Any, place: Place, launch: Launch) -> None:
        self.name, self.server, self.place = name, server, place
        self.contender = CONTENDERS[name]
        self._daemon = launch.daemon

    @contextmanager
    def awake(self) -> Iterator[Any]:
        """An idle scheduler of SGLang takes a core: those that are not measured are stopped."""
        self.signal(signal.SIGCONT)
        try:
            yield self.server
        finally:
            self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        pids = [self.server.pid, self._daemon.pid if self._daemon else None]
        serving.signal_trees([pid for pid in pids if pid is not None], number)

    def errors(self) -> list[str]:
        """Lines of its logs that are errors."""
        logs = [self.server.log_path, *([self._daemon.log_path] if self._daemon else [])]
        return [
            f"{log.name}: {line}"
            for log in logs
            for line in log.read_text(errors="replace").splitlines()
            if _ERROR.search(line)
        ]

    def tokens_from_disk(self) -> int | None:
        """What its daemon counts, where SGLang's report cannot tell; None where it can."""
        return self._daemon.tokens_from_disk() if self._daemon and self.contender.reads_disk else None


@contextmanager
def started(name: str, model: Path, place: Place, logs: Path) -> Iterator[Running]:
    """Starts a contender, which then stands still. In the end it is killed.

    Raises:
        CannotRunError: it cannot run on this machine.
        ServerStartError: it should, and did not start.
    """
    place.directory.mkdir(parents=True)
    launch = CONTENDERS[name].launch(place)
    flags = {
        "page-size": PAGE_SIZE,
        "max-total-tokens": place.device_tokens,
        "enable-cache-report": True,
        "attention-backend": None if serving.ON_CPU else "flashinfer",
        **launch.flags,
    }
    # Ours would patch every server, for the case that it has the flag.
    environment: Mapping[str, str] = {"SGLANG_PLUGINS": "none", **launch.environment}
    python = {} if launch.python is None else {"python": launch.python}
    server = serving.SGLangServer(
        model, flags, env=environment, log_path=logs / f"{name}.log", stop_grace_s=0, **python
    )
    try:
        if launch.daemon:
            launch.daemon.start(logs / f"{name}-daemon.log")
        serving.start(server)
        running = Running(name, server, place, launch)
        running.signal(signal.SIGSTOP)
        yield running
    finally:
        server.stop()
        if launch.daemon:
            launch.daemon.stop()
