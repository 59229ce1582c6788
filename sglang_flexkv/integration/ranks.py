"""What the ranks of a server agree on, and why that is enough.

Every rank runs the same scheduler over the same requests in the same order. So what follows from requests,
settings and SGLang's own state is the same everywhere, and nobody asks. What a rank knows from its own tiers
and copies is not: a block may be gone on one rank alone, a read may end a step later. All of that is reduced
here, before anything depends on it.

With DP attention a server has several such sets of ranks, each with requests and caches of its own. SGLang
has them run every forward together, one without requests an idle one. What is reduced here never goes beyond
one set: another one may have nothing to ask, and would not be there.

========================  =========  =======================================================================
What                      Reduced    Why that is enough
========================  =========  =======================================================================
random bytes, at a start  least      any will do: they name what all ranks draw alike, their flushes
whose values these are    all        in a store: only ranks with one name for them have values in common
memory for one copy       greatest   only keepers say anything (``one_copy``), each in its machine's row
slots that it loads from  greatest   as above; and pinned until the load has ended on all ranks
length of a hit           least      of a prefix that a rank holds it holds every shorter one
ends of a hit             all        with windows or states it does not: the longest that every rank can load
wait for reads at all     any        whether to wait is one decision; which blocks to bring is each rank's own
a wait is over            all        a request is scheduled by all ranks in the same step
wait again, or join       any        as above
somebody may be reading   any        begins with a load or a wait, of which all know; says itself when it ends
a load has landed         all        the ranks compute one forward, so a load that failed anywhere failed
an offload has ended      all        SGLang does it (``check_hicache_events``): how many have ended, and which
                                     of them well. Nodes are offered in the same order and always accepted,
                                     so where no offload is on its way none is anywhere, and nobody asks
========================  =========  =======================================================================

Not agreed on, and no need to: what is evicted from the tiers, what is spilled, measured speeds. They
change how long a hit is, and that is agreed on.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_SEED_BYTES = 16


class Ranks:
    """Those of one server, with DP attention those that run a request together.

    Args:
        reduce: reduces a tensor over all of them, in place. Called on all of them in the same order.
    """

    def __init__(self, reduce: Callable[[torch.Tensor, Any], None]) -> None:
        self._reduce = reduce
        # Whether any rank may be reading from a lower tier. While it is not set the ranks need not ask each
        # other.
        self.reads_may_run = False

    def meet(self, what: bytes) -> tuple[bytes, bool]:
        """Once, when all of them start.

        Args:
            what: this rank has.

        Returns:
            Some random bytes that all ranks get, and whether all have the same.
        """
        drawn = np.frombuffer(secrets.token_bytes(_SEED_BYTES), np.int64).tolist()
        number = int.from_bytes(hashlib.blake2b(what, digest_size=7).digest(), "big")
        *seed, least, greatest = self._common([*drawn, number, -number], torch.distributed.ReduceOp.MIN)
        return np.array(seed, np.int64).tobytes(), least == -greatest

    def told(
        self, values: npt.NDArray[np.int64] | None, speaker: int, num_speakers: int, count: int
    ) -> npt.NDArray[np.int64]:
        """What some of the ranks have to say to all, int64 [num_speakers, count]; -1 where one says nothing.

        Args:
            values: of the speaker that this rank is, int64 [count], none below 0; None: it says nothing.
            speaker: which one it is.
        """
        said = np.full((num_speakers, count), -1, np.int64)
        if values is not None:
            said[speaker] = values
        self._reduce(torch.from_numpy(said), torch.distributed.ReduceOp.MAX)
        return said

    def all_can(self, can: bool) -> bool:
        """Whether something that was tried works on all of them."""
        return bool(self._common([can], torch.distributed.ReduceOp.MIN)[0])

    def shortest_hit(self, num_blocks: int) -> int:
        """Blocks of a prefix that all ranks can load."""
        return self._common([num_blocks], torch.distributed.ReduceOp.MIN)[0]

    def common_hit(self, num_blocks: Sequence[int], of_blocks: int) -> int:
        """The longest prefix that all ranks can load, where a rank can load some and not every shorter one.

        Args:
            num_blocks: blocks of each prefix that this rank can load.
            of_blocks: that were looked up, the same on every rank.
        """
        mask = np.zeros(of_blocks + 1, np.int32)
        mask[0] = 1
        mask[list(num_blocks)] = 1
        # In place: with pages of one token there are as many as a prompt is long.
        self._reduce(torch.from_numpy(mask), torch.distributed.ReduceOp.MIN)
        return int(np.flatnonzero(mask)[-1])

    def any_would_wait(self, num_lower_blocks: int) -> bool:
        """Whether a rank has blocks to bring from lower tiers for a request that enters the queue. It waits
        then."""
        wanted = self._common([num_lower_blocks], torch.distributed.ReduceOp.MAX)[0] > 0
        self.reads_may_run = self.reads_may_run or wanted
        return wanted

    def all_may_go_on(self, ready: bool) -> bool:
        """Whether a request that waits has waited for long enough on all ranks."""
        return bool(self._common([ready], torch.distributed.ReduceOp.MIN)[0])

    def any_waits_again(self, waits: bool, num_reads: int) -> bool:
        """Whether a request waits (again) because of what one rank found. Tells as well whether anybody still
        reads (``num_reads`` of this rank)."""
        waiting, reads = self._common([waits, num_reads], torch.distributed.ReduceOp.MAX)
        self.reads_may_run = bool(waiting or reads)
        return bool(waiting)

    def loads_begin(self) -> None:
        """All ranks load for a request, and may read from lower tiers for it."""
        self.reads_may_run = True

    def landed_everywhere(self, landed: Sequence[bool]) -> list[bool]:
        """A verdict for each load of a batch, in the order of admission."""
        return [bool(ok) for ok in self._common(landed, torch.distributed.ReduceOp.MIN)]

    def _common(self, values: Sequence[int], op: Any) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64)
        self._reduce(tensor, op)
        reduced: list[int] = tensor.tolist()
        return reduced
