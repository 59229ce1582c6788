"""A CUDA driver made of threads (csrc/testing/fake_cuda.cpp), and a rig that runs the real engine on it."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sglang_flexkv import _core

ROOT = Path(__file__).resolve().parents[2]
ALWAYS, NEVER = -1, 1 << 40  # after so many calls it fails
PIN_CHUNK_BYTES = 64 << 20
MEMORY_ERROR = 719  # any code that a driver returns

Bytes = np.ndarray


@functools.cache
def build(version: int) -> Path:
    """The stand-in of a driver of this CUDA version. It is compiled when it is first asked for, and kept."""
    compiler = shutil.which("g++")
    assert compiler is not None
    # A sanitized core needs a driver that is sanitized, too, or it does not see what the driver orders.
    flags = os.environ.get("FAKE_CUDA_FLAGS", "-O2").split()
    source = ROOT / "csrc" / "testing" / "fake_cuda.cpp"
    command = [compiler, "-std=c++20", *flags, f"-DFAKE_CUDA={version}", "-shared", "-fPIC", "-pthread"]
    command += [f"-I{ROOT / 'csrc'}", str(source), "-o"]
    made_of = hashlib.sha256(repr(command).encode())
    for path in (source, *sorted((ROOT / "csrc").rglob("*.hpp"))):
        made_of.update(path.read_bytes())
    directory = ROOT / "build" / "fake_cuda" / made_of.hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / f"libcuda-{version}.so.1"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            new = library.with_suffix(".new")
            subprocess.run([*command, str(new)], check=True)
            new.rename(library)
    return library


class FakeCuda:
    """The stand-in from the side of a caller that is not the engine: PyTorch, a forward, a saboteur."""

    def __init__(self, library: Path, version: int) -> None:
        self.library, self.version = str(library), version
        self._c = ctypes.CDLL(self.library)
        self._c.fake_calls.restype = ctypes.c_int64
        self._c.fake_record.restype = ctypes.c_void_p
        self._c.fake_trace.restype = ctypes.c_size_t
        self._c.fake_registrations_when_timed.restype = ctypes.c_int64
        self.dams: list[Dam] = []

    def _call(self, name: str, *arguments: object) -> None:
        assert getattr(self._c, name)(*arguments) == 0, name

    def reset(self, seed: int = 1, delay_us: int = 0) -> None:
        self._c.fake_reset(ctypes.c_uint(seed), ctypes.c_int(delay_us))

    def fail(self, call: str, after: int, code: int = MEMORY_ERROR) -> None:
        """The call fails when it has been made ``after`` more times, and from then on."""
        self._c.fake_fail(call.encode(), ctypes.c_int64(after), ctypes.c_int(code))

    def queues(self, count: int) -> None:
        """Streams that are created from now on share so many hardware queues."""
        self._c.fake_queues(count)

    def speeds(self, piece_us: float) -> None:
        """How fast copies are for who measures them: a piece's price for a copy engine."""
        self._c.fake_speeds(ctypes.c_double(piece_us))

    def capture(self, on: bool) -> None:
        """Somebody captures a graph from now on, which a call of other threads may lose; or nobody does."""
        self._c.fake_capture(ctypes.c_int(on))

    def uses_of_device(self, number: int) -> int:
        """How often the context of this device was taken and not given back."""
        return self._c.fake_uses_of_device(ctypes.c_int(number))

    @property
    def registrations_when_timed(self) -> int:
        """How many registrations of memory had begun when somebody last asked for the time between events."""
        return self._c.fake_registrations_when_timed()

    def registration(self, ms: int) -> None:
        """To register a chunk of memory takes so long, and as long nobody may begin with another one."""
        self._c.fake_registration(ctypes.c_int(ms))

    def first_launch(self, stream: int) -> None:
        """Launches a kernel that has to be loaded first, which takes until the device has nothing to do."""
        self._c.fake_first_launch(ctypes.c_void_p(stream))

    def calls(self, call: str) -> int:
        return self._c.fake_calls(call.encode())

    def forget_calls(self) -> None:
        self._c.fake_forget_calls()

    def attribute(self, attribute: int, value: int) -> None:
        self._c.fake_attribute(attribute, value)

    def trace(self) -> list[int]:
        """What streams have done since the last reset: the address of each buffer that a copy wrote to, and 0
        for an event that others wait for."""
        out = (ctypes.c_uint64 * (1 << 16))()
        count = self._c.fake_trace(out, ctypes.c_size_t(len(out)))
        assert count <= len(out)
        return list(out[:count])

    @property
    def violations(self) -> str:
        text = ctypes.create_string_buffer(4096)
        self._c.fake_violations(text, ctypes.c_size_t(len(text)))
        return text.value.decode()

    def allocate(self, num_bytes: int) -> tuple[int, Bytes]:
        """Memory on the device: its address, and a view of it past all streams."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        view = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address.value))
        return address.value, view

    @property
    def context(self) -> int | None:
        """The one that is current in the calling thread."""
        handle = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(handle))
        return handle.value

    @context.setter
    def context(self, handle: int | None) -> None:
        self._call("cuCtxSetCurrent", ctypes.c_void_p(handle))

    def adopt(self, address: int, num_bytes: int) -> None:
        """Memory of the caller's plays the device's, until ``let_go``."""
        self._c.fake_adopt(ctypes.c_uint64(address), ctypes.c_size_t(num_bytes))

    def let_go(self, address: int) -> None:
        self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def stream(self) -> int:
        handle = ctypes.c_void_p()
        self._call("cuStreamCreateWithPriority", ctypes.byref(handle), 1, 0)
        assert handle.value is not None
        return handle.value

    def end_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def synchronize(self, stream: int, timeout_s: float = 20.0) -> None:
        """Waits for a stream, and fails instead of hanging."""
        deadline = time.monotonic() + timeout_s
        while not self._c.fake_is_idle(ctypes.c_void_p(stream)):
            assert time.monotonic() < deadline, "a stream hangs"
            time.sleep(0.001)

    def record(self, stream: int) -> int:
        """A new event, behind all that is on the stream."""
        return self._c.fake_record(ctypes.c_void_p(stream))

    def read(self, stream: int, address: int, num_bytes: int) -> Bytes:
        """What a forward finds at an address; filled in when the stream gets there."""
        out = np.zeros(num_bytes, dtype=np.uint8)
        self._c.fake_read(
            ctypes.c_void_p(stream),
            out.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(address),
            ctypes.c_size_t(num_bytes),
        )
        return out

    def write(self, stream: int, address: int, values: np.ndarray) -> None:
        """What a forward, or an allocator on the device, computes when the stream gets there."""
        self._c.fake_write(
            ctypes.c_void_p(stream),
            ctypes.c_uint64(address),
            values.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(values.nbytes),
        )

    def fill(self, stream: int, address: int, value: int, num_bytes: int) -> None:
        self._c.fake_fill(
            ctypes.c_void_p(stream), ctypes.c_uint64(address), value, ctypes.c_size_t(num_bytes)
        )


class Dam:
    """Holds a stream up until it is opened."""

    def __init__(self, cuda: FakeCuda, stream: int) -> None:
        self._cuda, self._word = cuda, ctypes.c_uint32(0)
        cuda._c.fake_hold(ctypes.c_void_p(stream), ctypes.byref(self._word))
        cuda.dams.append(self)  # the stream looks at the word for as long as it likes

    def open(self) -> None:
        self._cuda._c.fake_let_go(ctypes.byref(self._word))


class Pool:
    """A group's rows on the device, and its host pool.

    Args:
        row_bytes: of each buffer of a layer, and of a token: two for MHA, one for MLA.
        row_padding: bytes between rows that belong to somebody else.
        tokens_per_row: of every buffer of a layer, or of each; more than one: it is laid out by page.
        buffers_of: how many of the buffers a layer has; None: every layer has all of them.
        gate_layers: which layer of a gate each layer is; None: the one of the same number.
    """

    def __init__(
        self,
        cuda: FakeCuda,
        *,
        tokens: int = 4,
        layers: int = 3,
        row_bytes: Sequence[int] = (96, 96),
        row_padding: int = 0,
        tokens_per_row: int | Sequence[int] = 1,
        buffers_of: Sequence[int] | None = None,
        device_blocks: int = 24,
        host_slots: int = 16,
        gate_layers: Sequence[int] | None = None,
    ) -> None:
        self.cuda, self.tokens_per_block, self.num_layers = cuda, tokens, layers
        self.num_blocks, self.group = device_blocks, 0
        self.gate_layers = list(range(layers) if gate_layers is None else gate_layers)
        per_row = [tokens_per_row] * len(row_bytes) if isinstance(tokens_per_row, int) else tokens_per_row
        self._tokens_per_row = list(per_row)
        rng = np.random.default_rng(5)
        self.addresses: list[list[int]] = []
        self.device: list[list[Bytes]] = []  # [layer][buffer]: [row, stride]
        self.row_bytes = [size * n for size, n in zip(row_bytes, per_row, strict=True)]
        for number in buffers_of or [len(row_bytes)] * layers:
            self.addresses.append([])
            self.device.append([])
            for size, n in list(zip(self.row_bytes, per_row, strict=True))[:number]:
                num_rows = device_blocks * tokens // n
                address, view = cuda.allocate(num_rows * (size + row_padding))
                view[:] = rng.integers(0, 256, len(view), dtype=np.uint8)
                self.addresses[-1].append(address)
                self.device[-1].append(view.reshape(num_rows, size + row_padding))
        self.layout = _core.BlockLayout(
            [
                [
                    _core.DeviceBuffer(address, len(buffer), size, size + row_padding, n)
                    for address, buffer, size, n in zip(
                        addresses, buffers, self.row_bytes, per_row, strict=False
                    )
                ]
                for addresses, buffers in zip(self.addresses, self.device, strict=True)
            ],
            tokens,
        )
        self.slot_bytes = -(-self.layout.block_bytes // 4096) * 4096
        self.block_bytes = self.layout.block_bytes
        self.host = _core.HostPool(host_slots, self.slot_bytes)
        for slot in range(0, host_slots, max(1, host_slots // 64)):
            self.host.slot_view(slot)[:] = rng.integers(0, 256, self.slot_bytes, dtype=np.uint8)

    def wait_until_pinned(self, num_bytes: int | None = None) -> None:
        deadline = time.monotonic() + 20
        to_pin = self.host.total_bytes if num_bytes is None else num_bytes
        while self.host.pinned_bytes < to_pin:
            assert time.monotonic() < deadline, "the pool was never pinned"
            time.sleep(0.001)

    def token_slots(self, *blocks: int) -> np.ndarray:
        per_block = self.tokens_per_block
        return np.concatenate([np.arange(b * per_block, (b + 1) * per_block) for b in blocks]).astype(
            np.int64
        )

    @property
    def by_page(self) -> bool:
        """Whether some rows are of several tokens."""
        return max(self._tokens_per_row) > 1

    def rows(self, block: int) -> np.ndarray:
        """Of a block in buffers with a token per row."""
        return self.token_slots(block)

    def _parts(self, pool: list[list[Bytes]], rows: np.ndarray, layers: range | None) -> Iterator[Bytes]:
        """Each row of a block in each buffer, in the order in which a host slot has them."""
        for layer in layers or range(self.num_layers):
            for buffer, size, n in zip(pool[layer], self.row_bytes, self._tokens_per_row, strict=False):
                for row in rows[::n] // n:
                    yield buffer[row, :size]

    def runs(self, rows: np.ndarray, layer: int) -> Iterator[tuple[int, int]]:
        """Where a layer of a block of these rows (tokens) is on the device: the address and the bytes of each
        run, in the order in which a host slot has them."""
        buffers = zip(
            self.addresses[layer], self.device[layer], self.row_bytes, self._tokens_per_row, strict=False
        )
        for address, buffer, size, n in buffers:
            of_buffer, stride = rows[::n] // n, buffer.shape[1]
            if stride == size and (np.diff(of_buffer) == 1).all():
                yield address + int(of_buffer[0]) * stride, len(of_buffer) * size
            else:
                yield from ((address + int(row) * stride, size) for row in of_buffer)

    def bytes_of(self, rows: np.ndarray, layers: range | None = None) -> Bytes:
        """What a host slot must hold for a block of these rows (tokens), as the naive copy has it."""
        return np.concatenate(list(self._parts(self.device, rows, layers)))

    def slot(self, slot: int) -> Bytes:
        return self.host.slot_view(slot)[: self.block_bytes]

    def expect_loaded(self, expected: list[list[Bytes]], slots: np.ndarray, rows: list[np.ndarray]) -> None:
        """Writes slots into a copy of the pool, one row after another."""
        for slot, block_rows in zip(slots, rows, strict=True):
            held, at = self.slot(int(slot)), 0
            for part in self._parts(expected, block_rows, None):
                part[:] = held[at : at + len(part)]
                at += len(part)

    def copy_of_device(self) -> list[list[Bytes]]:
        return [[buffer.copy() for buffer in layer] for layer in self.device]

    def free(self) -> None:
        del self.host, self.device
        for address in (a for layer in self.addresses for a in layer):
            self.cuda.free(address)


class Rig(Pool):
    """A device pool, a host pool and the engine; further groups may be added.

    Args:
        pinned_chunks: so many pieces of the host pool can be pinned; None: all.
        wait: until they are.
        cuda_device: the device's number.
        pool: see ``Pool``.
    """

    def __init__(
        self,
        cuda: FakeCuda,
        *,
        pinned: bool = True,
        pinned_chunks: int | None = None,
        wait: bool = True,
        cuda_device: int = 0,
        **pool: Any,
    ) -> None:
        super().__init__(cuda, **pool)
        self._slots_on_device: dict[int, int] = {}  # by stream
        self.pools: list[Pool] = [self]  # by group
        if not pinned:
            cuda.fail("cuMemHostRegister_v2", ALWAYS)
        elif pinned_chunks is not None:
            cuda.fail("cuMemHostRegister_v2", pinned_chunks)
        self.engine = _core.TransferEngine(
            self.layout,
            self.host,
            copy_threads=1,
            cuda_device=cuda_device,
            lower_tiers=["DISK"],
            cuda_library=cuda.library,
        )
        if pool.get("gate_layers") is not None:
            self.engine.set_gate_layers(self.gate_layers)
        if pinned and wait:
            self.wait_until_pinned(pinned_chunks and pinned_chunks * PIN_CHUNK_BYTES)
        cuda.forget_calls()  # of setting up

    def add_group(self, *, pinned: bool = True, **pool: Any) -> Pool:
        """A further group of the engine's. To be pinned, what was registered before must have been, too."""
        added = Pool(self.cuda, **pool)
        if not pinned:
            self.cuda.fail("cuMemHostRegister_v2", ALWAYS)
        gate_layers = added.gate_layers if pool.get("gate_layers") is not None else []
        added.group = self.engine.add_group(added.layout, added.host, gate_layers)
        self.pools.append(added)
        if pinned:
            added.wait_until_pinned()
        self.cuda.forget_calls()
        return added

    def awaited_slots(self, stream: int, token_slots: np.ndarray) -> _core.AwaitedSlots:
        """Token slots as an allocator on the device has them: computed by this stream, in memory that it
        gives to the next one who computes something there."""
        if stream not in self._slots_on_device:
            self._slots_on_device[stream] = self.cuda.allocate(1 << 20)[0]
        address = self._slots_on_device[stream]
        self.cuda.write(stream, address, token_slots)
        awaited = self.engine.read_slots(address, len(token_slots), stream)
        self.cuda.fill(stream, address, 0xFF, token_slots.nbytes)
        return awaited

    def finish(self, graph: int, timeout_s: float = 20.0) -> _core.GraphResult:
        """The result of a graph, which comes once."""
        assert self.engine.wait(graph, timeout_s), "a graph hangs"
        results = [result for result in self.engine.poll() if result.graph == graph]
        assert len(results) == 1
        return results[0]

    def run(self, *ops: _core.OpSpec, **options: object) -> _core.GraphResult:
        return self.finish(self.engine.submit(list(ops), **options))

    def close(self) -> None:
        del self.engine
        for pool in self.pools:
            pool.free()
        for address in self._slots_on_device.values():
            self.cuda.free(address)
