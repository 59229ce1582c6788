"""SSD tier against fio: whole blocks written and read with O_DIRECT.

    python benchmarks/bench_ssd.py [--smoke] [--json FILE|-] [--dir DIRECTORY]

Blocks go from the CPU tier's slots to random slots of the SSD tier's file and back (H2DISK, DISK2H) through
the engine, in graphs as large as those of a spill and as many at a time. ``fio`` does the same I/O in turn
with us: same file, same block size, same queue depth, every block in random order, io_uring, direct. It
goes over the file several times, so that the first touch of its own buffers does not count. Ratios are of
neighbours in time. Every byte is compared after it was read.
"""

from __future__ import annotations

import itertools
import shutil
import time
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
    median_ratio,
    print_table,
    random_bytes,
    run_json,
    spread,
)

from sglang_flexkv.common.config import CacheConfig, IoEngine
from sglang_flexkv.common.storage import DeviceBuffers
from sglang_flexkv.common.transfer import Slots, TransferOp, TransferOpGraph, TransferType
from sglang_flexkv.kvtask import _SPILL_BYTES_MAX, _SPILLS_MAX
from sglang_flexkv.storage.storage_engine import StorageEngine
from sglang_flexkv.transfer.transfer_engine import TransferEngine

_SLOT_KIB: tuple[int, ...] = (64, 1024, 4096)
_FIO_LOOPS = 3
_TIMEOUT_S = 300.0
_ENGINES = (IoEngine.IO_URING, IoEngine.THREADS)


