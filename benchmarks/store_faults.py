"""Real remote stores, each on a small disk of its own, and what befalls them.

Each kind of store has a process that serves it, which can be stopped and killed: that of a directory, and of
a HiCache backend of files, is a FUSE mount (bindfs). The disks are files with ext4, which only root may
mount.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from common import ROOT

sys.path.append(str(ROOT / "tests" / "support"))
_services: Any = importlib.import_module("remote_services")
_mount: Any = importlib.import_module("hanging_mount")
SERVER_ENVIRONMENT: dict[str, str] = _services.SERVER_ENVIRONMENT

_DISK_MIB = 768  # SeaweedFS takes 64 MiB at a time, several times
_BALLAST = 1 << 20
# A slow server runs for the first of these and then stands still for the second, over and over.
_RUNS_S, _STANDS_S = 0.005, 0.1
# A flipped bit, too short, too long, another one's, noise.
_DAMAGES = 5


class _Directory(_mount.HangingMount):  # type: ignore[misc]
    @property
    def url(self) -> str:
        return f"file://{self.directory}?mounted=yes&max_gb=1"


class _HiCacheFiles(_mount.HangingMount):  # type: ignore[misc]
    @property
    def url(self) -> str:
        return f"hicache://file?{urlencode({'file_storage_path': str(self.directory)})}"


class Values(NamedTuple):
    """What is in a store, past all that is ours."""

    names: Callable[[], Iterable[Any]]
    get: Callable[[Any], bytes]
    put: Callable[[Any, bytes], object]


def _files(service: Any) -> Values:
    return Values(
        # What is being written has another name in a moment.
        lambda: [p for p in service.held.rglob("*") if p.is_file() and p.parent.name != "tmp"],
        Path.read_bytes,
        Path.write_bytes,
    )


def _redis_values(service: Any) -> Values:
    client = importlib.import_module("redis").Redis(port=service.port)
    return Values(lambda: list(client.scan_iter(count=1000)), client.get, client.set)


def _s3_values(service: Any) -> Values:
    client = importlib.import_module("obstore")
    bucket = importlib.import_module("obstore.store").S3Store(
        "cache", endpoint=service.endpoint, region="us-east-1", client_options={"allow_http": True}
    )

    def names() -> list[str]:
        return [each["path"] for part in client.list(bucket, "some/where") for each in part]

    return Values(
        names,
        lambda name: bytes(client.get(bucket, name).bytes()),
        lambda name, value: client.put(bucket, name, value, use_multipart=False),
    )


def _mooncake_values(service: Any) -> Values:
    client = _mooncake_client(service)

    def names() -> list[str]:
        with urllib.request.urlopen(f"{service.metrics_url}/get_all_keys", timeout=10) as answer:
            return str(answer.read().decode()).split()

    def put(name: str, value: bytes) -> None:
        client.remove(name, True)
        if error := client.put(name, value):
            raise RuntimeError(f"Mooncake Store takes no value: {error}")

    return Values(names, client.get, put)


def _mooncake_client(service: Any) -> Any:
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    client = importlib.import_module("mooncake.store").MooncakeDistributedStore()
    if error := client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", service.address):
        raise RuntimeError(f"Mooncake Store lets nobody in: {error}")
    return client


@contextmanager
def _full_disk(service: Any) -> Iterator[None]:
    ballast = service.disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        size = _BALLAST
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def _full_redis(service: Any) -> Iterator[None]:
    with importlib.import_module("redis").Redis(port=service.port) as client:
        client.config_set("maxmemory", 1)
        yield
        client.config_set("maxmemory", 0)


@contextmanager
def _full_mooncake(service: Any) -> Iterator[None]:
    """Of what may not be evicted."""
    library, client = importlib.import_module("mooncake.store"), _mooncake_client(service)
    pinned = library.ReplicateConfig()
    pinned.with_hard_pin = True
    names: list[str] = []
    size = 16 * _BALLAST
    while size >= 1 << 10:
        if client.put(f"ballast-{len(names)}", bytes(size), pinned):
            size //= 2
        else:
            names.append(f"ballast-{len(names)}")
    yield
    for name in names:
        client.remove(name, True)
    client.close()


class Kind(NamedTuple):
    """
    Attributes:
        make: its server, in a directory that is a disk of its own.
        programs: of which it needs one.
        package: that it needs.
    """

    make: Callable[[Path], Any]
    programs: tuple[str, ...]
    package: str
    values: Callable[[Any], Values]
    full: Callable[[Any], contextlib.AbstractContextManager[None]]


KINDS = {
    "directory": Kind(_Directory, ("bindfs",), "sglang_flexkv", _files, _full_disk),
    "redis": Kind(
        _services.KINDS["redis"], _services.KINDS["redis"].PROGRAMS, "redis", _redis_values, _full_redis
    ),
    "s3": Kind(_services.KINDS["s3"], ("weed",), "obstore", _s3_values, _full_disk),
    "mooncake": Kind(
        _services.KINDS["mooncake"], ("mooncake_client",), "mooncake", _mooncake_values, _full_mooncake
    ),
    "hicache": Kind(_HiCacheFiles, ("bindfs",), "sglang", _files, _full_disk),
}


def available() -> list[str]:
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    return [
        name
        for name, kind in KINDS.items()
        if any(shutil.which(program, path=path) for program in kind.programs)
        and importlib.util.find_spec(kind.package)
    ]


@contextmanager
def running(kind: str, directory: Path) -> Iterator[Any]:
    """A store of this kind, on a disk of its own where that may be mounted."""
    disk = directory / "disk"
    disk.mkdir()
    image = directory / "image"
    is_mounted = os.geteuid() == 0
    if is_mounted:
        with image.open("wb") as file:
            file.truncate(_DISK_MIB << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)
    try:
        service = KINDS[kind].make(disk)
        service.disk, service.is_bounded = disk, is_mounted
        try:
            yield service
        finally:
            service.stop()
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=False)
            image.unlink()


def _send(service: Any, number: signal.Signals) -> None:
    for process in getattr(service, "processes", [None]):
        service.send(number, *([process] if process else []))


@contextmanager
def standing_still(service: Any) -> Iterator[None]:
    _send(service, signal.SIGSTOP)
    try:
        yield
    finally:
        _send(service, signal.SIGCONT)


@contextmanager
def slow(service: Any) -> Iterator[None]:
    """It gets a processor one twentieth of the time."""
    end = threading.Event()

    def run() -> None:
        while not end.wait(_RUNS_S):
            with standing_still(service):
                end.wait(_STANDS_S)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@contextmanager
def killed(service: Any) -> Iterator[None]:
    service.stop()
    yield
    service.start()


def full(kind: str, service: Any) -> contextlib.AbstractContextManager[None]:
    return KINDS[kind].full(service)


def spoil(kind: str, service: Any, seed: int) -> int:
    """Damages every value that is there, each in another way. Returns how many."""
    rng = random.Random(seed)
    values = KINDS[kind].values(service)
    names = list(values.names())
    for number, name in enumerate(names):
        value = bytearray(values.get(name))
        damage = number % _DAMAGES
        if damage == 0:
            value[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
        elif damage == 1:
            del value[len(value) // 2 :]
        elif damage == 2:
            value += bytes(4096)
        elif damage == 3:
            value[:] = values.get(names[(number + 1) % len(names)])
        else:
            value[:] = rng.randbytes(len(value))
        values.put(name, bytes(value))
    return len(names)
