"""Ranks that are threads of this process, and what SGLang's groups do for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar
from unittest import mock

import torch

from sglang_flexkv.integration import one_copy
from sglang_flexkv.integration.compat.server import Place
from sglang_flexkv.integration.one_copy import OneCopy
from sglang_flexkv.integration.ranks import Ranks

T = TypeVar("T")

TIMEOUT_S = 300.0


class Group:
    """Reduces over ranks that are threads of this process. An error where they ask for different things."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=TIMEOUT_S)
        self._said: list[Any] = [None] * num_ranks
        self.num_reduced = 0

    def reduce(self, rank: int, tensor: torch.Tensor, op: Any) -> None:
        asked = self._exchange(rank, (str(op), tensor.clone()))
        values = torch.stack([value for _, value in asked])
        least = op == torch.distributed.ReduceOp.MIN
        assert least or op == torch.distributed.ReduceOp.MAX
        tensor.copy_(values.amin(0) if least else values.amax(0))
        self.num_reduced += rank == 0

    def ranks(self, rank: int) -> Ranks:
        """As one of them sees them."""
        return Ranks(lambda tensor, op: self.reduce(rank, tensor, op))

    def serves(self, rank: int, cache: Any) -> AbstractContextManager[Any]:
        """SGLang's groups, for the cache of a rank."""
        return mock.patch.object(
            cache, "_all_reduce_attn_groups", lambda tensor, op: self.reduce(rank, tensor, op)
        )

    def leave(self, rank: int) -> None:
        """This rank will ask nothing more."""
        self._exchange(rank, ("nothing", torch.zeros(0)))

    def fail(self) -> None:
        self._barrier.abort()

    def _exchange(self, rank: int, said: tuple[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        self._said[rank] = said
        self._barrier.wait()
        asked = list(self._said)
        self._barrier.wait()
        assert len({(what, value.numel()) for what, value in asked}) == 1, f"the ranks ask for {asked}"
        return asked


def together(group: Group, do: Callable[[int], T]) -> list[T]:
    """What each rank gets that does this at the same time as the others."""

    def run(number: int) -> T:
        try:
            return do(number)
        except BaseException:
            group.fail()
            raise

    with ThreadPoolExecutor(group.num_ranks) as pool:
        return [done.result() for done in [pool.submit(run, number) for number in range(group.num_ranks)]]


def join(group: Group, here: int) -> list[OneCopy | None]:
    """What each rank gets that asks for one copy, on machines with so many ranks each."""

    def of_rank(number: int) -> OneCopy | None:
        place = Place(number, group.num_ranks, number, group.num_ranks, 0, 1, 0, here, here)
        return one_copy.join(group.ranks(number), place)

    return together(group, of_rank)
