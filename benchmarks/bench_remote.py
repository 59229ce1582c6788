"""Remote stores: values to and from each kind of them, against the barest client of each.

    python benchmarks/bench_remote.py [--smoke] [--json FILE|-] [--dir DIRECTORY]

Ours is a store's session, as the tier's threads use it: a header and a block each, in calls of 8 MiB. The
barest client of Redis is a socket to which one buffer after the other is sent, and from which one is
received, as its protocol has it; that of a directory opens, writes and renames files with O_DIRECT; that of
S3 is obstore in four threads, with one buffer for each value; that of Mooncake Store makes a call for each
value. The others have one thread. Beside S3's four threads ours has as many sessions as the tier has threads,
two that store and four that load; elsewhere it has one. Beside the directory ``fio``, where it is installed,
writes and reads as many files of that size, one after the other with O_DIRECT. All take turns, round by
round, and all files are new in each. Memory is as that of the CPU tier, in huge pages where the system has
them; fio has a buffer of its own. Making and comparing the sums is in none of them. Every byte that came back
is compared.

How much faster than redis-py anybody can store in Redis has a limit, which is told beside what was reached:
the server has one thread, and server and client have the cores of this machine. Whoever stores needs as much
of them as the thriftier one of our session and the barest client.

Looking up is of 2,048 blocks that are there, and of as many that are not; of those that are there Mooncake's
own client is asked as well, right after ours.

Compression is measured apart: what it makes of a block of 2 MiB and how fast, and the whole tier, from the
CPU tier to a directory and back, with ``remote_compression: always`` beside ``none``, over a link that is
pretended: each call waits until what it moves, and what others move, would have gone over it. The KV is
synthetic: numbers of a normal distribution in bf16, and such whose channels differ in scale by e to the power
of another one. What a trained model's KV shrinks to is its own affair: less, the more its channels differ.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import mmap
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import (
    ROOT,
    JsonOption,
    Machine,
    Report,
    SmokeOption,
    disk_directory,
    median_ratio,
    print_table,
    random_bytes,
)

from sglang_flexkv import CacheConfig, KVCacheLayout, KVCacheLayoutType, _core
from sglang_flexkv.common.block import SequenceMeta, make_namespace
from sglang_flexkv.common.remote_url import RemoteUrl, parse_remote_url
from sglang_flexkv.kvtask import KVTask, KVTaskEngine
from sglang_flexkv.storage.remote.directory import DirectoryStore
from sglang_flexkv.storage.remote.store import Outcome, Session, Value, value_bytes
from sglang_flexkv.storage.remote.tier import STORES

sys.path.append(str(ROOT / "tests" / "support"))
_redis_server: Any = importlib.import_module("redis_server")
_mooncake_server: Any = importlib.import_module("mooncake_server")
_s3_server: Any = importlib.import_module("s3_server")

# Where a wheel's programs are, whether or not the environment is the shell's own.
_PROGRAMS = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
_HEADER = _core.VALUE_HEADER_BYTES
_CALL_BYTES = 8 << 20
_LOOKED_UP = 2048
# Sessions side by side that the tier has, for each way.
_SESSIONS = {"put": 2, "get": 4}
_TIMEOUT_S = 60.0
_NAMESPACE = "ab" * 16


class Memory:
    """So many values, on whole pages."""

    def __init__(self, count: int, block_bytes: int) -> None:
        self.size = _HEADER + block_bytes
        memory = mmap.mmap(-1, count * self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)  # as the CPU tier is
        self.view = memoryview(memory)
        self.whole = [self.view[i * self.size : (i + 1) * self.size] for i in range(count)]
        self.values = [[value[:_HEADER], value[_HEADER:]] for value in self.whole]

    def array(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.frombuffer(self.view, np.uint8)


class Bare:
    """The barest client of a store: a value at a time, in as many threads as are quickest."""

    threads = 1
    has_look_up = False
    server: int | None = None  # its process, where what that takes of the cores is of interest

    def lend(self, memory: Memory) -> None:
        """Values will be in it."""

    def forget(self) -> None:
        """Before each round: what was stored is not there any more, where that makes a difference."""

    def put(self, name: str, value: memoryview) -> None: ...
    def get(self, name: str, value: memoryview) -> None: ...
    def look_up(self, names: list[str]) -> None:
        """That these values are there, where the client finds out with one call."""

    def stop(self) -> None:
        """Also the store's server."""


