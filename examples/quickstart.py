"""sglang-flexkv as a library, without SGLang: cache the KV of a prompt, lose it, get it back.

Run it with: python examples/quickstart.py
"""

import tempfile

import torch

from sglang_flexkv import CacheConfig, KVCacheLayout, KVCacheLayoutType, KVManager, ModelConfig

# The model whose KV is cached: 8 layers of 4 KV heads.
model_config = ModelConfig(num_layers=8, num_kv_heads=4, head_size=64, dtype=torch.float16)

ssd_dir = tempfile.TemporaryDirectory()
cache_config = CacheConfig(
    tokens_per_block=16,
    enable_cpu=True,
    num_cpu_blocks=64,
    enable_ssd=True,
    num_ssd_blocks=256,
    ssd_cache_dir=ssd_dir.name,
)

# The device pool of an inference engine: per layer [K and V, block, token, head, head_dim].
layout = KVCacheLayout(
    KVCacheLayoutType.LAYERWISE,
    num_layer=8,
    num_block=128,
    tokens_per_block=16,
    num_head=4,
    head_size=64,
)
kv_caches = torch.randn(layout.kv_shape).to(torch.float16)

kv_manager = KVManager(model_config, cache_config)
kv_manager.register_kv_caches(list(kv_caches), layout)
kv_manager.start()

token_ids = torch.arange(1000, 1000 + 100)  # 6 whole blocks; the last 4 tokens are not cached
slot_mapping = torch.arange(32, 32 + 100)  # where on the device they are

# PUT: the prompt was computed, keep its KV.
task_id = kv_manager.put_async(token_ids, slot_mapping)
response = kv_manager.wait([task_id])[task_id]
print(f"put: {response.status.value}, {int(response.return_mask.sum())} tokens stored")

# The device pool is needed for something else, and the prompt comes back elsewhere.
before = kv_caches.flatten(2, 3)[:, :, 32 : 32 + 96].clone()
kv_caches.zero_()
new_slots = torch.arange(512, 512 + 100)

# GET: see what is held, decide where it goes, bring it there.
task_id, mask = kv_manager.get_match(token_ids)
print(f"match: {int(mask.sum())} of {len(mask)} tokens are held")
kv_manager.launch([task_id], [new_slots])
response = kv_manager.wait([task_id])[task_id]
after = kv_caches.flatten(2, 3)[:, :, 512 : 512 + 96]
print(f"get: {response.status.value}, bytes identical: {torch.equal(before, after)}")

kv_manager.shutdown()
ssd_dir.cleanup()
