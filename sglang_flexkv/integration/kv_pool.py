"""SGLang's KV pools as the engine sees them: rows of bytes.

Bytes are copied as they are, so every dtype that a pool can hold works: fp32, bf16, fp16, and fp8, which
SGLang stores as uint8.
"""

from __future__ import annotations

from typing import Any

from sglang_flexkv.common.errors import IncompatibleError
from sglang_flexkv.common.storage import DeviceBuffers


def device_buffers(pool: Any) -> DeviceBuffers:
    """Describes a pool of MHA, GQA or MLA KV.

    Raises:
        IncompatibleError: the pool holds more than plain K and V (or a latent): scales, index keys, windows.
    """
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, MHABufferInfo, MLABufferInfo
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    # Subclasses keep more state than their parent describes (index keys, scales, windows), so only the two
    # plain pools are taken.
    if type(pool) not in (MHATokenToKVPool, MLATokenToKVPool):
        raise IncompatibleError(
            f"the KV pool of this model is a {type(pool).__name__}, which sglang-flexkv does not store yet; "
            "start without --enable-flexkv"
        )
    (pool_info,) = pool.get_device_pool_infos()
    info = pool_info.buffer_info
    if info.scales is not None:
        raise IncompatibleError(
            "this --kv-cache-dtype keeps scales beside the KV, which sglang-flexkv does not store yet; "
            "use auto, bfloat16 or fp8"
        )
    if isinstance(info, MLABufferInfo):
        return DeviceBuffers([[buffer] for buffer in info.buffers], tokens_per_row=1)
    assert isinstance(info, MHABufferInfo)
    by_token = info.buffers.layout is KVBufferLayout.NHD
    return DeviceBuffers(
        [[k, v] for k, v in zip(info.buffers.k, info.buffers.v, strict=True)],
        tokens_per_row=1 if by_token else info.page_size,
    )
