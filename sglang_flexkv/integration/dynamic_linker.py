"""The tiers under a tree of SGLang's own: for a version of SGLang that our patches were not written for.

SGLang takes a linker from outside with

    --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic
    --unified-cache-external-linker-config '{"linker": "DynamicLinker",
        "linker_module_path": "sglang_flexkv.integration.dynamic_linker",
        "linker_extra_config": {"flexkv_config_file": "flexkv.yaml"}}'

and drives it itself. Nothing is patched, so what SGLang does not tell a linker is not known here, and what
it does with a load that fails (the request ends with an error) stays as it is. Hence a hit is what the CPU
tier holds at that moment, pinned until it is loaded; what lies on SSD is brought there for whoever asks
next; and a batch's loads have landed before its forward begins. When weights change nobody says so,
therefore no other process finds what this one has stored.
"""

from __future__ import annotations

import atexit
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sglang_flexkv import __version__
from sglang_flexkv.common.block import BlockKeys
from sglang_flexkv.common.config import GIB, FlexKVConfig, LoadPolicy, WritePolicy
from sglang_flexkv.common.errors import ConfigError, FlexKVError, IncompatibleError
from sglang_flexkv.common.lower_tier import CPU
from sglang_flexkv.integration import checks
from sglang_flexkv.integration.compat import refused, server
from sglang_flexkv.integration.compat.kv_pool import device_buffers
from sglang_flexkv.integration.compat.linker_interface import PoolTransfer
from sglang_flexkv.integration.linker import FlexKVLinker
from sglang_flexkv.integration.metrics import Metrics
from sglang_flexkv.kvtask import Fetch, KVTaskEngine
from sglang_flexkv.storage.ssd_identity import Identity
from sglang_flexkv.storage.storage_engine import slot_bytes_for

logger = logging.getLogger(__name__)

_SETTING = "flexkv_config_file"
_LOAD_TIMEOUT_S = 120.0
# Reads from SSD for whoever asks next, at most so many at a time.
_FETCHES_MAX = 16


