"""What tests of servers need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from server import ON_CPU


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
