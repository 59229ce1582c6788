"""Recovery: how long a start takes until an SSD tier of a million blocks is in the index again.

    python benchmarks/bench_recovery.py [--smoke] [--json FILE|-] [--dir DIRECTORY]

The journal is written by the store itself, group by group and with compactions, and closed; then the store is
opened, replayed and put into an index, as at the start of a server, several times. The slots hold no data:
what is measured never reads it. Every key is looked up afterwards. The page cache of the journal is dropped
first.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import JsonOption, Machine, Report, SmokeOption, console, disk_directory, median, print_table

from sglang_flexkv import _core
from sglang_flexkv.common.block import make_namespace
from sglang_flexkv.storage.ssd_store import SsdStore

_SLICES = 8
_BATCH = 4096


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    directory: Annotated[Path | None, typer.Option("--dir", help="Where the files go, on a disk.")] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks in the store.")] = 1_000_000,
    repeats: Annotated[int, typer.Option(min=1, help="Measured starts.")] = 5,
) -> None:
    """Replaying the journal of a large SSD tier."""
    if smoke:
        blocks, repeats = 10_000, 1
    rng = np.random.default_rng(1)
    keys = rng.integers(1, 2**63, (blocks, 2), dtype=np.uint64)
    parents = np.zeros_like(keys)
    parents[1:] = keys[:-1]
    parents[::256] = 0  # conversations of 256 blocks

    with disk_directory(directory, "bench-recovery") as scratch:
        report = Report("recovery", smoke, Machine.here(scratch), {"blocks": blocks, "slices": _SLICES})

        def open_store() -> SsdStore:
            return SsdStore(
                (scratch,), blocks, [4096] * _SLICES, "rank0", namespace=make_namespace({"bench": "recovery"})
            )

        store = open_store()
        slots = rng.permutation(blocks)
        for begin in range(0, blocks, _BATCH):
            part = slice(begin, begin + _BATCH)
            store.core.publish(keys[part], parents[part], slots[part])
        if not store.core.sync(60.0):
            raise RuntimeError(f"the journal was not written: {store.core.error}")
        store.close()
        (journal,) = scratch.glob("*.journal")
        for number in range(repeats):
            fd = os.open(journal, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
            begin_s = time.perf_counter()
            store = open_store()
            opened_s = time.perf_counter()
            index = _core.PrefixIndex([1, blocks])
            found_keys, found_parents, found_slots = store.core.take_recovered()
            index.restore(1, found_keys, found_parents, found_slots.astype(np.int32))
            end_s = time.perf_counter()
            report.rows.append(
                {
                    "start": number,
                    "replay_s": opened_s - begin_s,
                    "index_s": end_s - opened_s,
                    "s": end_s - begin_s,
                }
            )
            report.check_bytes("bytes of masks of all keys", index.match(keys), np.full(blocks, 2, np.uint8))
            store.close()
        report.results["recovery_s"] = median([row["s"] for row in report.rows])
        report.results["journal_mb"] = journal.stat().st_size / 1e6
        report.goals["recovery_s"] = "≤ 2"
    print_table("seconds", report.rows, ["start", "replay_s", "index_s", "s"])
    console.print(f"{blocks:,} blocks, {_SLICES} checksums each")
    report.finish(json_to)


if __name__ == "__main__":
    typer.run(main)