class DynamicLinker(FlexKVLinker):
    """The linker under SGLang's own driver, which knows requests by the ids that clients choose."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[Any],
        extra_config: Mapping[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        """As SGLang makes it, once per rank.

        Raises:
            ConfigError, IncompatibleError: with the setting and the remedy.
        """
        try:
            self._build(params, components, extra_config or {})
        except FlexKVError as error:
            logger.error("sglang-flexkv cannot start: %s", error)
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            reason = f"this SGLang is not as a dynamic linker needs it ({what}); start without it"
            logger.error("sglang-flexkv cannot start: %s", reason)
            raise IncompatibleError(reason) from error
        self.forward_stream = forward_stream
        self._fetches: dict[str, Fetch] = {}
        atexit.register(self.close)

    def _build(self, params: Any, components: set[Any], extra_config: Mapping[str, Any]) -> None:
        config = _config(extra_config)
        checks.check_core()
        refused.check_dynamic_linker(server.reader(), params, components)
        checks.check_machine(config)
        place = server.place()
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        device = device_buffers(pool)
        layout = device.block_layout(params.page_size)
        cache_config = config.cache_config(
            block_bytes=slot_bytes_for(layout.block_bytes),
            tokens_per_block=params.page_size,
            num_ranks=place.num_ranks,
        )
        identity = Identity({"weights": "not told to a dynamic linker"}, nonce=secrets.token_hex(16))
        engine = KVTaskEngine(
            cache_config,
            device,
            namespace=identity.namespace,
            label="of a dynamic linker",
            identity=identity,
            rank_tag=f"dp{place.dp_rank}-tp{place.tp_rank}",
        )
        super().__init__(
            engine,
            config,
            identity.namespace,
            num_layers=layout.num_layers,
            single_rank=place.ranks_of_a_request == 1,
            reads_under_forwards=False,
            metrics=Metrics(None, engine.tier_names),
        )
        logger.warning(
            "sglang-flexkv %s as a dynamic linker, without patches: CPU tier %.2f GiB%s; no waiting for SSD, "
            "no loading under the forward, no write_back, no second try for a load that fails, nothing "
            "outlives this process",
            __version__,
            cache_config.num_cpu_blocks * engine.slot_bytes / GIB,
            " and SSD" if engine.has_lower_tiers else "",
        )

    # ---- lookup ----

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Leading pages that the CPU tier holds, pinned until they are loaded or looked up again. What
        follows on SSD is brought for the next one that asks."""
        keys = self.page_hashes.keys(rid, transfers[0].keys or ())
        self.states.end_lease(rid)
        if self.config.load_policy is LoadPolicy.RECOMPUTE:
            return []
        num_in_memory = self._pin_in_memory(rid, keys)
        return list(range(1, num_in_memory + 1))

    def _pin_in_memory(self, rid: str, keys: BlockKeys) -> int:
        lease, pinned = self.engine.pin(keys)
        held = pinned.tiers
        below = np.flatnonzero(held != CPU)
        num_in_memory = int(below[0]) if len(below) else len(held)
        if len(below):
            self.engine.unpin(lease)
            self._fetch(rid, keys[: len(held)])
            lease, pinned = self.engine.pin(keys[:num_in_memory])
            num_in_memory = int(np.count_nonzero(pinned.tiers == CPU))
        if num_in_memory:
            self.states.add_lease(rid, lease, num_in_memory)
        return num_in_memory

    def _fetch(self, rid: str, keys: BlockKeys) -> None:
        if rid in self._fetches or len(self._fetches) >= _FETCHES_MAX:
            return
        fetch = self.engine.start_prefetch(keys)
        if fetch is not None:
            self._fetches[rid] = fetch

    def num_completed_offloads(self) -> int:
        """SGLang asks this at each of its steps."""
        self.tick()
        for rid in [rid for rid, fetch in self._fetches.items() if fetch.ended]:
            self.engine.forget_fetch(self._fetches.pop(rid))
        return super().num_completed_offloads()

    # ---- load ----

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        if rid in self._next_batch:  # another request of that id: they cannot be told apart, so it computes
            return False
        queued = super().load(rid, transfers)
        self.states.forget(rid)
        return queued

    def start_layer_wise_loading(self) -> int:
        """Starts the batch's loads and waits for them: which forwards ask for their layers is not known."""
        index = super().start_layer_wise_loading()
        running = [load.task for load in self._loading.get(index, {}).values() if not load.task.ended]
        if not self.engine.wait(running, _LOAD_TIMEOUT_S):
            logger.error("a load has not ended after %.0f s", _LOAD_TIMEOUT_S)
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:  # type: ignore[override]
        """Whether all loads of the batch have landed: SGLang takes one verdict for them all."""
        rids = set(self._loading.get(counter_index, ()))
        return bool(rids) and super().finish_layer_wise_loading(counter_index) == rids

    # ---- lifecycle ----

    def reset(self) -> None:
        for fetch in self._fetches.values():
            self.engine.forget_fetch(fetch)
        self._fetches.clear()
        super().reset()

    def close(self) -> None:
        self.states.clear()  # of requests that have ended before they loaded: nobody says so
        super().close()


def _config(extra_config: Mapping[str, Any]) -> FlexKVConfig:
    """Settings from the file that is named in SGLang's ``linker_extra_config``, and from the environment."""
    unknown: Sequence[str] = sorted(extra_config.keys() - {_SETTING})
    if unknown:
        raise ConfigError(
            f"linker_extra_config: {', '.join(unknown)} is not known; it takes {_SETTING}, the file with our "
            "settings"
        )
    config = FlexKVConfig.load(extra_config.get(_SETTING))
    if config.write_policy is not WritePolicy.WRITE_THROUGH:
        raise ConfigError(
            f"write_policy: {config.write_policy.value} needs a supported version of SGLang and "
            "--enable-flexkv; a dynamic linker stores when a prompt is inserted: write_through"
        )
    if config.remote is not None:
        raise ConfigError(
            "remote: a dynamic linker is not told when weights change, so it shares nothing with other "
            "servers; leave it out"
        )
    return config
