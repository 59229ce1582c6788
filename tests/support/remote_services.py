"""Every kind of remote store, with its real server: made when a test asks for it, ended with its module."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from mooncake_server import MooncakeServer
from redis_server import RedisServer
from s3_server import S3Server

SERVER_ENVIRONMENT = {**S3Server.environment, "MC_TCP_BIND_ADDRESS": "127.0.0.1"}
# Limits of Mooncake's client are its process's.
ENVIRONMENT = {
    **SERVER_ENVIRONMENT,
    "MC_RPC_TIMEOUT_MS": "2000",
    "MC_RPC_CONNECT_TIMEOUT_MS": "2000",
    "MC_TCP_STATUS_TIMEOUT_SEC": "2",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "2",
}


class Directory:
    def __init__(self, directory: Path) -> None:
        self.url = f"file://{directory}?max_gb=1"

    def stop(self) -> None:
        pass


class HiCacheFiles(Directory):
    def __init__(self, directory: Path) -> None:
        self.url = f"hicache://file?{urlencode({'file_storage_path': str(directory)})}"


KINDS: dict[str, Callable[[Path], Any]] = {
    "directory": Directory,
    "redis": RedisServer,
    "mooncake": MooncakeServer,
    "s3": S3Server,
    "hicache": HiCacheFiles,
}
# Those that are processes, and can be stopped.
SERVERS = ("redis", "mooncake", "s3")


class Services:
    def __init__(self, make_directory: Callable[[str], Path]) -> None:
        self._make_directory = make_directory
        self._made: dict[str, Any] = {}

    def get(self, kind: str) -> Any:
        if kind not in self._made:
            self._made[kind] = KINDS[kind](self._make_directory(kind))
        return self._made[kind]

    def end(self) -> None:
        for service in self._made.values():
            service.stop()


def stand_still(service: Any) -> None:
    service.send(signal.SIGSTOP)


def go_on(service: Any) -> None:
    service.send(signal.SIGCONT)


def set_environment(setenv: Callable[[str, str], None], delenv: Callable[..., None]) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        delenv(name)
    for name, text in ENVIRONMENT.items():
        setenv(name, text)