class BareRedis(Bare):
    def __init__(self, scratch: Path) -> None:
        self._server = _redis_server.RedisServer(scratch)
        self.url, self.server = self._server.url, self._server.pid
        self._socket = socket.create_connection(("127.0.0.1", self._server.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._library = importlib.import_module("redis").Redis(port=self._server.port)

    def put(self, name: str, value: memoryview) -> None:
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name.encode(), len(value))
        self._socket.sendall(head)
        self._socket.sendall(value)
        self._socket.sendall(b"\r\n")
        assert self._socket.recv(5, socket.MSG_WAITALL) == b"+OK\r\n"

    def get(self, name: str, value: memoryview) -> None:
        self._socket.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(name), name.encode()))
        head = b"$%d\r\n" % len(value)
        assert self._socket.recv(len(head), socket.MSG_WAITALL) == head
        assert self._socket.recv_into(value, 0, socket.MSG_WAITALL) == len(value)
        assert self._socket.recv(2, socket.MSG_WAITALL) == b"\r\n"

    def library_put(self, name: str, value: memoryview) -> None:
        """What others store with. It sends memoryviews without a copy."""
        self._library.set(name, value)

    def stop(self) -> None:
        self._server.stop()


class BareMooncake(Bare):
    """A call for each value, from and to memory that is registered."""

    has_look_up = True

    def __init__(self, scratch: Path) -> None:
        os.environ["MC_LOG_LEVEL"] = "ERROR"
        self._server = _mooncake_server.MooncakeServer(scratch, "1 GB")
        self.url = self._server.url
        self._client = importlib.import_module("mooncake.store").MooncakeDistributedStore()
        master = f"127.0.0.1:{self._server.port}"
        assert self._client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 1 << 20, "tcp", "", master) == 0

    def lend(self, memory: Memory) -> None:
        self._client.register_buffer(_address(memory.view), len(memory.view))

    def put(self, name: str, value: memoryview) -> None:
        self._client.remove(name, True)  # what is there is not written again
        assert self._client.batch_put_from([name], [_address(value)], [len(value)]) == [0]

    def get(self, name: str, value: memoryview) -> None:
        assert self._client.batch_get_into([name], [_address(value)], [len(value)]) == [len(value)]

    def look_up(self, names: list[str]) -> None:
        assert self._client.batch_is_exist(names) == [1] * len(names)

    def stop(self) -> None:
        self._client.close()
        self._server.stop()


class BareS3(Bare):
    threads = 4

    def __init__(self, scratch: Path) -> None:
        self._server = _s3_server.S3Server(scratch)
        os.environ.update(self._server.environment)
        self.url = self._server.url
        self._client = importlib.import_module("obstore")
        store = importlib.import_module("obstore.store").S3Store
        options = {"allow_http": True}
        self._bucket = store("cache", endpoint=self._server.endpoint, client_options=options)

    def put(self, name: str, value: memoryview) -> None:
        self._client.put(self._bucket, name, value, use_multipart=False)

    def get(self, name: str, value: memoryview) -> None:
        value[:] = memoryview(self._client.get(self._bucket, name).buffer())

    def stop(self) -> None:
        self._server.stop()


