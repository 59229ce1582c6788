"""SGLang's KV events: what it tells routers (``--kv-events-config``), in our words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored, StorageMedium

# Where a block is, as routers know it.
IN_MEMORY = StorageMedium.CPU
ON_DISK = StorageMedium.DISK


@dataclass(frozen=True)
class NodeTokens:
    """The tokens of a node's pages.

    Attributes:
        ids: one more than the pages have where an element of a key is a token and the one behind it.
        is_bigram: whether it is so.
    """

    ids: Sequence[int]
    is_bigram: bool


def stored(
    names: list[int], parent: int | None, tokens: list[Any], page_size: int, medium: StorageMedium
) -> Any:
    """Pages that follow each other are somewhere now.

    Args:
        parent: the page before the first of them.
        tokens: of the pages, pairs of them where the tree's keys are pairs.
    """
    return BlockStored(
        block_hashes=names,
        parent_block_hash=parent,
        token_ids=tokens,
        block_size=page_size,
        lora_id=None,
        medium=medium,
    )


def removed(names: list[int], medium: StorageMedium) -> Any:
    """Pages are somewhere no more."""
    return BlockRemoved(block_hashes=names, medium=medium)
