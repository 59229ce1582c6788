"""What ranks agree on that have not the same: reduced here as SGLang's groups reduce it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rank_group import Group, together

from sglang_flexkv.integration.ranks import Ranks


def of_each(num: int, ask: Callable[[Ranks, int], Any]) -> list[Any]:
    """What each of so many ranks gets that ask at once."""
    group = Group(num)

    def rank(number: int) -> Any:
        def reduce(tensor: torch.Tensor, op: Any) -> None:
            assert op == torch.distributed.ReduceOp.MIN
            group.reduce(number, tensor, op)

        return ask(Ranks(reduce), number)

    return together(group, rank)


def common_hit(of_ranks: Sequence[Sequence[int]], num_blocks: int) -> list[int]:
    """What each rank gets, given the prefixes that each can load."""
    return of_each(len(of_ranks), lambda ranks, number: ranks.common_hit(of_ranks[number], num_blocks))


def test_where_not_every_shorter_prefix_is_one_the_sets_are_intersected() -> None:
    # The least of the longest ones, 8, is none of the first rank's.
    assert common_hit([[3, 5, 9], [3, 5, 8]], 10) == [5, 5]
    assert common_hit([[3, 5, 9], [3, 9], [1, 3, 4]], 9) == [3, 3, 3]
    assert common_hit([[3], [4]], 10) == [0, 0]
    assert common_hit([[], [4]], 10) == [0, 0]
    assert common_hit([[10]], 10) == [10]


def test_ranks_meet_with_random_bytes_and_know_whether_they_have_the_same() -> None:
    def meet(*of_ranks: bytes) -> tuple[bytes, bool]:
        (met,) = set(of_each(len(of_ranks), lambda ranks, number: ranks.meet(of_ranks[number])))
        return met

    rounds = [
        meet(b"a", b"a", b"a"),
        meet(b"a", b"a", b"b"),
        meet(b"b", b"a", b"a"),
        meet(b"a"),
        meet(b"", b"a"),
    ]
    assert [same for _, same in rounds] == [True, False, False, True, False]
    assert len({seed for seed, _ in rounds}) == len(rounds)
    assert {len(seed) for seed, _ in rounds} == {16}