class BareFiles(Bare):
    def __init__(self, scratch: Path) -> None:
        self._store = scratch / "store"
        self._store.mkdir(exist_ok=True)
        self.url = f"file://{self._store}?max_gb=64"
        self._directory = scratch / "bare"
        self._directory.mkdir(exist_ok=True)
        self._direct = os.O_DIRECT if _takes_direct(self._directory) else 0

    def forget(self) -> None:
        """To replace a file, or to write into one that is there, is other work than to make one."""
        for made in self._directory.glob("fio-*"):
            shutil.rmtree(made)
        # Of directories a store has 256, once; there are fewer files here than that.
        for file in (*self._store.glob("fkv1/[0-9a-f][0-9a-f]/*"), *self._directory.iterdir()):
            file.unlink()

    def put(self, name: str, value: memoryview) -> None:
        path = self._directory / name.rpartition("/")[2]
        fd = os.open(f"{path}.tmp", os.O_WRONLY | os.O_CREAT | self._direct, 0o600)
        assert os.pwrite(fd, value, 0) == len(value)
        os.close(fd)
        os.rename(f"{path}.tmp", path)

    def get(self, name: str, value: memoryview) -> None:
        fd = os.open(self._directory / name.rpartition("/")[2], os.O_RDONLY | self._direct)
        assert os.preadv(fd, [value], 0) == len(value)
        os.close(fd)

    def fio_s(self, mode: str, count: int, size: int) -> float:
        """What fio takes to write, or then to read, so many files."""
        directory = self._directory / f"fio-{size}"
        directory.mkdir(exist_ok=True)
        command = [
            *("fio", "--name=values", f"--directory={directory}", f"--rw={mode}", "--output-format=json"),
            *(f"--nrfiles={count}", f"--filesize={size}", f"--size={count * size}", f"--bs={size}"),
            *("--ioengine=psync", f"--direct={int(self._direct != 0)}", "--thread", "--openfiles=1"),
            *("--file_service_type=sequential", "--create_on_open=1", "--fallocate=none"),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        of_way = json.loads(done.stdout)["jobs"][0][mode]
        if of_way["io_bytes"] != count * size:
            raise RuntimeError(f"fio moved {of_way['io_bytes']} bytes, not {count * size}")
        return float(of_way["io_bytes"] / of_way["bw_bytes"])


def _stores() -> dict[str, Callable[[Path], Any]]:
    """Those whose servers and clients are here."""
    found: dict[str, Callable[[Path], Any]] = {"directory": BareFiles}
    if shutil.which("redis-server") or shutil.which("redis-check-rdb"):
        found["redis"] = BareRedis
    if shutil.which("mooncake_client", path=_PROGRAMS):
        found["mooncake"] = BareMooncake
    if shutil.which("weed", path=_PROGRAMS) and importlib.util.find_spec("obstore"):
        found["s3"] = BareS3
    return found


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).__array_interface__["data"][0])


