"""A store, host memory and a transfer engine, bare: for tests that open and break SSD files by the hundred.

No torch: a child that is forked from here starts in a millisecond.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sglang_flexkv import _core

T = _core.TransferType
NAMESPACE = b"namespace of rig"
# What takes so long hangs, however busy the machine is. A disk that is to hang does so for longer, or until
# its faults are cleared.
TIMEOUT_S = 300.0
HANG_S = 2 * TIMEOUT_S

Keys = npt.NDArray[np.uint64]


def memory_directory() -> Iterator[Path]:
    """A directory where a sync costs nothing, if there is one: these tests sync thousands of times."""
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=parent, prefix="flexkv-test-") as name:
        yield Path(name)


def run_until_killed(program: str, *arguments: str) -> None:
    """Runs a program in a process of its own until it prints ``True``, and kills it while it waits."""
    source = textwrap.dedent(program) + "\nimport sys\nsys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL


def key_of(numbers: Iterable[int]) -> Keys:
    """Keys of blocks that have a number. Never zero, which stands for no key."""
    n = np.fromiter(numbers, dtype=np.uint64)
    return np.stack([n + np.uint64(1), n * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(77)], axis=1)


def numbers_of(keys: Keys) -> list[int]:
    return [int(n) - 1 for n in keys[:, 0]]


def content_of(number: int, size: int) -> npt.NDArray[np.uint8]:
    """The bytes that a block has, and no other: what is served can be checked without a record of it."""
    words = np.arange(size // 8, dtype=np.uint64) + np.uint64(number) * np.uint64(1 << 20)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(29)
    return words.view(np.uint8)


def slots_of(slots: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.asarray(slots, dtype=np.int64)


class Memory:
    """Host memory with one slot for each SSD slot, and an engine to put stores under."""

    def __init__(self, num_slots: int, num_slices: int, slice_bytes: int) -> None:
        self.num_slots, self.slot_bytes = num_slots, num_slices * slice_bytes
        self._device = np.zeros((num_slices, slice_bytes), dtype=np.uint8)
        layout = _core.BlockLayout(
            [[_core.DeviceBuffer(row.ctypes.data, 1, slice_bytes, slice_bytes)] for row in self._device], 1
        )
        self.slice_bytes = _core.slice_bytes(layout, self.slot_bytes)
        assert self.slice_bytes == [slice_bytes] * num_slices
        self.host = _core.HostPool(num_slots, self.slot_bytes)
        self.engine = _core.TransferEngine(
            layout, self.host, copy_threads=1, cuda_device=-1, lower_tiers=["DISK"]
        )


class Rig:
    """A store over files in a directory, attached to an engine.

    Attributes:
        found: slot -> number of the blocks that the files were said to hold.
    """

    def __init__(
        self,
        directory: Path,
        memory: Memory,
        *,
        disk: _core.Disk | None = None,
        io_engine: _core.IoEngineKind = _core.IoEngineKind.THREADS,
        namespace: bytes = NAMESPACE,
        fresh_on_mismatch: bool = False,
        commit_interval_s: float = 0.002,
    ) -> None:
        self.memory = memory
        self.store = _core.SsdStore(
            [(str(directory), str(directory / "slots"), str(directory / "journal"))],
            namespace,
            memory.num_slots,
            memory.slice_bytes,
            "a rig",
            fresh_on_mismatch,
            commit_interval_s,
            disk or _core.Disk(),
        )
        keys, _, slots = self.store.take_recovered()
        self.found = dict(zip(slots.tolist(), numbers_of(keys), strict=True))
        memory.engine.attach(1, _core.SsdTier(self.store, io_engine, 8))

    def start_write(self, blocks: dict[int, int]) -> int:
        """Starts to write blocks, slot -> number; the graph."""
        for slot, number in blocks.items():
            self.memory.host.slot_view(slot)[:] = content_of(number, self.memory.slot_bytes)
        slots = slots_of([*blocks])
        return self.memory.engine.submit(
            [_core.OpSpec(T.H2LOWER, slots, slots, keys=key_of(blocks.values()))]
        )

    def end(self, graph: int) -> _core.GraphResult:
        assert self.memory.engine.wait(graph, TIMEOUT_S)
        (result,) = (each for each in self.memory.engine.poll() if each.graph == graph)
        return result

    def publish(self, blocks: dict[int, int]) -> None:
        keys = key_of(blocks.values())
        self.store.publish(keys, np.zeros_like(keys), slots_of([*blocks]))

    def write(self, blocks: dict[int, int]) -> bool:
        """Writes and publishes blocks, slot -> number. False, and nothing published, if the disk failed."""
        done = self.end(self.start_write(blocks)).done
        if done:
            self.publish(blocks)
        return done

    def read(self, blocks: dict[int, int] | None = None) -> tuple[set[int], set[int]]:
        """Reads blocks, those that were found if none are named.

        Returns:
            The slots that are served, with exactly the right bytes, and the slots that were found out.
        """
        blocks = self.found if blocks is None else blocks
        if not blocks:
            return set(), set()
        for slot in blocks:
            self.memory.host.slot_view(slot)[:] = 0xEE
        slots = slots_of([*blocks])
        spec = _core.OpSpec(T.LOWER2H, slots, slots, keys=key_of(blocks.values()))
        result = self.end(self.memory.engine.submit([spec]))
        (op,) = result.ops
        ok = np.ones(len(blocks), np.uint8) if result.done else op.ok
        served = {slot for slot, good in zip(blocks, ok, strict=True) if good}
        for slot in served:
            view = self.memory.host.slot_view(slot)
            wrong = "a block is served whose bytes are not what was stored under its key"
            assert np.array_equal(view, content_of(blocks[slot], self.memory.slot_bytes)), wrong
        assert op.corrupt == len(blocks) - len(served), result.error
        return served, set(blocks) - served

    def close(self) -> None:
        self.memory.engine.detach(1)
        del self.store
