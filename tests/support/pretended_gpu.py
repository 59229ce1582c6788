"""Lets PyTorch look as if it had a GPU, over the stand-in of the CUDA driver, so that what is made to measure
one can be run without one. Numbers mean nothing; bytes, streams, gates and the order of things are real.

Tensors "on the device" are CPU tensors in memory of the stand-in. PyTorch's work on a stream is done at once,
after all that the stand-in's stream holds; the rest of a stream (the engine's waits) is the stand-in's.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fake_cuda import Dam, FakeCuda
from torch.overrides import TorchFunctionMode

from sglang_flexkv import _core
from sglang_flexkv.common.storage import DeviceBuffers

_STREAM_TIMEOUT_S = 60.0


class _Stream:
    def __init__(self, gpu: PretendedGpu) -> None:
        self._gpu, self.cuda_stream = gpu, gpu.cuda.stream()

    def synchronize(self) -> None:
        deadline = time.monotonic() + _STREAM_TIMEOUT_S
        while not self._gpu.cuda._c.fake_is_idle(ctypes.c_void_p(self.cuda_stream)):
            assert time.monotonic() < deadline, "a stream hangs"
            time.sleep(0.0001)

    def wait_event(self, event: _Event) -> None:
        """Events are reached when they are recorded."""


class _Event:
    def __init__(self, gpu: PretendedGpu) -> None:
        self._gpu, self._at_s = gpu, 0.0

    def record(self, stream: _Stream | None = None) -> None:
        (stream or self._gpu.current).synchronize()
        self._at_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1000 * (end._at_s - self._at_s)


class _OnTheStandIn(TorchFunctionMode):
    """What PyTorch is told about devices."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        pinned = kwargs.pop("pin_memory", False)
        there = _is_cuda(kwargs.get("device"))
        if there:
            kwargs.pop("device")
        args = tuple(arg for arg in args if not _is_cuda(arg))
        self._gpu.current.synchronize()
        if getattr(function, "__name__", "") == "to" and not args[1:] and not kwargs:
            return args[0]  # it only named the device
        result = function(*args, **kwargs)
        return self._gpu.adopt(result, pinned) if there or pinned else result


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU, in memory of the stand-in. Who asks for its values would wait for
    all that its stream holds, so that is an error; what nobody waits for is allowed."""

    _ASYNCHRONOUS = frozenset({"detach", "contiguous", "numel", "data_ptr", "dim", "size", "__len__"})

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name == "__get__":  # of a property
            name = function.__self__.__name__  # type: ignore[attr-defined]
            if name in ("is_cuda", "device"):
                return True if name == "is_cuda" else torch.device("cuda", 0)
            assert name in ("dtype", "shape"), name
        else:
            converts = name == "to" and args[1:] and all(isinstance(arg, torch.dtype) for arg in args[1:])
            assert converts or name in cls._ASYNCHRONOUS, f"{name} waits for the device"
        return super().__torch_function__(function, types, args, kwargs or {})


@contextlib.contextmanager
def engines_on(cuda: FakeCuda) -> Iterator[None]:
    """Engines that are made meanwhile take their pool for one on the stand-in's device."""
    engine, device = _core.TransferEngine, DeviceBuffers.cuda_device

    def make_engine(*args: Any, **kwargs: Any) -> _core.TransferEngine:
        return engine(*args, **kwargs, cuda_library=cuda.library)

    _core.TransferEngine = make_engine  # type: ignore[assignment, misc]
    DeviceBuffers.cuda_device = property(lambda buffers: 0)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        _core.TransferEngine = engine  # type: ignore[misc]
        DeviceBuffers.cuda_device = device  # type: ignore[method-assign]


def _is_cuda(value: object) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


class PretendedGpu:
    """The pretence, while it is entered.

    Args:
        library: the stand-in, see ``fake_cuda.build``.
    """

    def __init__(self, library: Path, version: int) -> None:
        self.cuda = FakeCuda(library, version)
        self.cuda.reset()
        self._streams: list[_Stream] = []
        self._default = self._new_stream()
        self._of_thread = threading.local()

    @property
    def current(self) -> _Stream:
        """The stream of the calling thread."""
        return getattr(self._of_thread, "stream", self._default)

    def _new_stream(self, device: object = None) -> _Stream:
        self._streams.append(_Stream(self))
        return self._streams[-1]

    def adopt(self, tensor: torch.Tensor, pinned: bool) -> torch.Tensor:
        """The same in memory of the stand-in, which stays until the process ends."""
        num_bytes = max(1, tensor.nbytes)
        memory = ctypes.c_uint64()
        if pinned:
            self.cuda._call("cuMemHostAlloc", ctypes.byref(memory), ctypes.c_size_t(num_bytes), 3)
        else:
            self.cuda._call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(num_bytes))
        buffer = (ctypes.c_uint8 * num_bytes).from_address(memory.value)
        made = torch.frombuffer(buffer, dtype=torch.uint8)[: tensor.nbytes].view(tensor.dtype)
        return made.view(tensor.shape).copy_(tensor)

    @contextlib.contextmanager
    def _on(self, stream: _Stream) -> Iterator[None]:
        before, self._of_thread.stream = self.current, stream
        try:
            yield
        finally:
            self._of_thread.stream = before

    def wait_value(self, stream: int, address: int, value: int) -> None:
        """Holds a stream up until a word has this value; a thread looks, the stand-in has no such call."""
        dam, word = Dam(self.cuda, stream), ctypes.c_uint32.from_address(address)
        deadline = time.monotonic() + _STREAM_TIMEOUT_S

        def watch() -> None:
            while word.value < value and time.monotonic() < deadline:
                time.sleep(0.0005)
            dam.open()

        threading.Thread(target=watch, daemon=True).start()

    def write_value(self, stream: int, address: int, value: int) -> None:
        """Sets a word behind what the stream holds."""
        self.cuda.synchronize(stream)
        ctypes.c_uint32.from_address(address).value = value

    def _synchronize(self) -> None:
        for stream in self._streams:
            stream.synchronize()

    @contextlib.contextmanager
    def entered(self) -> Iterator[PretendedGpu]:
        names: dict[str, object] = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_name": lambda device=None: "a pretended GPU",
            "synchronize": lambda device=None: self._synchronize(),
            "Stream": self._new_stream,
            "Event": lambda enable_timing=False: _Event(self),
            "stream": self._on,
            "current_stream": lambda device=None: self.current,
            "device": lambda device: contextlib.nullcontext(),
            "empty_cache": lambda: None,
            "_sleep": lambda cycles: None,
        }
        with contextlib.ExitStack() as undo:

            def replace(owner: object, name: str, value: object) -> None:
                undo.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)

            for name, value in names.items():
                replace(torch.cuda, name, value)
            undo.enter_context(engines_on(self.cuda))
            undo.enter_context(_OnTheStandIn(self))
            yield self
