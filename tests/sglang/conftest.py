"""What tests of our linker and cache need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from kit import Rig
    from linker_steps import MakeRig


@pytest.fixture
def make_rig() -> Iterator[MakeRig]:
    """Makes rigs over small real KV pools; each must be idle at the end of its test, whatever the test did
    with it."""
    from kit import Rig, build_small_cache, make_pool
    from linker_steps import PAGE

    rigs: list[Rig] = []

    def make(
        kind: str = "mha",
        dtype: torch.dtype = torch.bfloat16,
        page_size: int = PAGE,
        *,
        num_pages: int = 48,
        num_layers: int = 3,
        **options: Any,
    ) -> Rig:
        pool = make_pool(kind, dtype, page_size, num_tokens=num_pages * page_size, num_layers=num_layers)
        rigs.append(Rig(build_small_cache(pool, page_size), **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.check_nothing_is_left()
        rig.close()