class Bench:
    """One file of whole slots, a CPU tier of the same size, and the data plane between them.

    Attributes:
        data: what the blocks hold, uint8 [blocks, slot bytes].
    """

    def __init__(
        self, directory: Path, slot_bytes: int, total_bytes: int, engine: IoEngine, io_depth: int
    ) -> None:
        self.num_slots, self.slot_bytes = total_bytes // slot_bytes, slot_bytes
        config = CacheConfig(
            tokens_per_block=1,
            num_cpu_blocks=self.num_slots,
            enable_ssd=True,
            num_ssd_blocks=self.num_slots,
            ssd_cache_dir=(directory,),
            io_engine=engine,
            io_depth=io_depth,
        )
        device = DeviceBuffers([[torch.zeros((1, slot_bytes), dtype=torch.uint8)]], tokens_per_row=1)
        self.storage = StorageEngine(config, device)
        self.transfer = TransferEngine(config, self.storage)
        if not self.transfer.io_engine.startswith(engine.value):
            raise RuntimeError(f"asked for {engine.value}, got {self.transfer.io_engine}")
        (self.file,) = directory.glob("*.slots")
        self.host = [self.storage.host.slot_view(slot) for slot in range(self.num_slots)]
        self.data = random_bytes((self.num_slots, slot_bytes), 1)
        self._rng = np.random.default_rng(2)
        self.ssd_slots = np.arange(self.num_slots)

    def close(self) -> None:
        self.transfer.close()
        self.storage.close()

    def _run(self, kind: TransferType, host: Slots, ssd: Slots) -> float:
        """Seconds to move all slots, a few graphs at a time."""
        per_graph = max(1, _SPILL_BYTES_MAX // self.slot_bytes)
        src, dst = (host, ssd) if kind is TransferType.H2DISK else (ssd, host)
        begin_s = time.perf_counter()
        starts = iter(range(0, self.num_slots, per_graph))
        failed: list[str] = []

        def submit(begin: int) -> int:
            graph = TransferOpGraph()
            part = slice(begin, begin + per_graph)
            positions = np.arange(len(src[part]))
            graph.add_transfer_op(
                TransferOp(kind, positions, src_block_ids=src[part], dst_block_ids=dst[part])
            )
            return self.transfer.submit(graph)

        running = {submit(begin) for begin in itertools.islice(starts, _SPILLS_MAX)}
        while running:
            if not self.transfer.wait(min(running), _TIMEOUT_S):
                raise RuntimeError(f"{kind.name} did not end within {_TIMEOUT_S:.0f} s")
            for result in self.transfer.poll():
                running.discard(result.graph)
                if not result.done:
                    failed.append(result.error)
                running.update(submit(begin) for begin in itertools.islice(starts, 1))
        seconds = time.perf_counter() - begin_s
        if failed:
            raise RuntimeError(f"{kind.name} failed: {failed[0]}")
        return seconds

    def write(self) -> float:
        """Writes block i to a random slot of the file. Returns seconds."""
        for slot, data in zip(self.host, self.data, strict=True):
            slot[:] = data
        self.ssd_slots = self._rng.permutation(self.num_slots)
        return self._run(TransferType.H2DISK, np.arange(self.num_slots), self.ssd_slots)

    def read(self) -> float:
        """Reads all blocks in another random order, to the host slots they came from. Returns seconds."""
        for slot in self.host:
            slot.fill(0xEE)
        order = self._rng.permutation(self.num_slots)
        return self._run(TransferType.DISK2H, order, self.ssd_slots[order])

    def check(self, report: Report, flip: bool) -> None:
        if flip:
            self.host[self.num_slots // 2][-1] ^= 1
        for slot, data in zip(self.host, self.data, strict=True):
            report.check_bytes("bytes after reading", slot, data)


def fio(file: Path, *, write: bool, slot_bytes: int, total_bytes: int, io_depth: int) -> float:
    """Seconds fio takes for every block of the file, in random order, without its own start."""
    output = run_json(
        [
            "fio",
            "--name=blocks",
            f"--filename={file}",
            f"--rw={'randwrite' if write else 'randread'}",
            f"--bs={slot_bytes}",
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
    side = output["jobs"][0]["write" if write else "read"]
    if side["io_bytes"] != total_bytes * _FIO_LOOPS:
        raise RuntimeError(f"fio moved {side['io_bytes']} bytes, not {_FIO_LOOPS} times {total_bytes}")
    return float(total_bytes / side["bw_bytes"])


def measure(bench: Bench, report: Report, repeats: int, io_depth: int, flip: bool) -> dict[str, Any]:
    """Writes and reads the file ``repeats`` times in turn with fio. Returns ratios, speeds and spreads."""
    total_bytes = bench.num_slots * bench.slot_bytes

    def yardstick(*, write: bool) -> float:
        return fio(
            bench.file, write=write, slot_bytes=bench.slot_bytes, total_bytes=total_bytes, io_depth=io_depth
        )

    times: dict[str, list[float]] = {"fio_write": [], "write": [], "fio_read": [], "read": []}
    for repeat in range(repeats + 1):
        # fio writes first: its writes would destroy what we are about to read back.
        fio_write_s = yardstick(write=True)
        write_s = bench.write()
        # With reads, who goes first changes from round to round.
        fio_read_s = yardstick(write=False) if repeat % 2 else 0.0
        read_s = bench.read()
        bench.check(report, flip and repeat == 1)
        fio_read_s = fio_read_s or yardstick(write=False)
        if repeat == 0:
            continue  # the file's extents are written for the first time
        for name, seconds in zip(times, (fio_write_s, write_s, fio_read_s, read_s), strict=True):
            times[name].append(seconds)
    row: dict[str, Any] = {}
    for name, taken in times.items():
        row[f"{name}_gib_s"] = total_bytes / GIB / median(taken)
        row[f"{name}_spread"] = spread(taken)
    for name in ("write", "read"):
        row[f"{name}_ratio_fio"] = median_ratio(times[f"fio_{name}"], times[name])
    return row


def summarize(report: Report) -> None:
    for name in ("read_ratio_fio", "write_ratio_fio"):
        for row in report.rows:
            tag = "" if row["io_engine"] == IoEngine.IO_URING.value else f"_{row['io_engine']}"
            report.results[f"{name}_{row['slot_kib']}k{tag}"] = row[name]
        uring = [row[name] for row in report.rows if row["io_engine"] == IoEngine.IO_URING.value]
        report.results[name] = median(uring)
        report.results[f"{name}_worst"] = min(uring)
        report.goals.update({name: "≥ 0.80", f"{name}_worst": "≥ 0.80"})


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the file goes, on a disk; default: build/ here.")
    ] = None,
    mib: Annotated[int, typer.Option(help="MiB of the file.")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    io_depth: Annotated[int, typer.Option(min=1, help="I/Os in flight, ours and fio's.")] = 64,
    flip_a_byte: FlipOption = False,
) -> None:
    """The SSD tier against fio."""
    if shutil.which("fio") is None:
        raise typer.BadParameter("this compares with fio, which is not installed: apt-get install fio")
    sizes = _SLOT_KIB
    if smoke:
        mib, repeats, sizes = 16, 1, _SLOT_KIB[:2]
    with disk_directory(directory, "bench-ssd") as scratch:
        report = Report(
            "ssd", smoke, Machine.here(scratch), {"mib": mib, "repeats": repeats, "io_depth": io_depth}
        )
        for slot_kib, engine in itertools.product(sizes, _ENGINES):
            console.print(f"slots of {slot_kib} KiB, {engine.value} ...")
            bench = Bench(scratch, slot_kib * 1024, mib * MIB, engine, io_depth)
            try:
                row = measure(bench, report, repeats, io_depth, flip_a_byte)
            finally:
                bench.close()
            report.rows.append({"slot_kib": slot_kib, "io_engine": engine.value, **row})
    columns = ["slot_kib", "io_engine"]
    columns += [f"{name}_gib_s" for name in ("fio_write", "write", "fio_read", "read")]
    print_table(
        "GiB/s and ratios to fio (medians)", report.rows, [*columns, "write_ratio_fio", "read_ratio_fio"]
    )
    summarize(report)
    report.finish(json_to)


if __name__ == "__main__":
    typer.run(main)
