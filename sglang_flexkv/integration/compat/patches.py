"""Every place where this package deviates from stock SGLang, in one table.

Each patch is one hook on one function, with the signature it was written for, the reason, and when it can
go. Each has a page of its own in ``patches/`` of the repository. Nothing is patched that is not listed here,
and nothing is patched unless the target still has the expected signature.
"""

from __future__ import annotations

from sglang_flexkv.integration.compat import hooks
from sglang_flexkv.integration.compat.hooking import Patch

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_WEIGHT_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

PATCHES = (
    Patch(
        "open-linker-gates",
        f"{_SCHEDULER}.__init__",
        "around",
        hooks.around_scheduler_init,
        ("self", "server_args", "port_args"),
        "The scheduler calls the external-linker and queue-time prefetch methods of its cache only if its "
        "own flags say so, and no flag means 'a plugin brings the linker'.",
        "SGLang asks the tree cache what it supports instead of reading flags.",
    ),
    Patch(
        "build-our-cache",
        "sglang.srt.mem_cache.registry.create_unified_radix_cache",
        "around",
        hooks.around_create_unified_radix_cache,
        ("ctx", "cache_class"),
        "--enable-flexkv builds SGLang's in-tree FlexKV cache; ours is a subclass of UnifiedRadixCache with "
        "a linker behind it.",
        "register_radix_cache_backend factories can bring a linker and take part in the scheduler's gates.",
    ),
    Patch(
        "never-another-cache",
        "sglang.srt.mem_cache.registry.create_tree_cache",
        "after",
        hooks.after_create_tree_cache,
        ("ctx",),
        "Errors in a plugin are logged and swallowed, and another cache is built silently.",
        "SGLang stops when a plugin that a flag asks for cannot be loaded.",
    ),
    Patch(
        "block-size-default",
        "sglang.srt.arg_groups.overrides._page_size_default",
        "around",
        hooks.around_page_size_default,
        ("view",),
        "SGLang's default page of one token makes blocks of one token: an index entry and an I/O for each.",
        "SGLang lets a cache choose the default page size.",
    ),
    Patch(
        "check-flags-early",
        "sglang.srt.server_args.ServerArgs.check_server_args",
        "after",
        hooks.after_check_server_args,
        ("self",),
        "SGLang does not know which of its flags cannot work together with ours.",
        "Plugins can take part in argument validation.",
    ),
    Patch(
        "storage-backend-name",
        "sglang.srt.managers.scheduler_components.output_streamer."
        "SchedulerOutputStreamer.get_cached_tokens_details",
        "around",
        hooks.around_cached_tokens_details,
        ("self", "req"),
        "cached_tokens_details.storage_backend says 'none' for a cache without SGLang's own controller, and "
        "has one name for all requests.",
        "SGLang asks the tree cache for the name of a request's storage.",
    ),
    Patch(
        "failed-loads-run-again",
        f"{_SCHEDULER}.get_next_batch_to_run",
        "before",
        hooks.before_next_batch,
        ("self", "running_batch", "last_batch"),
        "A request whose KV fails to load after it was admitted is ended with an error (HTTP 503); it can be "
        "computed instead, and goes back to the queue when no batch holds it any more.",
        "SGLang retracts a request whose external load failed instead of aborting it.",
    ),
    Patch(
        "failed-loads-stay-silent",
        "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output",
        "around",
        hooks.around_stream_output,
        ("self", "reqs", "return_logprob", "skip_req"),
        "The error with which SGLang ends such a request must not reach the client.",
        "With failed-loads-run-again.",
    ),
    Patch(
        "failed-loads-can-be-aborted",
        f"{_SCHEDULER}.abort_request",
        "before",
        hooks.before_abort,
        ("self", "recv_req"),
        "Between its failed attempt and the next one such a request is in no queue that an abort looks at.",
        "With failed-loads-run-again.",
    ),
    Patch(
        "weights-loaded",
        f"{_WEIGHT_UPDATER}._observe_weight_load",
        "before",
        hooks.before_weights_change,
        ("self", "source"),
        "The cache is told to flush after an update of the weights as at any other time, and not at all if "
        "the update fails half way or asks for no flush; KV of the new weights would be stored under the "
        "name of the old ones.",
        "SGLang tells the tree cache that the weights change.",
    ),
    Patch(
        "weights-session",
        f"{_WEIGHT_UPDATER}.begin_weight_update",
        "before",
        hooks.before_weights_change,
        ("self", "recv_req"),
        "Between begin_weight_update and end_weight_update another process may write the weights straight "
        "into memory; SGLang flushes nothing then and calls nothing else.",
        "SGLang tells the tree cache that the weights change.",
    ),
    Patch(
        "weights-resumed",
        f"{_WEIGHT_UPDATER}.resume_memory_occupation",
        "before",
        hooks.before_resume_memory,
        ("self", "recv_req"),
        "Released weights come back with undefined contents unless SGLang keeps a copy on the host, and are "
        "filled in any way the caller likes.",
        "SGLang tells the tree cache that the weights change.",
    ),
    Patch(
        "weights-reset",
        f"{_WEIGHT_UPDATER}.check_weights",
        "before",
        hooks.before_check_weights,
        ("self", "recv_req"),
        "The action reset_tensors of SGLang's weight checker makes every weight random, and flushes nothing.",
        "SGLang tells the tree cache that the weights change.",
    ),
    Patch(
        "settle-before-flush",
        f"{_SCHEDULER}.flush_cache",
        "before",
        hooks.before_flush,
        ("self", "empty_cache"),
        "Copies to the CPU tier are work in progress until the scheduler's next step, and SGLang refuses to "
        "flush while there is any. A request that has just ended leaves some, so an update of the weights "
        "right behind it would fail and leave the old KV in place.",
        "SGLang lets the tree cache end its copies before it asks whether it is idle.",
    ),
    Patch(
        "settle-before-release",
        f"{_WEIGHT_UPDATER}.release_memory_occupation",
        "before",
        hooks.before_release_memory,
        ("self", "recv_req"),
        "The scheduler ends with a failed assertion if it is told to release its memory while there is work "
        "in progress, which copies to the CPU tier are until its next step.",
        "With settle-before-flush.",
    ),
    Patch(
        "embeddings-wait",
        "sglang.srt.managers.tp_worker.BaseTpWorker.forward_batch_embedding",
        "before",
        hooks.before_embedding,
        ("self", "batch"),
        "SGLang tells the KV pool which loads a forward depends on when it generates, not when it embeds: "
        "the forward reads layers that have not arrived, and the embedding is wrong.",
        "SGLang calls set_hicache_consumer in forward_batch_embedding as in forward_batch_generation.",
    ),
    Patch(
        "hashes-without-a-compiler",
        "sglang.srt.mem_cache.utils.get_hash_str",
        "around",
        hooks.around_get_hash_str,
        ("token_ids", "prior_hash", "page_size"),
        "SGLang compiles its hashing of pages when a cache with a store below it first needs it. Where it "
        "finds no compiler, no headers of OpenSSL or nowhere to write, the first request ends the server.",
        "SGLang ships its hashing compiled, or hashes without it.",
    ),
)
