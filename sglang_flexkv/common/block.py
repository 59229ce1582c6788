"""What a block is called: keys of blocks and sequences of them.

A block is ``tokens_per_block`` tokens over all layers. Its key is 128 bits of a chained hash: the parent's
key and the block's tokens, and at the root a namespace digest of everything that changes the bytes (model,
weights, dtype, layout, shard, tenant). Equal keys therefore mean equal KV.

The SGLang path folds SGLang's own SHA-256 page hashes with the namespace: they are collision resistant, so a
crafted prompt cannot be answered with another tenant's KV. The library path hashes tokens with XXH3, which is
much faster, and the index compares the tokens of what it finds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NewType

import numpy as np
import numpy.typing as npt

from sglang_flexkv import _core

KEY_BYTES = 16

BlockKeys = npt.NDArray[np.uint64]  # shape [blocks, 2]
TokenIds = npt.NDArray[np.int32] | npt.NDArray[np.int64]  # shape [tokens]
Namespace = NewType("Namespace", bytes)  # KEY_BYTES long


def make_namespace(fields: Mapping[str, object]) -> Namespace:
    """Digest of everything that changes the bytes of a block. Equal fields give equal namespaces, on every
    machine and in every process."""
    text = json.dumps({k: str(v) for k, v in fields.items()}, sort_keys=True, separators=(",", ":"))
    return Namespace(hashlib.blake2b(text.encode(), digest_size=KEY_BYTES, person=b"flexkv-ns-v1").digest())


def keys_from_page_hashes(page_hashes: Sequence[str], namespace: Namespace) -> BlockKeys:
    """Keys of SGLang's pages: the first 128 bits of each chained SHA-256 (hex), folded with the namespace.

    Returns:
        uint64 of shape [pages, 2].

    Raises:
        ValueError: a hash does not begin with 32 hexadecimal digits.
    """
    return _core.keys_of_page_hashes(page_hashes, namespace)


def page_hash_numbers(keys: BlockKeys, namespace: Namespace) -> npt.NDArray[np.int64]:
    """The first 64 bits of the page hashes that keys were made of, as signed numbers, shape [pages]."""
    folded = np.frombuffer(namespace, np.uint64)[0]
    return (keys[:, 0] ^ folded).byteswap().view(np.int64)


class SequenceMeta:
    """A token sequence cut into blocks. The incomplete block at the end is dropped.

    Args:
        token_ids: int array of shape [tokens]; int32 and int64 are taken as they are, without a copy.
        tokens_per_block: at least 1.
        namespace: who may share these blocks; if not given, everybody who gives none.

    Raises:
        ValueError: the ids have another shape, or do not fit in 32 bits.
    """

    def __init__(
        self, token_ids: npt.ArrayLike, tokens_per_block: int, namespace: Namespace | None = None
    ) -> None:
        ids = np.asarray(token_ids)
        if ids.dtype not in (np.int32, np.int64):
            ids = ids.astype(np.int64)
        self.token_ids: TokenIds = np.ascontiguousarray(ids)
        if self.token_ids.ndim != 1:
            raise ValueError(f"token_ids must have one dimension, not {self.token_ids.ndim}")
        self.tokens_per_block = tokens_per_block
        self.namespace = make_namespace({}) if namespace is None else namespace

    @property
    def num_blocks(self) -> int:
        return len(self.token_ids) // self.tokens_per_block

    @cached_property
    def block_keys(self) -> BlockKeys:
        """uint64 of shape [num_blocks, 2]. Who finds the blocks by their tokens fills it in on the way."""
        return _core.hash_tokens(self.token_ids, self.tokens_per_block, self.namespace)

    def tokens_from(self, block: int) -> TokenIds:
        """Token ids from a block on."""
        return self.token_ids[block * self.tokens_per_block :]
