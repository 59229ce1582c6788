"""SSD tier against fio: whole blocks, layer slices, and a mix of reads and writes, with O_DIRECT.

    python benchmarks/bench_ssd.py [--smoke | --long] [--json FILE|-] [--dir DIRECTORY]

Blocks go from the CPU tier's slots to random slots of the SSD tier's file and back (H2DISK, DISK2H) through
the engine as it runs in production, checksums, verification and journal included, in graphs as large as those
of a spill and as many at a time. A slice is one layer of a block: the same blocks, moved layer by layer.
``fio`` does the same I/O in turn with us: same file, same size of an I/O, same queue depth, every one in
random order, io_uring, direct. It goes over the file several times, so that the first touch of its own
buffers does not count. Ratios are of neighbours in time. Every byte is compared after it was read.

In the mixed run 70 % of the blocks are read and 30 % written at the same time; fio mixes the same shares, and
the bandwidths of reading are compared. CPU is user and system time of the process per GB moved.

It takes less than two minutes. ``--long`` measures threads instead of io_uring as well, on a larger file and
in more rounds.
"""

from __future__ import annotations

import itertools
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import (
    GIB,
    MIB,
    FlipOption,
    JsonOption,
    Machine,
    Report,
    SmokeOption,
    console,
    disk_directory,
    median,
    print_table,
    random_bytes,
    run_json,
    spread,
)

from sglang_flexkv import _core
from sglang_flexkv.common.block import make_namespace
from sglang_flexkv.common.config import CacheConfig, IoEngine
from sglang_flexkv.common.lower_tier import SharedBlocks
from sglang_flexkv.common.storage import DeviceBuffers
from sglang_flexkv.common.transfer import Slots, TransferType
from sglang_flexkv.kvtask import _SPILL_BYTES_MAX, _SPILLS_MAX
from sglang_flexkv.storage.storage_engine import StorageEngine, TierRequest
from sglang_flexkv.transfer.transfer_engine import TransferEngine

_CASES: tuple[tuple[int, int], ...] = ((1024, 1), (4096, 1), (1024, 16), (4096, 64))  # slot KiB, layers
_FIO_LOOPS = 3
_READ_SHARE = 0.7
_TIMEOUT_S = 300.0
_ENGINES = (IoEngine.IO_URING, IoEngine.THREADS)
_MIB, _MIB_LONG = 512, 1024
_REPEATS, _REPEATS_LONG = 3, 5

Job = tuple[TransferType, Slots, Slots, int]  # host slots, SSD slots, layer (-1: whole blocks)


