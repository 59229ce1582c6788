"""One copy of what is the same on all ranks of a machine.

MLA's latent belongs to no head, so under tensor parallelism every rank computes the same KV. Then one rank of
each machine, the keeper, has the cache: the memory of the CPU tier, the index, the tiers below. It stores
what all of them have computed, and finds it for all of them. The others map its memory and load from there
to their devices; they decide nothing and store nothing.

Every rank makes the same calls in the same order (``ranks``), so the keeper can say what the others have to
know in a reduction: which slots a request loads. It pins these until the load has ended on all ranks.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Sequence

import numpy as np

from sglang_flexkv import _core
from sglang_flexkv.common.config import overcommit_is_strict
from sglang_flexkv.common.transfer import Slots
from sglang_flexkv.integration.compat.server import Place
from sglang_flexkv.integration.ranks import Ranks
from sglang_flexkv.storage.storage_engine import SharedMemory

logger = logging.getLogger(__name__)

_TOKEN_BYTES = 8


class OneCopy:
    """A rank's part in it. All ranks of a request make one at the same time.

    Args:
        ranks: of a request.
        copy: which of the copies this rank uses, one for each machine.
        keeps: whether this rank is its keeper.
        num_ranks: that use it.
    """

    def __init__(self, ranks: Ranks, copy: int, num_copies: int, keeps: bool, num_ranks: int) -> None:
        self._ranks = ranks
        self.copy, self.num_copies = copy, num_copies
        self.keeps = keeps
        self.num_ranks = num_ranks
        self._file = -1

    def open(self) -> bool:
        """Makes the memory's file, or opens it. False, on every rank, if one of them cannot: then each needs
        a cache of its own."""
        token = secrets.randbits(8 * _TOKEN_BYTES - 1)
        mine = self._create(token) if self.keeps else None
        process, file, token = self._told(mine, 3)
        if not self.keeps:
            self._open(f"/proc/{process}/fd/{file}", token)
        if self._ranks.all_can(self._file >= 0):
            return True
        self.close()
        return False

    def _create(self, token: int) -> list[int]:
        try:
            # With strict overcommit memory of one's own is refused where it is mapped. Pages of a file are
            # counted when they are first used, and a process that uses one too many ends.
            if not overcommit_is_strict():
                self._file = _core.HostPool.make_file()
                os.pwrite(self._file, token.to_bytes(_TOKEN_BYTES, "little"), 0)
        except OSError:
            self.close()
        return [os.getpid(), self._file, token]

    def _open(self, path: str, token: int) -> None:
        # Ranks that only seem to be on one machine would open something else, or nothing.
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if int.from_bytes(os.pread(self._file, _TOKEN_BYTES, 0), "little") != token:
                self.close()
        except OSError:
            self.close()

    def memory(self, num_slots: int) -> SharedMemory:
        """That of the CPU tier, as large as the keeper says.

        Args:
            num_slots: what it says.
        """
        (num_slots,) = self._told([num_slots] if self.keeps else None, 1)
        return SharedMemory(self._file, num_slots)

    def close(self) -> None:
        """The file need not stay open where it has been mapped."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def slots_to_load(self, slots: Slots | None, num_blocks: int) -> Slots | None:
        """In the memory of this machine, int64 [blocks]; None, on every rank, if some keeper cannot bring all
        of them.

        Args:
            slots: that the keeper has found. Others need not say anything.
        """
        told = self._ranks.told(slots, self.copy, self.num_copies, num_blocks)
        return None if (told < 0).any() else told[self.copy]

    def _told(self, values: Sequence[int] | None, count: int) -> list[int]:
        told = self._ranks.told(
            None if values is None else np.array(values, np.int64), self.copy, self.num_copies, count
        )
        of_mine: list[int] = told[self.copy].tolist()
        return of_mine


def join(ranks: Ranks, place: Place) -> OneCopy | None:
    """The copy that the ranks of this machine have in common, if they can.

    Args:
        place: of ranks that compute the same KV.
    """
    here = min(place.attn_tp_size, place.tp_ranks_here)
    if here < 2 or place.attn_tp_size % here:
        return None
    copy, number = divmod(place.attn_tp_rank, here)
    joined = OneCopy(ranks, copy, place.attn_tp_size // here, number == 0, here)
    if joined.open():
        return joined
    logger.warning(
        "sglang-flexkv: the ranks of a machine compute the same KV, but one of them cannot make memory for "
        "all (memfd_create; vm.overcommit_memory is 2), or cannot open it (/proc/PID/fd); each keeps a copy "
        "of its own"
    )
    return None
