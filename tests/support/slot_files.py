"""The files of an SSD tier, as disks spoil them, and what has reached them."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def blocks_in(*directories: Path) -> int:
    """Blocks that another process would find there, of all ranks."""
    return sum(ssd_tools.inspect(files).live_blocks for files in ssd_tools.find(directories))


def wait_for_blocks(count: int, *directories: Path) -> None:
    """Until so many blocks are there. A CPU tier that is smaller than what is stored drops what a slow disk
    has not taken yet."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := blocks_in(*directories)) < count:
        assert time.monotonic() < deadline, f"{found} blocks have reached SSD, not {count}"
        time.sleep(0.02)


def store_on_ssd(
    server: SGLangServer, prompt: Sequence[int], max_new_tokens: int = 1, **fields: Any
) -> dict[str, Any]:
    """Computes a prompt, and waits until SSD has it. Returns the answer. Whatever was stored before must
    be there already. The files are in directories ``ssd*`` beside the configuration."""
    directories = sorted(Path(str(server.flags["flexkv-config-file"])).parent.glob("ssd*"))
    page = int(str(server.flags.get("page-size", 16)))  # as --enable-flexkv has it
    before = blocks_in(*directories)
    answer = server.generate(prompt, max_new_tokens, **fields)
    # Of the last token nobody has computed KV.
    num_tokens = len(prompt) + len(answer["output_ids"]) - 1
    new = num_tokens // page - answer["meta_info"]["cached_tokens"] // page
    wait_for_blocks(before + new * int(str(server.flags.get("tp-size", 1))), *directories)
    return answer