def _takes_direct(directory: Path) -> bool:
    try:
        fd = os.open(directory / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError:
        return False
    os.close(fd)
    return True


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    directory: Annotated[Path | None, typer.Option("--dir", help="Where the files go.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 7,
    mib: Annotated[int, typer.Option(min=8, help="Stored and loaded per round.")] = 128,
    only: Annotated[list[str] | None, typer.Option(help="Of these stores, or compression.")] = None,
) -> None:
    """Remote stores against the barest client of each."""
    if smoke:
        rounds, mib = 1, 8
    with disk_directory(directory, "bench-remote") as scratch:
        report = Report("remote", smoke, Machine.here(scratch), {"rounds": rounds, "mib": mib})
        kinds = {name: make for name, make in _stores().items() if name in (only or [name])}
        for kind, make in kinds.items():
            bare = make(scratch)
            try:
                for block_mib in (2, 4):
                    _measure(report, kind, bare, block_mib << 20, mib << 20, rounds)
            finally:
                bare.stop()
            of_kind = [row for row in report.rows if row["store"] == kind]
            for way in ("put", "get"):
                name = f"{kind}_{way}_ratio"
                report.results[name] = min(row[f"{way}_ratio"] for row in of_kind)
                report.goals[name] = "≥ 0.9"
            for what in ("there", "bare_there", "absent"):
                if f"{what}_ms" in of_kind[0]:
                    report.results[f"{kind}_look_up_{what}_ms"] = max(row[f"{what}_ms"] for row in of_kind)
        for way in ("put", "get"):
            ratios = [row[f"{way}_ratio_fio"] for row in report.rows if f"{way}_ratio_fio" in row]
            if ratios:
                report.results[f"directory_{way}_ratio_fio"] = min(ratios)
                report.goals[f"directory_{way}_ratio_fio"] = "≥ 0.9"
        if "redis" in kinds:
            of_kind = [row for row in report.rows if row["store"] == "redis"]
            for name in ("put_over_redis_py", "put_limit_over_redis_py"):
                report.results[f"redis_{name}"] = min(row[name] for row in of_kind)
            report.goals["redis_put_over_redis_py"] = "≥ 3"
        if only is None or "compression" in only:
            _measure_compression(report, scratch, mib << 20, rounds)
        for kind in {"redis", "mooncake"} & kinds.keys():
            report.goals[f"{kind}_look_up_there_ms"] = "≤ 1"
    columns = ["store", "mib", "put_mb_s", "put_ratio", "get_mb_s", "get_ratio", "there_ms", "absent_ms"]
    if report.rows:
        print_table("ratios to the barest client", report.rows, columns)
    report.finish(json_to)


def _measure(report: Report, kind: str, bare: Any, block_bytes: int, total_bytes: int, rounds: int) -> None:
    count = max(2, total_bytes // block_bytes)
    names = [f"fkv1/{_NAMESPACE}/{i * 2654435761 % 2**32:08x}{block_bytes:024x}" for i in range(count)]
    sent, received = Memory(count, block_bytes), Memory(count, block_bytes)
    sent.array()[:] = random_bytes((len(sent.view),), 1)
    threads = ThreadPoolExecutor(bare.threads) if bare.threads > 1 else None
    num_sessions = dict.fromkeys(_SESSIONS, 1) if threads is None else _SESSIONS
    try:
        parsed = parse_remote_url(bare.url)
        store = STORES[parsed.scheme](parsed, _TIMEOUT_S)
        store.open()
        for memory in (sent, received):
            store.lend(memory.view)
            bare.lend(memory)
        sessions = [store.session() for _ in range(max(num_sessions.values()))]
        at_once = max(1, _CALL_BYTES // block_bytes)
        calls = [slice(first, first + at_once) for first in range(0, count, at_once)]
        bare_names = [f"bare/{name.rpartition('/')[2]}" for name in names]

        def ours(way: str, memory: Memory) -> None:
            rest = iter(calls)

            def move(session: Session) -> None:
                for part in rest:  # of a list: each part goes to one thread
                    getattr(session, way)(names[part], memory.values[part])

            if threads is None:
                return move(sessions[0])
            for _ in threads.map(move, sessions[: num_sessions[way]]):
                pass

        def barest(call: Callable[[str, memoryview], None], memory: Memory) -> None:
            each = threads.map if threads else map
            for _ in each(call, bare_names, memory.whole):
                pass

        ways: dict[str, Callable[[], None]] = {
            "put": lambda: ours("put", sent),
            "bare_put": lambda: barest(bare.put, sent),
            "get": lambda: ours("get", received),
            "bare_get": lambda: barest(bare.get, received),
        }
        if kind == "redis":
            ways["library_put"] = lambda: barest(bare.library_put, sent)
        fio_s: dict[str, list[float]] = {"put": [], "get": []}
        has_fio = kind == "directory" and shutil.which("fio") is not None
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        cores_s: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}  # ours, the server's
        for number in range(rounds + 1):
            bare.forget()
            for way, call in ways.items():
                if "get" in way:
                    received.array()[:] = 0
                before_s = time.process_time(), _cores_s(bare.server)
                begin_s = time.perf_counter()
                call()
                needed_s = time.perf_counter() - begin_s
                if number:  # the first is to warm up
                    seconds[way].append(needed_s)
                    cores_s[way].append(
                        (time.process_time() - before_s[0], _cores_s(bare.server) - before_s[1])
                    )
                if "get" in way:
                    report.check_bytes(f"bytes after {way}", received.array(), sent.array())
            for way, mode in (("put", "write"), ("get", "read")) if has_fio else ():
                needed_s = bare.fio_s(mode, count, sent.size)
                if number:
                    fio_s[way].append(needed_s)
        there = [f"fkv1/{_NAMESPACE}/{block_bytes:016x}{i:016x}" for i in range(_LOOKED_UP)]
        small = [[memoryview(bytes(1))]] * 64
        for first in range(0, _LOOKED_UP, 64):
            sessions[0].put(there[first : first + 64], small)
        absent = [f"fkv1/{_NAMESPACE}/{i:032x}" for i in range(10**6, 10**6 + _LOOKED_UP)]
        report.rows.append(
            {
                "store": kind,
                "mib": block_bytes >> 20,
                **{f"{way}_mb_s": count * sent.size / min(seconds[way]) / 1e6 for way in ("put", "get")},
                "put_ratio": median_ratio(seconds["bare_put"], seconds["put"]),
                "get_ratio": median_ratio(seconds["bare_get"], seconds["get"]),
                **(
                    {
                        "put_over_redis_py": median_ratio(seconds["library_put"], seconds["put"]),
                        "put_limit_over_redis_py": statistics.median(seconds["library_put"])
                        / min(_least_s(cores_s["put"]), _least_s(cores_s["bare_put"])),
                    }
                    if kind == "redis"
                    else {}
                ),
                **{f"{way}_ratio_fio": median_ratio(fio_s[way], seconds[way]) for way in fio_s if has_fio},
                **_look_up_ms(report, sessions[0], bare, there, absent),
            }
        )
        for session in sessions:
            session.close()
        store.close()
    finally:
        if threads is not None:
            threads.shutdown()


def _cores_s(process: int | None) -> float:
    """What the threads of a process have had of the cores, in seconds."""
    if process is None:
        return 0.0
    spent_ns = [
        int(path.read_text().split()[0]) for path in Path(f"/proc/{process}/task").glob("*/schedstat")
    ]
    return sum(spent_ns) / 1e9


def _least_s(cores_s: Sequence[tuple[float, float]]) -> float:
    """What a round takes at least that needs so much of the cores, of which the server's thread has one."""
    ours_s, servers_s = (statistics.median(each) for each in zip(*cores_s, strict=True))
    return max(servers_s, (ours_s + servers_s) / len(os.sched_getaffinity(0)))


def _look_up_ms(
    report: Report, session: Session, bare: Any, there: list[str], absent: list[str]
) -> dict[str, float]:
    ways: dict[str, Callable[[], object]] = {
        "there_ms": lambda: report.check("look-ups", session.count_leading(there) == len(there)),
        **({"bare_there_ms": lambda: bare.look_up(there)} if bare.has_look_up else {}),
        "absent_ms": lambda: report.check("look-ups", session.count_leading(absent) == 0),
    }
    milliseconds = {}
    for way, call in ways.items():
        times = []
        for _ in range(12):
            begin_s = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin_s)
        milliseconds[way] = statistics.median(times[3:]) * 1e3  # the first are to warm up
    return milliseconds


# ---- compression ----

_LAYERS, _HEADS, _HEAD_SIZE, _PAGE = 16, 8, 64, 64  # bf16 blocks of 2 MiB
_BLOCK_BYTES = 2 * _LAYERS * _HEADS * _HEAD_SIZE * _PAGE * 2
_LINKS_MB_S = (100, 400, 0)  # 0: as fast as it is


def _kv(blocks: int, seed: int, *, channels: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (_LAYERS, 2, blocks * _PAGE, _HEADS * _HEAD_SIZE)
    numbers = torch.randn(shape, generator=generator)
    if channels:
        numbers *= torch.randn((_LAYERS, 2, 1, _HEADS * _HEAD_SIZE), generator=generator).exp()
    return numbers.to(torch.bfloat16)


class _SlowLink(DirectoryStore):
    """A directory that is reached over a link of so many MB/s each way."""

    mb_s = 0.0

    def __init__(self, url: RemoteUrl, timeout_s: float) -> None:
        super().__init__(url, timeout_s)
        self._turn = threading.Lock()
        self._free_s = {"put": 0.0, "get": 0.0}

    def session(self) -> Session:
        return _SlowSession(self, super().session())

    def pass_over(self, way: str, num_bytes: int) -> None:
        if not self.mb_s:
            return
        with self._turn:
            now_s = time.perf_counter()
            self._free_s[way] = max(now_s, self._free_s[way]) + num_bytes / self.mb_s / 1e6
            wait_s = self._free_s[way] - now_s
        time.sleep(wait_s)


class _SlowSession(Session):
    def __init__(self, link: _SlowLink, session: Session) -> None:
        self._link, self._session = link, session

    def exists(self, names: Sequence[str]) -> list[bool]:
        return self._session.exists(names)

    def close(self) -> None:
        self._session.close()

    def get(
        self, names: Sequence[str], values: Sequence[Value], sizes: list[int] | None = None
    ) -> list[Outcome]:
        sizes = [0] * len(names) if sizes is None else sizes
        outcomes = self._session.get(names, values, sizes)
        self._link.pass_over("get", sum(sizes))
        return outcomes

    def put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        outcomes = self._session.put(names, values)
        self._link.pass_over("put", sum(map(value_bytes, values)))
        return outcomes


@contextmanager
def _engine(scratch: Path, blocks: int, compression: str) -> Iterator[tuple[KVTaskEngine, torch.Tensor]]:
    layout = KVCacheLayout(KVCacheLayoutType.LAYERWISE, _LAYERS, blocks, _PAGE, _HEADS, _HEAD_SIZE)
    kv = torch.zeros(layout.kv_shape, dtype=torch.bfloat16)
    directory = scratch / compression
    directory.mkdir(exist_ok=True)
    config = CacheConfig(
        tokens_per_block=_PAGE,
        num_cpu_blocks=2 * blocks,
        remote=f"file://{directory}?max_gb=8",
        remote_compression=compression,
        remote_timeout_s=_TIMEOUT_S,
    )
    namespace = make_namespace({"benchmark": "compression"})
    engine = KVTaskEngine(config, layout.device_buffers(list(kv)), namespace=namespace)
    try:
        yield engine, kv
    finally:
        engine.close()


def _measure_compression(report: Report, scratch: Path, total_bytes: int, rounds: int) -> None:
    for name, channels in (("normal", False), ("channels", True)):
        block = _kv(1, 1, channels=channels).view(torch.uint8).numpy()
        seen = [_core.try_compression(block, 2) for _ in range(20)]
        report.results[f"compression_ratio_{name}"] = block.size / seen[0].stored_bytes
        for way in ("compress", "expand"):
            best_s = min(getattr(trial, f"{way}_s") for trial in seen)
            report.results[f"{way}_mb_s_{name}"] = block.size / best_s / 1e6
    plain, STORES["file"] = STORES["file"], _SlowLink
    try:
        blocks = max(2, total_bytes // _BLOCK_BYTES)
        content = _kv(blocks, 2, channels=True)
        numbers = itertools.count()
        for mb_s in _LINKS_MB_S:
            _SlowLink.mb_s = mb_s
            seconds: dict[str, list[float]] = {}
            with _engine(scratch, blocks, "none") as none, _engine(scratch, blocks, "always") as always:
                for number in range(rounds + 1):
                    for mode, (engine, kv) in (("none", none), ("always", always)):
                        took = _round_trip(report, engine, kv, content, next(numbers))
                        for way, took_s in took.items() if number else ():  # the first is to warm up
                            seconds.setdefault(f"{mode}_{way}", []).append(took_s)
            for way in ("put", "get"):
                gain = median_ratio(seconds[f"none_{way}"], seconds[f"always_{way}"])
                report.results[f"compression_{way}_gain_at_{mb_s or 'any'}_mb_s"] = gain
    finally:
        STORES["file"] = plain


def _round_trip(
    report: Report, engine: KVTaskEngine, kv: torch.Tensor, content: torch.Tensor, number: int
) -> dict[str, float]:
    """Seconds to bring blocks from the CPU tier to the store, and from there to the device."""
    tokens = kv.shape[2] * _PAGE
    keys = SequenceMeta(np.arange(tokens) + number * tokens, _PAGE, _NAMESPACE.encode()[:16]).block_keys

    def launch(task: KVTask) -> None:
        engine.launch(task, np.arange(tokens))
        assert engine.wait([task], _TIMEOUT_S)
        engine.forget(task)

    kv.view(content.shape)[:] = content
    begin_s = time.perf_counter()
    launch(engine.create_put(None, keys))
    assert engine.flush_spills(_TIMEOUT_S)
    put_s = time.perf_counter() - begin_s
    engine.clear_tiers(0)
    kv.zero_()
    begin_s = time.perf_counter()
    question = engine.ask(keys)
    while question is not None and not question.is_over:
        engine.poll()
        time.sleep(0.0002)
    if question is not None:
        engine.learn(question)
    launch(engine.create_get(keys))
    get_s = time.perf_counter() - begin_s
    got, expected = (each.view(torch.uint8).numpy().ravel() for each in (kv, content))
    report.check_bytes("bytes with and without compression", got, expected)
    return {"put": put_s, "get": get_s}


if __name__ == "__main__":
    typer.run(main)
