"""SGLang's own unit-test kit for its unified radix cache, with our cache and our tiers in its place.

The kit (`sglang/test/kits/unified_radix_cache` in the wheel) holds configurations, a factory of caches over
real pools, and steps that build requests. It has no tests in it: those are in SGLang's repository.
`build_kit_cache` runs the factory with our class; `Rig` puts a real engine under the result and plays the
scheduler's part.

The wheel's Rust tree core has no inspection methods and no sources to build them from, so on that core only
steps that go through the production interface can be used.
"""

from __future__ import annotations

import sys
import types
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import TestCase, mock

import numpy as np
import torch
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestOutcome,
    EvictParams,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import (
    HybridLinearKVPool,
    MHATokenToKVPool,
    MLATokenToKVPool,
    ReqToTokenPool,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.rust_tree_core.adapter import RustUnifiedTreeCore
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.test.kits.unified_radix_cache import fixtures
from sglang.test.kits.unified_radix_cache.config import CacheConfig as KitConfig
from sglang.test.kits.unified_radix_cache.mixins import UnifiedRadixCacheFixtures
from sglang.test.kits.unified_radix_cache.unified_tree_core_inspection_interface import (
    UnifiedTreeCoreInspectionInterface,
)

from sglang_flexkv import _core
from sglang_flexkv.common.block import make_namespace
from sglang_flexkv.common.config import (
    CacheConfig,
    FlexKVConfig,
    LoadPolicy,
    PrefetchPolicy,
    RemoteCompression,
    WritePolicy,
)
from sglang_flexkv.common.lower_tier import SharedBlocks
from sglang_flexkv.integration.compat.kv_pool import kv_pools
from sglang_flexkv.integration.linker import FlexKVLinker
from sglang_flexkv.integration.metrics import Metrics
from sglang_flexkv.integration.one_copy import OneCopy
from sglang_flexkv.integration.radix_cache import FlexKVRadixCache
from sglang_flexkv.kvtask import KVTaskEngine
from sglang_flexkv.storage.storage_engine import SharedMemory

CORES = ("python", "rust")

# Far above what any transfer here takes, however busy the machine is; reached only when one hangs.
TIMEOUT_S = 300.0

_RUST_INSPECTOR_MODULE = "sglang.test.kits.unified_radix_cache.rust_unified_tree_core_inspector"


class ReleasedRustCore(RustUnifiedTreeCore):
    """The wheel's Rust core under the name the kit looks for."""


UnifiedTreeCoreInspectionInterface.register(ReleasedRustCore)


@contextmanager
def our_cache_in_the_kit() -> Iterator[None]:
    """The kit's factory builds FlexKVRadixCache, on the wheel's Rust core where it asks for Rust."""
    stand_in = types.ModuleType(_RUST_INSPECTOR_MODULE)
    stand_in.RustUnifiedTreeCoreInspector = ReleasedRustCore  # type: ignore[attr-defined]
    with (
        mock.patch.object(fixtures, "UnifiedRadixCache", FlexKVRadixCache),
        mock.patch.dict(sys.modules, {_RUST_INSPECTOR_MODULE: stand_in}),
    ):
        yield


def build_kit_cache(cfg: KitConfig, core: str, **options: Any) -> tuple[FlexKVRadixCache, Any, Any]:
    """What the kit's `build_fixture` returns, with our class: the cache, its allocator, the request pool."""
    with our_cache_in_the_kit():
        cache, allocator, requests = fixtures.build_fixture(cfg, tree_core_backend=core, **options)
    assert type(cache) is FlexKVRadixCache
    # The kit falls back from Rust to Python by itself, and then half of the tests would test nothing new.
    assert cache._tree_core_backend == core
    return cache, allocator, requests


class KitSteps(UnifiedRadixCacheFixtures, TestCase):
    """The kit's test steps as an object that functions can use."""

    def __init__(self, cfg: KitConfig) -> None:
        super().__init__()
        self.cfg = cfg


def make_pool(
    kind: str, dtype: torch.dtype, page_size: int, *, num_tokens: int, num_layers: int = 3
) -> MHATokenToKVPool | MLATokenToKVPool:
    """A small real pool on the CPU; K and V of different widths, so that mixing them up shows."""
    if kind == "mha":
        return MHATokenToKVPool(
            size=num_tokens,
            page_size=page_size,
            dtype=dtype,
            head_num=2,
            head_dim=16,
            v_head_dim=8,
            layer_num=num_layers,
            device="cpu",
            enable_memory_saver=False,
        )
    return MLATokenToKVPool(
        size=num_tokens,
        page_size=page_size,
        dtype=dtype,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        layer_num=num_layers,
        device="cpu",
        enable_memory_saver=False,
    )


def build_small_cache(
    pool: MHATokenToKVPool | MLATokenToKVPool,
    page_size: int,
    core: str = "rust",
    *,
    cache_class: type[UnifiedRadixCache] = FlexKVRadixCache,
    **options: Any,
) -> tuple[Any, TokenToKVPoolAllocator, ReqToTokenPool]:
    """A cache over a pool that the kit's factory does not make (MLA, fp8, fp32)."""
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", page_size=page_size))
    requests = ReqToTokenPool(size=16, max_context_len=pool.size, device="cpu", enable_memory_saver=False)
    allocator = TokenToKVPoolAllocator(
        size=pool.size, dtype=pool.dtype, device="cpu", kvcache=pool, need_sort=False
    )
    params = CacheInitParams(
        req_to_token_pool=requests,
        token_to_kv_pool_allocator=allocator,
        page_size=page_size,
        disable=False,
        tree_components=(ComponentType.FULL,),
        eviction_policy="lru",
        **options,
    )
    with envs.SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND.override(core):
        cache = cache_class(params)
    assert cache._tree_core_backend == core
    return cache, allocator, requests


def make_draft_pool(parts: tuple[FlexKVRadixCache, Any, Any], dtype: torch.dtype) -> Any:
    """The pool of a draft model with one layer, as SGLang makes it for that of a target: where this has
    states, they are in its pool, too, and it does not use them."""
    _, allocator, requests = parts
    pool = allocator.get_kvcache()
    if not isinstance(pool, HybridLinearKVPool):
        return make_pool("mha", dtype, pool.page_size, num_tokens=pool.size, num_layers=1)
    return HybridLinearKVPool(
        size=pool.size,
        page_size=pool.page_size,
        dtype=dtype,
        head_num=1,
        head_dim=16,
        full_attention_layer_ids=[0],
        device="cpu",
        mamba_pool=requests.mamba_pool,
        enable_kv_cache_copy=True,
    )


class Rig:
    """A cache with a real engine and linker under it, driven the way SGLang's scheduler does.

    Args:
        parts: the cache, its allocator and its request pool.
        num_ssd_blocks: of the SSD tier; none: as many as the CPU tier has.
        ssd_dir: where the SSD tier lives; none: no SSD tier.
        remote: URL of a remote store; none: no remote tier.
        shared: whose blocks those in the store are; none: of who has the same keys.
        drafts: pools of draft models.
        single_rank: as the linker's; False makes it behave as one of several ranks.
        one_copy: that this rank has in common with others, in this memory.
    """

    def __init__(
        self,
        parts: tuple[FlexKVRadixCache, Any, Any],
        *,
        policy: WritePolicy = WritePolicy.WRITE_THROUGH,
        num_cpu_blocks: int = 256,
        num_ssd_blocks: int | None = None,
        ssd_dir: Path | None = None,
        prefetch_policy: PrefetchPolicy = PrefetchPolicy.WAIT_COMPLETE,
        copy_threads: int = 2,
        single_rank: bool = True,
        load_policy: LoadPolicy = LoadPolicy.AUTO,
        disk: _core.Disk | None = None,
        by_priority: bool = False,
        remote: str | None = None,
        shared: SharedBlocks | None = None,
        remote_timeout_s: float = TIMEOUT_S,
        remote_compression: RemoteCompression = RemoteCompression.NONE,
        prefetch_timeout_s: float = 3.0,
        drafts: Sequence[MHATokenToKVPool | MLATokenToKVPool | HybridLinearKVPool] = (),
        reads_under_forwards: bool = True,
        one_copy: OneCopy | None = None,
        memory: SharedMemory | None = None,
        num_lower_tiers: int | None = None,
    ) -> None:
        self.byte_values = 256  # that are written: few shrink, all do not
        self.cache, self.allocator, self.requests = parts
        self.pool = self.allocator.get_kvcache()
        self.page_size = self.cache.page_size
        # Where keys are of pairs, what is stored of a prompt depends on one token more.
        self.tokens_behind = int(self.cache.tree_core.is_eagle)
        pools = kv_pools(self.pool, self.page_size, self.cache.window_tokens, drafts, self.requests)
        full = self.pool
        self.window_buffers: list[torch.Tensor] = []
        self.state_buffers: list[torch.Tensor] = []
        if isinstance(self.pool, SWAKVPool):
            full, window = self.pool.full_kv_pool, self.pool.swa_kv_pool
            self.window_buffers = [*window.k_buffer, *window.v_buffer]
        if isinstance(self.pool, HybridLinearKVPool):
            full = self.pool.full_kv_pool
        if self.cache.keeps_states:
            states = self.requests.mamba_pool.mamba_cache
            self.state_buffers = [layer for buffer in (states.temporal, *states.conv) for layer in buffer]
        self._num_layers = pools.num_layers
        parts_of_drafts = [getattr(draft, "full_kv_pool", draft) for draft in drafts]
        self.buffers = [buffer for pool in (full, *parts_of_drafts) for buffer in buffers_of(pool)]
        self.buffers_per_layer = len(buffers_of(full)) // full.layer_num
        namespace = make_namespace({"model": "kit"})
        self.engine = KVTaskEngine(
            CacheConfig(
                tokens_per_block=self.page_size,
                num_cpu_blocks=num_cpu_blocks,
                enable_ssd=ssd_dir is not None,
                num_ssd_blocks=(num_ssd_blocks or num_cpu_blocks) if ssd_dir is not None else 0,
                ssd_cache_dir=(ssd_dir,) if ssd_dir is not None else (),
                copy_threads=copy_threads,
                remote=remote,
                remote_timeout_s=remote_timeout_s,
                remote_compression=remote_compression,
            ),
            pools.full,
            # Tiers here are too small for a share of them.
            more_groups=[replace(group, share=1.0) for group in pools.more],
            layers=pools.layers,
            namespace=namespace,
            shared=shared,
            disk=disk,
            watched=self.cache.tells_routers,
            reads_in_pieces=not reads_under_forwards,
            memory=memory,
        )
        self.linker = FlexKVLinker(
            self.engine,
            FlexKVConfig(
                write_policy=policy,
                prefetch_policy=prefetch_policy,
                prefetch_timeout_s=prefetch_timeout_s,
                load_policy=load_policy,
            ),
            namespace,
            num_layers=pools.num_layers,
            single_rank=single_rank,
            metrics=Metrics(),
            has_draft=bool(drafts),
            reads_under_forwards=reads_under_forwards,
            one_copy=one_copy,
            num_lower_tiers=num_lower_tiers,
        )
        self.cache.attach(self.linker, policy, by_priority=by_priority)
        self.pool.register_layer_transfer_counter(self.linker.layer_done_counter)
        if self.state_buffers:
            self.requests.register_layer_transfer_counter(self.linker.layer_done_counter)
        self._rid = 0

    # ---- bytes of the device pool, past the accessors that wait for layers ----

    def read(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """What the pool holds in token slots: per buffer its bytes, one row per token."""
        return [as_bytes(buffer)[slots.long()] for buffer in self.buffers]

    def read_window(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """What the pool of the windows holds of the tokens in these slots of the other one."""
        return [as_bytes(buffer)[self.in_window(slots)] for buffer in self.window_buffers]

    def read_state(self, req: Req) -> list[torch.Tensor]:
        """The state that a request would go on from: per buffer its bytes, one row."""
        return [as_bytes(buffer)[req.kv.mamba_pool_idx.long()].unsqueeze(0) for buffer in self.state_buffers]

    def write_state(self, slot: torch.Tensor, rows: Sequence[torch.Tensor]) -> None:
        """What a forward would leave at its end."""
        for buffer, row in zip(self.state_buffers, rows, strict=True):
            as_bytes(buffer)[slot.long()] = row

    def random_state(self, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        sizes = [as_bytes(buffer).shape[1] for buffer in self.state_buffers]
        return [torch.randint(256, (1, n), dtype=torch.uint8, generator=generator) for n in sizes]

    def allocate_state(self) -> torch.Tensor:
        """A slot for a state, [1]."""
        assert self.cache.has_state_for_load(), "all states of this test are in use"
        slot: torch.Tensor = self.requests.mamba_allocator.alloc(1)
        return slot

    def in_window(self, slots: torch.Tensor) -> torch.Tensor:
        """The slots in the pool of the windows of the tokens in these slots of the other one."""
        where: torch.Tensor = self.pool.full_to_swa_index_mapping[slots.long()]
        assert bool((where > 0).all()), "tokens without a slot in the pool of the windows"
        return where

    def read_layer(self, layer: int, slots: torch.Tensor) -> list[torch.Tensor]:
        """`read` for one layer, by the way that attention takes: it waits for the layer."""
        self.pool.get_kv_buffer(layer)
        first = layer * self.buffers_per_layer
        buffers = self.buffers[first : first + self.buffers_per_layer]
        return [as_bytes(buffer)[slots.long()] for buffer in buffers]

    def write(self, slots: torch.Tensor, seed: int) -> list[torch.Tensor]:
        """Random bytes into token slots, as a forward would; returns them as `read` does."""
        generator = torch.Generator().manual_seed(seed)
        places = [(buffer, slots.long()) for buffer in self.buffers]
        if self.window_buffers:
            where = self.in_window(slots)
            places += [(buffer, where) for buffer in self.window_buffers]
        for buffer, where in places:
            rows = as_bytes(buffer)
            rows[where] = torch.randint(
                self.byte_values, (len(where), rows.shape[1]), dtype=torch.uint8, generator=generator
            )
        return self.read(slots)

    def fill(self, seed: int) -> None:
        """Random bytes into the whole pool, for the kit's steps: they allocate slots but write none."""
        self.write(torch.arange(self.pool.size + 1), seed)

    def scribble(self) -> None:
        """Makes every byte of the pool wrong: what is right afterwards was loaded."""
        for buffer in (*self.buffers, *self.window_buffers, *self.state_buffers):
            as_bytes(buffer).fill_(0xA5)

    # ---- the scheduler's part ----

    def request(
        self,
        tokens: Sequence[int],
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        rid: str | None = None,
    ) -> Req:
        self._rid += 1
        req = Req(
            rid=rid or f"request-{self._rid}",
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
            extra_key=extra_key,
        )
        req.cache_salt = cache_salt
        return req

    def insert(
        self,
        tokens: Sequence[int],
        seed: int,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> list[torch.Tensor]:
        """Computes tokens that the tree does not hold and inserts them; returns their bytes."""
        slots = self.allocate(len(tokens) - self.tokens_behind)
        assert slots is not None, "the device pool of this test is too small"
        expected = self.write(slots, seed)
        key = radix_key(tokens, extra_key, cache_salt)
        self._insert(InsertParams(key=key, value=slots, priority=priority), seed)
        return expected

    def _insert(
        self, params: InsertParams, seed: int | None = None, slot: torch.Tensor | None = None
    ) -> None:
        """With a state, where the model has some: the one in a slot, or a random one."""
        if self.state_buffers:
            if slot is None:
                slot = self.allocate_state()
                self.write_state(slot, self.random_state(seed or 0))
            params.mamba_value = slot
        result = self.cache.insert(params)
        if slot is not None and result.mamba_exist:
            self.requests.mamba_allocator.free(slot)

    def allocate(self, num_tokens: int) -> torch.Tensor | None:
        """Slots for whole pages of new tokens, in all pools; None: there are not as many."""
        if not self.window_buffers or self.page_size == 1:
            slots: torch.Tensor | None = self.allocator.alloc(num_tokens)
            return slots
        full, window = self.allocator.full_attn_allocator, self.allocator.swa_attn_allocator
        if num_tokens > min(full.available_size(), window.available_size()):
            return None
        slots = full.alloc(num_tokens)
        self.allocator.set_full_to_swa_mapping(slots, window.alloc(num_tokens))
        return slots

    def match(self, req: Req) -> MatchResult:
        return self.cache.match_prefix(
            MatchPrefixParams(
                key=radix_key(req.origin_input_ids, req.extra_key, req.cache_salt),
                req=req,
                cow_mamba=bool(self.state_buffers),
            )
        )

    def admit(self, req: Req, match: MatchResult | None = None) -> torch.Tensor:
        """Matches (unless that was done already) and queues what the tiers hold; returns the token slots of
        the whole prefix, on the device or on their way. The request keeps a lock on its prefix until `finish`
        or `abort`."""
        match = match or self.match(req)
        req.refresh_fill_ids()
        req.last_node = match.last_device_node
        req.lock = self.cache.lock(match.last_device_node)
        req.prefix_len = req.kv.cache_protected_len = match.device_prefix_len
        if match.host_hit_length:
            loaded, _ = self.cache.init_load_back(
                InitLoadBackParams(
                    best_match_node=match.best_match_node, host_hit_length=match.host_hit_length, req=req
                )
            )
            assert loaded in (0, match.host_hit_length)
            req.prefix_len += loaded
        return self.cache.prefix_device_indices(req)

    def start_batch(self) -> int:
        """Starts the queued loads and makes the pool wait for them, as the next forward would."""
        index = self.cache.ready_to_load_host_cache()
        self.linker.layer_done_counter.set_consumer(index)
        return index

    def forward(self) -> None:
        """Reads every layer through the pool's accessors, which wait for it."""
        in_states = set(self.requests.mamba_map) if self.state_buffers else set()
        for layer in range(self._num_layers):
            if layer in in_states:
                self.requests.mamba2_layer_cache(layer)
            else:
                self.pool.get_kv_buffer(layer)

    def finish(self, req: Req, slots: torch.Tensor) -> None:
        """Inserts the prefix that a request used, and lets go of the request."""
        tokens = req.origin_input_ids[: len(slots) + self.tokens_behind]
        params = InsertParams(
            key=radix_key(tokens, req.extra_key, req.cache_salt),
            value=slots,
            prev_prefix_len=req.kv.cache_protected_len,
            component_evicted_seqlens=dict(req.kv.component_evicted_seqlens),
        )
        self._insert(params, slot=req.kv.mamba_pool_idx.unsqueeze(0) if req.kv.holds_mamba else None)
        req.kv.mamba_pool_idx = None
        self.cache.unlock(req.lock)
        self.cache.on_release(req, checkpointed=True)

    def abort(self, req: Req, slots: torch.Tensor | None = None) -> None:
        """Lets go of a request that will not run, and of the slots that were to be loaded for it."""
        self.cache.finish(req.cache_request_handle, CacheRequestOutcome.ABORT)
        if slots is not None:
            self._free(req, slots)
        if req.kv.holds_mamba:
            self.requests.mamba_allocator.free(req.kv.mamba_pool_idx.unsqueeze(0))
            req.kv.mamba_pool_idx = None
        self.cache.unlock(req.lock)

    def _free(self, req: Req, slots: torch.Tensor) -> None:
        """Gives the slots back that a request has for itself, as SGLang does: those before its window have
        nothing in the other pool."""
        slots, protected = slots.long(), req.kv.cache_protected_len
        without = (
            max(protected, req.kv.get_evicted_seqlen(ComponentType.SWA)) if self.window_buffers else protected
        )
        if without > protected:
            self.allocator.full_attn_allocator.free(slots[protected:without])
        self.allocator.free(slots[without:])

    def restore(self, *reqs: Req) -> list[torch.Tensor]:
        """One batch through admission, loading and forward; returns each request's slots."""
        slots = [self.admit(req) for req in reqs]
        self.start_batch()
        self.forward()
        failed = self.cache.finish_external_linker_loads(list(reqs))
        assert not failed
        return slots

    def settle(self) -> None:
        """Waits until no copy runs and tells the tree."""
        assert self.engine.drain(TIMEOUT_S)
        self.cache.check_hicache_events()

    def evict_all(self) -> None:
        """Drives everything from the device that no request uses, and spoils what is left in its memory."""
        self.settle()
        self.cache.evict(EvictParams(num_tokens=self.cache.full_evictable_size()))
        assert self.cache.full_evictable_size() == 0
        self.scribble()

    def stats(self, what: str) -> dict[str, float]:
        return self.engine.stats()[what]

    # ---- what must hold at the end of every test ----

    def check_nothing_is_left(self) -> None:
        """No lease, reservation or transfer; and every slot of the device pool is accounted for."""
        self.settle()
        assert not self.cache.has_pending_cache_operations()
        self.linker.check_idle()
        assert not self.cache.linker.loads, "loads that somebody may still share"
        assert self.stats("CPU")["pinned"] == 0
        assert self.stats("CPU")["writing"] == 0
        assert self.cache.full_protected_size() == 0
        assert self.allocator.available_size() + self.cache.full_evictable_size() == self.pool.size
        if self.state_buffers:
            free = self.cache.num_free_states() + self.cache.mamba_evictable_size()
            assert free == self.requests.mamba_pool.size, "slots of states that nobody knows of"
        assert not self.stats("tasks")["kept"], "records of tasks that nobody will ask about"
        self.cache.sanity_check()

    def close(self) -> None:
        self.linker.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.check_nothing_is_left()
        finally:
            self.close()


def buffers_of(pool: MHATokenToKVPool | MLATokenToKVPool) -> list[torch.Tensor]:
    """Taken from the pool itself and not from our description of it, which is under test as well."""
    if isinstance(pool, MLATokenToKVPool):
        return list(pool.kv_buffer)
    return [buffer for layer in zip(pool.k_buffer, pool.v_buffer, strict=True) for buffer in layer]


def assert_same(got: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    """Compares what `Rig.read` returned, byte by byte."""
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape
        wrong = np.flatnonzero((a != b).any(dim=1).numpy())
        assert len(wrong) == 0, f"buffer {number}: {len(wrong)} of {len(a)} tokens differ, first {wrong[:5]}"


def cut(rows: Iterable[torch.Tensor], first: int, last: int | None = None) -> list[torch.Tensor]:
    """Tokens [first, last) of what `Rig.read` returned."""
    return [part[first:last] for part in rows]


def radix_key(tokens: Sequence[int], extra_key: str | None = None, cache_salt: str | None = None) -> RadixKey:
    return RadixKey(array("q", tokens), extra_key=extra_key, cache_salt=cache_salt)


def as_bytes(buffer: torch.Tensor) -> torch.Tensor:
    """A buffer of rows as uint8 [tokens, bytes], sharing its memory."""
    return buffer.view(torch.uint8).flatten(1)
