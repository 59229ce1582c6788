"""Ranks that are threads of this process, and what SGLang's groups do for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

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
