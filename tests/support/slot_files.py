"""The files of an SSD tier, as disks spoil them, and what has reached them."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_flexkv import _core
from sglang_flexkv.storage import ssd_tools

if TYPE_CHECKING:  # it is imported where there is no server, too
    from server import SGLangServer

PAGE_BYTES = 4096
PATIENCE_S = 60.0


def damage(path: Path, every: int) -> int:
    """Flips a byte in every so many-th page of a file's slots, also under a running server. Returns how
    many.

    Past the page cache, as the server writes them. Of a page that one writes through the cache while another
    writes beside it, Linux tells whoever syncs the file next that its disk has failed.
    """
    damaged = 0
    page = mmap.mmap(-1, PAGE_BYTES)  # aligned, as O_DIRECT wants it
    file = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        for begin, end in _written(file):
            first = max(0, (begin - _core.SSD_SLOTS_OFFSET) // PAGE_BYTES)
            last = (end - _core.SSD_SLOTS_OFFSET) // PAGE_BYTES
            for number in range(first + -first % every, last, every):
                offset = _core.SSD_SLOTS_OFFSET + number * PAGE_BYTES
                assert os.preadv(file, [page], offset) == PAGE_BYTES
                page[0] ^= 0xFF
                assert os.pwritev(file, [page], offset) == PAGE_BYTES
                damaged += 1
    finally:
        os.close(file)
    return damaged


def _written(file: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that somebody has written; there is nothing to spoil in the others."""
    end = 0
    with contextlib.suppress(OSError):  # ENXIO: no more of them
        while True:
            begin = os.lseek(file, end, os.SEEK_DATA)
            end = os.lseek(file, begin, os.SEEK_HOLE)
            yield begin, end


def blocks_in(directory: Path) -> int:
    """Blocks that another process would find there, of all ranks."""
    return sum(ssd_tools.inspect(files).live_blocks for files in ssd_tools.find([directory]))


def wait_for_blocks(directory: Path, count: int) -> None:
    """Until so many blocks are there. A CPU tier that is smaller than what is stored drops what a slow disk
    has not taken yet."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := blocks_in(directory)) < count:
        assert time.monotonic() < deadline, f"{found} blocks have reached SSD, not {count}"
        time.sleep(0.02)


def store_on_ssd(server: SGLangServer, prompt: list[int]) -> None:
    """Computes a prompt, and waits until SSD has it. Its files are in ``ssd`` beside the configuration."""
    directory = Path(str(server.flags["flexkv-config-file"])).parent / "ssd"
    before = blocks_in(directory)
    server.generate(prompt, 1)
    wait_for_blocks(directory, before + len(prompt) // int(str(server.flags["page-size"])))