class Bench:
    """One file of whole slots, a CPU tier of the same size, and the data plane between them.

    Attributes:
        data: what the blocks hold, uint8 [blocks, slot bytes].
        cpu_s: CPU time of this process in the last run.
    """

    def __init__(
        self, directory: Path, slot_bytes: int, layers: int, total_bytes: int, engine: IoEngine, io_depth: int
    ) -> None:
        self.num_slots, self.slot_bytes = total_bytes // slot_bytes, slot_bytes
        self.layers = range(layers) if layers > 1 else (-1,)
        config = CacheConfig(
            tokens_per_block=1,
            num_cpu_blocks=self.num_slots,
            enable_ssd=True,
            num_ssd_blocks=self.num_slots,
            ssd_cache_dir=(directory,),
            io_engine=engine,
            io_depth=io_depth,
        )
        row = torch.zeros((1, slot_bytes // layers), dtype=torch.uint8)
        device = DeviceBuffers([[row] for _ in range(layers)], tokens_per_row=1)
        namespace = make_namespace({"bench": layers})
        self.storage = StorageEngine(device, TierRequest(config, namespace, SharedBlocks(namespace)))
        (self.tier,) = self.storage.first.lower
        self.transfer = TransferEngine(config, self.storage)
        self.transfer.attach(1, self.tier.core)
        if self.tier.core.engine_name != engine.value:
            raise RuntimeError(f"asked for {engine.value}, got {self.tier.core.engine_name}")
        (self.file,) = directory.glob("*.slots")
        self.host = [self.storage.first.host.slot_view(slot) for slot in range(self.num_slots)]
        self.data = random_bytes((self.num_slots, slot_bytes), 1)
        self._rng = np.random.default_rng(2)
        self.keys = self._rng.integers(1, 2**63, (self.num_slots, 2), dtype=np.uint64)  # of block i
        self.ssd_slots = np.arange(self.num_slots)
        self.cpu_s = 0.0
        # Memory is populated and registered with the ring in the background: not what is measured.
        while self.storage.first.host.populated_bytes < self.storage.first.host.total_bytes:
            time.sleep(0.05)

    def close(self) -> None:
        self.transfer.close()
        self.storage.close_lower()
        for file in self.file.parent.glob("flexkv-*"):
            file.unlink()

    def _jobs(self, kind: TransferType, host: Slots, ssd: Slots) -> list[Job]:
        per_graph = max(1, _SPILL_BYTES_MAX // self.slot_bytes)
        return [
            (kind, host[begin : begin + per_graph], ssd[begin : begin + per_graph], layer)
            for layer in self.layers
            for begin in range(0, len(host), per_graph)
        ]

    def _submit(self, job: Job) -> int:
        kind, host, ssd, layer = job
        src, dst = (host, ssd) if kind is TransferType.H2LOWER else (ssd, host)
        # As one op of the core: the engine itself asks for no single layers.
        layers = (layer, layer + 1) if layer >= 0 else (0, 0)
        keys = np.ascontiguousarray(self.keys[host])
        return self.transfer._core.submit([_core.OpSpec(kind.value, src, dst, *layers, keys=keys)])

    def _run(self, *queues: list[Job]) -> list[float]:
        """Runs queues of jobs side by side, a few jobs of each at a time. Returns when each had ended."""
        cpu_s, begin_s = time.process_time(), time.perf_counter()
        waiting = [iter(queue) for queue in queues]
        running: dict[int, int] = {}  # graph -> queue
        ended_s = [0.0] * len(queues)

        def start(number: int, jobs: int) -> None:
            for job in itertools.islice(waiting[number], jobs):
                running[self._submit(job)] = number

        for number in range(len(queues)):
            start(number, _SPILLS_MAX)
        while running:
            results = self.transfer.poll()
            if not results and not self.transfer.wait(min(running), _TIMEOUT_S):
                raise RuntimeError(f"no end within {_TIMEOUT_S:.0f} s")
            for result in results:
                if not result.done:
                    raise RuntimeError(f"a transfer failed: {result.error}")
                number = running.pop(result.graph)
                ended_s[number] = time.perf_counter() - begin_s
                start(number, 1)
        self.cpu_s = time.process_time() - cpu_s
        return ended_s

    def _publish(self, blocks: Slots) -> None:
        nobody = np.zeros((len(blocks), 2), np.uint64)
        self.tier.stored(np.ascontiguousarray(self.keys[blocks]), nobody, self.ssd_slots[blocks])

    def write(self) -> float:
        """Writes block i to a random slot of the file. Returns seconds."""
        for slot, data in zip(self.host, self.data, strict=True):
            slot[:] = data
        self.ssd_slots = self._rng.permutation(self.num_slots)
        blocks = np.arange(self.num_slots)
        (seconds,) = self._run(self._jobs(TransferType.H2LOWER, blocks, self.ssd_slots))
        self._publish(blocks)
        return seconds

    def read(self) -> float:
        """Reads all blocks in another random order, to the host slots they came from. Returns seconds."""
        for slot in self.host:
            slot.fill(0xEE)
        order = self._rng.permutation(self.num_slots)
        (seconds,) = self._run(self._jobs(TransferType.LOWER2H, order, self.ssd_slots[order]))
        return seconds

    def mixed(self) -> tuple[float, int]:
        """Reads most blocks while it writes the others again. Returns seconds until the last read, and the
        bytes that were read."""
        order = self._rng.permutation(self.num_slots)
        read, write = np.split(order, [int(_READ_SHARE * self.num_slots)])
        for block in read:
            self.host[block].fill(0xEE)
        seconds, _ = self._run(
            self._jobs(TransferType.LOWER2H, read, self.ssd_slots[read]),
            self._jobs(TransferType.H2LOWER, write, self.ssd_slots[write]),
        )
        self._publish(write)
        return seconds, len(read) * self.slot_bytes

    def check(self, report: Report, flip: bool) -> None:
        if flip:
            self.host[self.num_slots // 2][-1] ^= 1
        for slot, data in zip(self.host, self.data, strict=True):
            report.check_bytes("bytes after reading", slot, data)


@dataclass(frozen=True)
class Yardstick:
    """What fio made of it, without its own start."""

    read_gib_s: float
    write_gib_s: float
    cpu_s_per_gb: float


def fio(bench: Bench, mode: str, io_depth: int) -> Yardstick:
    """Every I/O of the slots' part of the file, in random order."""
    total_bytes = bench.num_slots * bench.slot_bytes
    output = run_json(
        [
            "fio",
            "--name=blocks",
            f"--filename={bench.file}",
            f"--rw={mode}",
            f"--rwmixread={100 * _READ_SHARE:.0f}",
            f"--bs={bench.slot_bytes // len(bench.layers)}",
            f"--offset={_core.SSD_SLOTS_OFFSET}",
            f"--size={total_bytes}",
            f"--iodepth={io_depth}",
            "--ioengine=io_uring",
            "--direct=1",
            f"--loops={_FIO_LOOPS}",
            "--overwrite=1",
            "--allow_file_create=0",
            "--invalidate=0",
            "--output-format=json",
        ]
    )
    (job,) = output["jobs"]
    read, write = job["read"], job["write"]
    moved = read["io_bytes"] + write["io_bytes"]
    if moved != total_bytes * _FIO_LOOPS:
        raise RuntimeError(f"fio moved {moved} bytes, not {_FIO_LOOPS} times {total_bytes}")
    seconds = max(read["runtime"], write["runtime"]) / 1000
    cpu_s = seconds * (job["usr_cpu"] + job["sys_cpu"]) / 100
    return Yardstick(read["bw_bytes"] / GIB, write["bw_bytes"] / GIB, cpu_s / (moved / 1e9))


def measure(bench: Bench, report: Report, repeats: int, io_depth: int, flip: bool) -> dict[str, Any]:
    """Writes, reads and mixes ``repeats`` times in turn with fio. Returns medians of speeds and ratios."""
    total_bytes = bench.num_slots * bench.slot_bytes
    rows: list[dict[str, float]] = []
    for repeat in range(repeats + 1):
        row: dict[str, float] = {}
        # fio writes first: its writes destroy what we are about to read back.
        mixed, write = fio(bench, "randrw", io_depth), fio(bench, "randwrite", io_depth)
        row["write_gib_s"] = total_bytes / GIB / bench.write()
        row["write_cpu_s_per_gb"] = bench.cpu_s / (total_bytes / 1e9)
        # With reads, who goes first changes from round to round.
        read = fio(bench, "randread", io_depth) if repeat % 2 else None
        row["read_gib_s"] = total_bytes / GIB / bench.read()
        row["read_cpu_s_per_gb"] = bench.cpu_s / (total_bytes / 1e9)
        bench.check(report, flip and repeat == 1)
        read = read or fio(bench, "randread", io_depth)
        seconds, read_bytes = bench.mixed()
        bench.check(report, False)
        row["mixed_read_gib_s"] = read_bytes / GIB / seconds
        row["fio_write_gib_s"], row["fio_read_gib_s"] = write.write_gib_s, read.read_gib_s
        row["fio_mixed_read_gib_s"] = mixed.read_gib_s
        row["fio_read_cpu_s_per_gb"], row["fio_write_cpu_s_per_gb"] = read.cpu_s_per_gb, write.cpu_s_per_gb
        for name in ("write", "read", "mixed_read"):
            row[f"{name}_ratio_fio"] = row[f"{name}_gib_s"] / row[f"fio_{name}_gib_s"]
        if repeat:  # in the first round the file's extents are written for the first time
            rows.append(row)
    out: dict[str, Any] = {name: median([row[name] for row in rows]) for name in rows[0]}
    out["spread"] = spread([row["fio_read_gib_s"] for row in rows])
    return out


def summarize(report: Report) -> None:
    uring = [row for row in report.rows if row["io_engine"] == IoEngine.IO_URING.value]
    for row in report.rows:
        tag = "" if row["io_engine"] == IoEngine.IO_URING.value else f"_{row['io_engine']}"
        size = f"{row['slot_kib']}k" if row["layers"] == 1 else f"{row['slot_kib']}k_by_layer"
        for name in ("read_ratio_fio", "write_ratio_fio", "mixed_read_ratio_fio"):
            report.results[f"{name}_{size}{tag}"] = row[name]
    for prefix, sliced in (("", False), ("slice_", True)):
        rows = [row for row in uring if (row["layers"] > 1) == sliced]
        for name in ("read_ratio_fio", "write_ratio_fio"):
            report.results[f"{prefix}{name}"] = median([row[name] for row in rows])
            report.goals[f"{prefix}{name}"] = "≥ 0.90" if sliced else "≥ 0.95"
        for name in ("read_cpu_s_per_gb", "write_cpu_s_per_gb"):
            report.results[f"{prefix}{name}"] = median([row[name] for row in rows])
            report.results[f"fio_{prefix}{name}"] = median([row[f"fio_{name}"] for row in rows])
    whole = [row["mixed_read_ratio_fio"] for row in uring if row["layers"] == 1]
    report.results["mixed_read_ratio_fio"] = median(whole)
    report.goals["mixed_read_ratio_fio"] = "≥ 0.80"


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the file goes, on a disk; default: build/ here.")
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", help="Both I/O engines, a larger file, more rounds: several minutes.")
    ] = False,
    mib: Annotated[
        int | None, typer.Option(help=f"MiB of the file; default: {_MIB}, {_MIB_LONG} with --long.")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help=f"Measured rounds; default: {_REPEATS}, {_REPEATS_LONG} with --long."),
    ] = None,
    io_depth: Annotated[int, typer.Option(min=1, help="I/Os in flight, ours and fio's.")] = 64,
    flip_a_byte: FlipOption = False,
) -> None:
    """The SSD tier against fio."""
    if shutil.which("fio") is None:
        raise typer.BadParameter("this compares with fio, which is not installed: apt-get install fio")
    if smoke and long:
        raise typer.BadParameter("--smoke and --long exclude each other")
    cases, engines = _CASES, _ENGINES if smoke or long else _ENGINES[:1]
    if smoke:
        mib, repeats, cases = 16, 1, (_CASES[0], _CASES[2])
    mib = mib or (_MIB_LONG if long else _MIB)
    repeats = repeats or (_REPEATS_LONG if long else _REPEATS)
    with disk_directory(directory, "bench-ssd") as scratch:
        report = Report(
            "ssd", smoke, Machine.here(scratch), {"mib": mib, "repeats": repeats, "io_depth": io_depth}
        )
        for (slot_kib, layers), engine in itertools.product(cases, engines):
            console.print(f"slots of {slot_kib} KiB, {layers} I/Os each, {engine.value} ...")
            bench = Bench(scratch, slot_kib * 1024, layers, mib * MIB, engine, io_depth)
            try:
                row = measure(bench, report, repeats, io_depth, flip_a_byte)
            finally:
                bench.close()
            report.rows.append({"slot_kib": slot_kib, "layers": layers, "io_engine": engine.value, **row})
    columns = ["slot_kib", "layers", "io_engine"]
    for name in ("read", "write", "mixed_read"):
        columns += [f"fio_{name}_gib_s", f"{name}_gib_s", f"{name}_ratio_fio"]
    print_table("GiB/s and ratios to fio (medians)", report.rows, columns)
    summarize(report)
    report.finish(json_to)


if __name__ == "__main__":
    typer.run(main)
