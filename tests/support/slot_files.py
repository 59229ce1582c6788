"""The files of an SSD tier, as disks spoil them."""

from __future__ import annotations

import os
from pathlib import Path

from sglang_flexkv import _core


def damage(path: Path, every: int) -> int:
    """Flips a byte in every so many-th page of a file's slots, also under a running server. Returns how
    many."""
    damaged = 0
    with path.open("r+b") as file:
        for offset in range(_core.SSD_SLOTS_OFFSET, path.stat().st_size, every * 4096):
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 0xFF]))
            damaged += 1
        file.flush()
        os.fsync(file.fileno())
    return damaged
