"""The bodies of the patches. Each does one thing and leaves the rest to stock SGLang.

All of them do nothing unless ``--enable-flexkv`` is set: an SGLang with this package installed but not
enabled runs as if it were not there.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_flexkv.common.config import FlexKVConfig
from sglang_flexkv.common.errors import FlexKVError
from sglang_flexkv.integration import checks
from sglang_flexkv.integration.compat import hooking, refused

if TYPE_CHECKING:
    from sglang_flexkv.integration.model_identity import Settings

logger = logging.getLogger(__name__)

# 16 tokens are FlexKV's own default: 0.5 to 8 MiB per block for most models, small enough to lose little of
# a prompt's end and large enough for one I/O per block.
DEFAULT_PAGE_SIZE = 16

# What this process' arguments and environment said before its scheduler loaded the model.
_at_start: Settings | None = None


def around_scheduler_init(original: Callable[..., None], scheduler: Any, *args: Any, **kwargs: Any) -> None:
    from sglang.srt.runtime_context import get_context, get_memory

    if not get_memory().enable_flexkv:
        original(scheduler, *args, **kwargs)
        return
    from sglang_flexkv.integration.model_identity import settings

    global _at_start
    try:
        _check_applied()
        _at_start = settings(get_context().config_leaf)
        get_context().override("sglang-flexkv", enable_unified_cache_external_linker=True)
        original(scheduler, *args, **kwargs)
    except FlexKVError:
        if multiprocessing.parent_process() is None:
            raise
        # What SGLang does with an error of its scheduler, without the traceback: the reason is logged.
        os.kill(os.getppid(), signal.SIGQUIT)
        sys.exit(1)
    # The gate for prefetching while a request waits in the queue, for counting the cache's transfers as
    # work in progress, and for the storage field of the cache report.
    scheduler.enable_lmcache = True
    scheduler.tree_cache.attach_scheduler(scheduler)


def around_create_unified_radix_cache(original: Callable[..., Any], ctx: Any, **kwargs: Any) -> Any:
    from sglang.srt.runtime_context import get_memory

    if not get_memory().enable_flexkv:
        return original(ctx, **kwargs)
    from sglang_flexkv.integration.build import build_radix_cache

    try:
        return build_radix_cache(original, ctx, _at_start)
    except FlexKVError as error:
        logger.error("sglang-flexkv cannot start: %s", error)
        raise


def after_create_tree_cache(cache: Any, ctx: Any) -> None:
    from sglang.srt.runtime_context import get_memory

    if not get_memory().enable_flexkv:
        return
    from sglang_flexkv.integration.radix_cache import FlexKVRadixCache

    # Also here, in case the patch of the scheduler is the one that is missing.
    _check_applied()
    if not isinstance(cache, FlexKVRadixCache):
        raise FlexKVError(
            f"--enable-flexkv is set but SGLang built {type(cache).__name__} instead of FlexKVRadixCache; "
            "another flag or plugin selects the cache. Run 'sglang-flexkv status'"
        )


def around_page_size_default(original: Callable[[Any], dict[str, Any]], view: Any) -> dict[str, Any]:
    chosen = original(view)
    if view.enable_flexkv and chosen.get("page_size") == 1 and not _needs_pages_of_one_token(view):
        # SGLang wants chunks of whole pages, and would complain about a page size that nobody typed.
        chunk = view.chunked_prefill_size or 0
        page_size = math.gcd(DEFAULT_PAGE_SIZE, chunk) if chunk > 0 else DEFAULT_PAGE_SIZE
        if _takes_states(view):
            page_size = math.gcd(page_size, view.mamba_track_interval)  # states are taken at ends of pages
        logger.info(
            "sglang-flexkv: --page-size is not set; using %d tokens per page and block instead of 1",
            page_size,
        )
        return {**chosen, "page_size": page_size}
    return chosen


def _takes_states(view: Any) -> bool:
    """Whether recurrent state is kept as it was at some tokens on the way, beside that at the end."""
    return bool(view.uses_mamba_radix_cache) and view.mamba_radix_cache_strategy != "no_buffer"


def _needs_pages_of_one_token(view: Any) -> bool:
    """Whether longer pages do not do, and SGLang would refuse a page size that nobody typed: of recurrent
    state there is only that at the end of a prompt, or drafts are trees, which some attention backends cannot
    check in longer pages."""
    if view.uses_mamba_radix_cache and not _takes_states(view):
        return True
    backend = view.attention_backend
    if view.speculative_algorithm == "NGRAM":
        return (view.speculative_ngram_max_bfs_breadth or 0) > 1 and backend != "flashinfer"
    is_tree = view.speculative_algorithm is not None and (view.speculative_eagle_topk or 1) > 1
    return is_tree and backend not in (None, "flashinfer", "fa3", "triton")


def around_cached_tokens_details(
    original: Callable[[Any, Any], dict[str, Any] | None], streamer: Any, req: Any
) -> dict[str, Any] | None:
    from sglang.srt.runtime_context import get_memory

    details = original(streamer, req)
    # No look at the cache itself: with the flag set, none but ours was let through.
    if details is not None and "storage_backend" in details and get_memory().enable_flexkv:
        from sglang_flexkv.integration.compat.requests import storage_name

        details["storage_backend"] = storage_name(req, details["storage"])
    return details


def before_next_batch(scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    from sglang.srt.runtime_context import get_memory

    if get_memory().enable_flexkv:
        scheduler.tree_cache.failed_loads.run_again(scheduler)


def before_abort(scheduler: Any, recv_req: Any) -> None:
    from sglang.srt.runtime_context import get_memory

    if get_memory().enable_flexkv:
        scheduler.tree_cache.failed_loads.abort(scheduler, recv_req.rid, all_requests=recv_req.abort_all)


def around_stream_output(
    original: Callable[..., None], streamer: Any, reqs: list[Any], *args: Any, **kwargs: Any
) -> None:
    from sglang.srt.runtime_context import get_memory

    from sglang_flexkv.integration.compat.failed_loads import without_failed

    original(streamer, without_failed(reqs) if get_memory().enable_flexkv else reqs, *args, **kwargs)


def before_embedding(worker: Any, batch: Any) -> None:
    from sglang.srt.runtime_context import get_memory

    if get_memory().enable_flexkv:
        worker.set_hicache_consumer(batch.hicache_consumer_index)


def around_get_hash_str(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.runtime_context import get_memory

    from sglang_flexkv.integration.compat.sglang_hashes import hash_tokens, native_works

    if get_memory().enable_flexkv and not native_works():
        return hash_tokens(*args, **kwargs)
    return original(*args, **kwargs)


def before_flush(scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    from sglang.srt.runtime_context import get_memory

    if get_memory().enable_flexkv:
        scheduler.tree_cache.settle(scheduler)


def before_release_memory(updater: Any, *_args: Any, **_kwargs: Any) -> None:
    before_flush(updater.scheduler)


def before_weights_change(updater: Any, *_args: Any, **_kwargs: Any) -> None:
    from sglang.srt.runtime_context import get_memory

    if get_memory().enable_flexkv:
        updater.scheduler.tree_cache.weights_changed()


def before_check_weights(updater: Any, recv_req: Any) -> None:
    if recv_req.action == "reset_tensors":
        before_weights_change(updater)


def before_resume_memory(updater: Any, recv_req: Any) -> None:
    from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
    from sglang.srt.runtime_context import get_exec

    features = get_exec().features
    # Without the saver nothing was released, and with a backup the same bytes come back.
    lost = features.enable_memory_saver and not features.enable_weights_cpu_backup
    if lost and (not recv_req.tags or GPU_MEMORY_TYPE_WEIGHTS in recv_req.tags):
        before_weights_change(updater)


def after_check_server_args(_result: Any, server_args: Any) -> None:
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view

    view = resolving_view(server_args)
    if not view.enable_flexkv:
        return
    try:
        refused.check_flags(view, server_args)
        config = FlexKVConfig.load(view.flexkv_config_file)
        checks.check_machine(config)
        model = model_config_of(server_args)
        disaggregated = view.disaggregation_mode not in (None, "null")
        refused.check_model(
            model,
            config,
            disaggregated=disaggregated,
            context_parallel=view.attn_cp_size > 1,
        )
        checks.check_ssd(config, view, model)
    except FlexKVError as error:
        if _is_command_line():
            # One line for the user who typed the flag, without the launcher's traceback.
            logger.error("sglang-flexkv cannot start: %s", error)
            sys.exit(1)
        raise


def _check_applied() -> None:
    try:
        hooking.check_applied()
    except FlexKVError as error:
        logger.error("sglang-flexkv cannot start: %s", error)
        raise


def _is_command_line() -> bool:
    return os.path.basename(sys.argv[0]) in ("launch_server.py", "sglang")
