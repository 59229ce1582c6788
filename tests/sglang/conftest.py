"""What tests of servers, and of our linker and cache, need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from server import ON_CPU

if TYPE_CHECKING:
    from kit import Rig
    from linker_steps import MakeRig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips servers of more ranks than there are GPUs; on a CPU ranks share it."""
    if ON_CPU:
        return
    for item in items:
        if Path(__file__).parent not in item.path.parents:  # the hook is given those of all folders
            continue
        params = (
            item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        )
        ranks = params.get("tp_size", getattr(params.get("scenario"), "tp_size", 1))
        if ranks > torch.cuda.device_count():
            item.add_marker(pytest.mark.skip(reason=f"{ranks} ranks want {ranks} GPUs"))


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
