"""What SGLang was started with, as its runtime context says it in a process that computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from sglang.srt.runtime_context import get_context, get_disagg, get_memory, get_observability, get_parallel


@dataclass(frozen=True)
class Place:
    """Which rank this process is."""

    tp_rank: int
    tp_size: int
    attn_tp_rank: int
    attn_tp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    dp_rank: int
    num_ranks: int  # that share this machine, at least 1
    tp_ranks_here: int  # of them those of one replica

    @property
    def ranks_of_a_request(self) -> int:
        """That run a request's attention and have a cache in common. With DP attention a server has more."""
        return self.attn_tp_size * self.attn_cp_size


def place() -> Place:
    parallel = get_parallel()
    return Place(
        tp_rank=parallel.tp_rank,
        tp_size=parallel.tp_size,
        attn_tp_rank=parallel.attn_tp_rank,
        attn_tp_size=parallel.attn_tp_size,
        attn_cp_rank=parallel.attn_cp_rank,
        attn_cp_size=parallel.attn_cp_size,
        dp_rank=parallel.dp_rank or 0,
        num_ranks=max(1, parallel.tp_size * parallel.dp_size // parallel.nnodes),
        tp_ranks_here=max(1, parallel.tp_size // parallel.nnodes),
    )


def config_file() -> str | None:
    """That of ours, as given with ``--flexkv-config-file``."""
    path: str | None = get_memory().flexkv_config_file
    return path


def reader() -> Callable[[str], Any]:
    """For the value of a resolved argument, given its name."""
    read: Callable[[str], Any] = get_context().config_leaf
    return read


def exports_metrics() -> bool:
    return bool(get_observability().enable_metrics)


def sends_to_decode_servers() -> bool:
    """Whether this is the prefill side of a disaggregated deployment."""
    return bool(get_disagg().disaggregation_mode == "prefill")


def evicts_by_priority() -> bool:
    """Whether a request's priority is about the cache, too. SGLang takes it so only if it is told to."""
    return bool(get_memory().radix_eviction_policy == "priority")


def external_linker_off() -> AbstractContextManager[Any]:
    """While our cache is made: the flag opened the scheduler's gates; left on it would build SGLang's own
    linker."""
    off: AbstractContextManager[Any] = get_memory().override(enable_unified_cache_external_linker=False)
    return off
