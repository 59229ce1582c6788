"""SGLang's hashes of pages, where its own code for them cannot be used.

SGLang compiles that code on the machine when it is first needed. That takes a C++ compiler, ninja, the
headers of OpenSSL and a directory that can be written; in a container there may be none of them, and then it
raises. What is here computes the same bytes. They have to be the same: the tree's Rust core computes them,
too, and what is on SSD is found by them.
"""

from __future__ import annotations

import hashlib
import logging
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

_UINT32_MAX = np.iinfo(np.uint32).max
# Before the tokens of a page of which some do not fit into 32 bits.
_WIDE = b"\xff"


@lru_cache(maxsize=1)
def native_works() -> bool:
    """Whether SGLang's own code can be used in this process. Compiles it at the first call, if nobody has."""
    from sglang.srt.mem_cache.cpp_utils.native_hash import get_native_hash

    try:
        get_native_hash([0], None, 1)
    except Exception as error:  # of a build, whatever goes wrong on this machine
        cause = error.__cause__ or error
        logger.warning(
            "sglang-flexkv: SGLang cannot compile its hashing of pages here (%s: %s); they are hashed in "
            "Python, which takes 1 µs each. It wants a C++ compiler, ninja, OpenSSL's headers and a "
            "directory that it can write (TORCH_EXTENSIONS_DIR)",
            type(cause).__name__,
            (str(cause).strip().splitlines() or [""])[0],
        )
        return False
    return True


def hash_tokens(
    token_ids: Any, prior_hash: str | None = None, page_size: int | None = None
) -> str | list[str]:
    """What SGLang's ``get_hash_str`` returns.

    Args:
        token_ids: SGLang's RadixKey, or token ids (or tuples of them).
        prior_hash: of the page before.
        page_size: tokens per page; None for one hash of all.
    """
    length = len(token_ids)
    words, width = _words(token_ids, length)
    digest = bytes.fromhex(prior_hash) if prior_hash else b""
    if page_size is None:
        return hashlib.sha256(digest + _encoded(words)).hexdigest()
    step = page_size * width
    hashes = []
    if (words > _UINT32_MAX).any():
        pages = [_encoded(words[start : start + step]) for start in range(0, len(words), step)]
    else:
        encoded, size = _encoded(words), step * 4
        pages = [encoded[start : start + size] for start in range(0, len(encoded), size)]
    for page in pages:
        digest = hashlib.sha256(digest + page).digest()
        hashes.append(digest.hex())
    return hashes


def _words(token_ids: Any, length: int) -> tuple[npt.NDArray[np.int64], int]:
    """What is hashed, one element of the key after the other, and how many of these an element has."""
    if hasattr(token_ids, "raw_token_ids"):
        raw = token_ids.raw_token_ids()
    else:
        raw = getattr(token_ids, "token_ids", token_ids)
    if getattr(token_ids, "is_bigram", False):  # an element is a token and the one behind it
        ids = np.asarray(raw[: length + 1], dtype=np.int64)
        return np.stack([ids[:-1], ids[1:]], axis=1).ravel(), 2
    ids = np.asarray(raw[:length], dtype=np.int64)
    return ids.ravel(), ids.shape[1] if ids.ndim == 2 else 1


def _encoded(words: npt.NDArray[np.int64]) -> bytes:
    if (words > _UINT32_MAX).any():
        return _WIDE + words.astype("<u8").tobytes()
    return words.astype("<u4").tobytes()
