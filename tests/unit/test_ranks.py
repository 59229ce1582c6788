"""What ranks agree on that have not the same: reduced here as SGLang's groups reduce it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch

from sglang_flexkv.integration.ranks import Ranks


def common_hit(of_ranks: Sequence[Sequence[int]], num_blocks: int) -> list[int]:
    """What each rank gets, given the prefixes that each can load."""
    barrier = Barrier(len(of_ranks), timeout=60.0)
    said: list[torch.Tensor | None] = [None] * len(of_ranks)

    def rank(number: int) -> int:
        def reduce(tensor: torch.Tensor, op: Any) -> None:
            assert op == torch.distributed.ReduceOp.MIN
            said[number] = tensor.clone()
            barrier.wait()
            tensor.copy_(torch.stack([t for t in said if t is not None]).amin(0))

        return Ranks(reduce).common_hit(of_ranks[number], num_blocks)

    with ThreadPoolExecutor(len(of_ranks)) as pool:
        return list(pool.map(rank, range(len(of_ranks))))


def test_where_not_every_shorter_prefix_is_one_the_sets_are_intersected() -> None:
    # The least of the longest ones, 8, is none of the first rank's.
    assert common_hit([[3, 5, 9], [3, 5, 8]], 10) == [5, 5]
    assert common_hit([[3, 5, 9], [3, 9], [1, 3, 4]], 9) == [3, 3, 3]
    assert common_hit([[3], [4]], 10) == [0, 0]
    assert common_hit([[], [4]], 10) == [0, 0]
    assert common_hit([[10]], 10) == [10]
