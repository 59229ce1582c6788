"""What of SGLang we cannot be combined with: flags, and models whose state we do not store."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang_flexkv.common.config import FlexKVConfig, WritePolicy
from sglang_flexkv.common.errors import ConfigError, IncompatibleError
from sglang_flexkv.integration.compat import version

# NEXTN is resolved to EAGLE.
_SPECULATIVE = ("EAGLE", "EAGLE3", "NEXTN", "NGRAM")

# Flag, whether it is set in a way we cannot serve, and what to do. Fields are SGLang's own names.
_CONFLICTS = (
    ("enable_hierarchical_cache", bool, "--enable-hierarchical-cache, another host cache; drop it"),
    ("enable_lmcache", bool, "--enable-lmcache, another external cache; drop it"),
    (
        "enable_unified_cache_external_linker",
        bool,
        "--enable-unified-cache-external-linker, which selects another external cache; drop it",
    ),
    ("radix_cache_backend", bool, "--radix-cache-backend, which selects another cache; drop it"),
    ("disable_radix_cache", bool, "--disable-radix-cache, which leaves nothing to extend; drop it"),
    (
        "enable_unified_memory",
        bool,
        "--enable-unified-memory, which moves KV between slots on its own; drop it",
    ),
    ("enable_hisparse", bool, "--enable-hisparse, which keeps KV on the host on its own; drop it"),
    (
        "speculative_algorithm",
        lambda v: v not in (None, *_SPECULATIVE),
        "--speculative-algorithm {value}, whose draft keeps state that is not cached yet; use EAGLE, EAGLE3, "
        "NEXTN or NGRAM, or drop it",
    ),
    (
        "enable_kv_cache_sharding",
        bool,
        "--enable-kv-cache-sharding, which spreads pages over the ranks; drop it",
    ),
    (
        "prefill_only_disable_kv_cache",
        bool,
        "--prefill-only-disable-kv-cache, which leaves nothing to cache; drop it",
    ),
    ("enable_pdmux", bool, "--enable-pdmux, which computes prefills on streams of its own; drop it"),
    (
        "enable_int8_mamba_checkpoint",
        bool,
        "--enable-int8-mamba-checkpoint, which keeps states in a pool of their own; drop it",
    ),
    (
        "enable_linear_replayssm",
        bool,
        "--enable-linear-replayssm, whose states lag behind their tokens; drop it",
    ),
    (
        "mamba_radix_cache_strategy",
        lambda v: v == "extra_buffer_lazy",
        "--mamba-radix-cache-strategy {value}, whose slots come and go under a request; use extra_buffer",
    ),
    ("pp_size", lambda v: v > 1, "--pp-size above 1 yet; use --tp-size"),
    ("dcp_size", lambda v: v > 1, "--dcp-size above 1 yet; leave it at 1"),
    (
        "enable_dsa_cache_layer_split",
        bool,
        "--enable-dsa-cache-layer-split, which spreads the layers' KV over the ranks; drop it",
    ),
    (
        "disaggregation_mode",
        lambda v: v not in (None, "null", "prefill"),
        "--disaggregation-mode {value}, where SGLang never looks below its tree, and never unlocks what it "
        "has stored there; use it on the prefill server alone",
    ),
)

_STATES = "Mamba or linear-attention state"

_DEVICES = ("cpu", "cuda")


def check_flags(view: Any, given: Any) -> None:
    """Raises IncompatibleError if flags of SGLang cannot be combined with --enable-flexkv.

    Args:
        view: SGLang's resolved arguments.
        given: the same as the user gave them.
    """
    for name, refused, remedy in _CONFLICTS:
        value = _value(partial(getattr, view), name)
        if value is None or not refused(value):
            continue
        remedy = remedy.format(value=value)
        if refused(getattr(given, name)):
            raise IncompatibleError(f"--enable-flexkv does not work with {remedy}")
        what, _, _ = remedy.partition("; ")
        raise IncompatibleError(
            f"--enable-flexkv does not work with {what}. You have not given it: SGLang set it for this "
            "model, or for another flag that its log names above; drop that flag, or --enable-flexkv"
        )
    if view.disaggregation_mode == "prefill" and version.is_0_5_22():
        raise IncompatibleError(
            "--enable-flexkv does not work with --disaggregation-mode prefill in SGLang 0.5.22, which sends "
            "KV that is still being loaded: pip install sglang==0.5.23"
        )
    if view.disaggregation_mode == "prefill" and view.speculative_algorithm:
        raise IncompatibleError(
            "--enable-flexkv does not work with --disaggregation-mode and --speculative-algorithm together "
            "yet; drop one of them"
        )
    if view.attn_cp_size > 1:
        _check_context_parallel(view)
    if view.device not in _DEVICES:
        raise IncompatibleError(
            f"--device {view.device} is not supported: sglang-flexkv copies from and to {', '.join(_DEVICES)}"
        )


def _check_context_parallel(view: Any) -> None:
    """The ranks that share the computing of a prompt each get its whole KV, and store it as ranks of tensor
    parallelism do theirs. They are asked for that by SGLang's prefill strategies alone."""
    if not view.enable_prefill_cp:
        raise IncompatibleError(
            "--enable-flexkv works with --attn-cp-size above 1 only where prefills are shared, after which "
            "every rank has all KV of a prompt; add --enable-prefill-cp and --cp-strategy, or leave it at 1"
        )
    if view.speculative_algorithm:
        raise IncompatibleError(
            "--enable-flexkv does not work with --enable-prefill-cp and --speculative-algorithm together "
            "yet; drop one of them"
        )


def check_dynamic_linker(read: Callable[[str], Any], params: Any, components: set[Any]) -> None:
    """Raises IncompatibleError for what a linker cannot be combined with that SGLang drives itself.

    Args:
        read: value of a resolved argument of SGLang by its name; raises for a name that is not one.
        params: of the cache that SGLang builds.
        components: of its tree.
    """
    others = sorted(component.name for component in components if component.name != "FULL")
    if others:
        raise IncompatibleError(
            f"this model keeps {', '.join(others)} state beside full-attention KV, which the dynamic linker "
            "does not store; start without it"
        )
    drafts = ("mtp_draft_device_pools", "sidecar_draft_device_pools")
    if _value(read, "speculative_algorithm") or any(getattr(params, name, ()) for name in drafts):
        raise IncompatibleError(
            "the dynamic linker does not work with --speculative-algorithm, which keeps KV of a draft model; "
            "drop it"
        )
    if (_value(read, "attn_cp_size") or 1) > 1:
        raise IncompatibleError("the dynamic linker does not work with --attn-cp-size above 1; leave it at 1")
    for name, refused, remedy in _CONFLICTS:
        value = _value(read, name)
        if name != "enable_unified_cache_external_linker" and value is not None and refused(value):
            raise IncompatibleError(f"the dynamic linker does not work with {remedy.format(value=value)}")


def _value(read: Callable[[str], Any], name: str) -> Any:
    try:
        return read(name)
    except (ValueError, AttributeError):  # in this version there is no such argument
        return None


def check_model(
    model: Any,
    config: FlexKVConfig,
    *,
    disaggregated: bool = False,
    context_parallel: bool = False,
) -> None:
    """Raises IncompatibleError for models whose state is not stored, and ConfigError for settings that cannot
    be combined with a model, before it is loaded.

    Args:
        model: SGLang's ModelConfig.
        disaggregated: the KV goes to another server, which decodes.
        context_parallel: ranks share the computing of a prompt.
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import get_dsa_index_kpool_compress, is_minimax_sparse

    has_states = mambaish_config(model) is not None
    others = {
        "sliding windows (with this version of SGLang)": model.is_hybrid_swa and version.is_0_5_22(),
        f"{_STATES} (with this version of SGLang)": has_states and version.is_0_5_22(),
        "the index keys of MiniMax's sparse attention": is_minimax_sparse(model.hf_config),
    }
    # A page's index key would depend on the request that is computing it.
    if get_dsa_index_kpool_compress(model.hf_config):
        others["index keys that wait for more tokens (index_kpool_compress)"] = True
    found = [name for name, there in others.items() if there]
    if found:
        raise IncompatibleError(
            f"the model {model.model_path} keeps {', '.join(found)} beside full-attention KV, which "
            "sglang-flexkv does not store yet; start without --enable-flexkv"
        )
    kept = {_STATES: has_states, "sliding windows": model.is_hybrid_swa}
    keeps = " and ".join(name for name, there in kept.items() if there)
    flags = {
        "--disaggregation-mode": disaggregated,
        "--enable-prefill-cp": has_states and context_parallel,
    }
    for flag in (flag for flag, given in flags.items() if given and keeps):
        raise IncompatibleError(
            f"the model {model.model_path} keeps {keeps}: --enable-flexkv does not work with it and "
            f"{flag} yet; drop one of them"
        )
    if keeps:
        _check_parts(model.model_path, keeps, config)


def _check_parts(model_path: str, keeps: str, config: FlexKVConfig) -> None:
    """Windows and states leave the device without being asked for."""
    why = f"the model {model_path} keeps {keeps} beside full-attention KV"
    if config.write_policy is WritePolicy.WRITE_BACK:
        raise ConfigError(
            f"write_policy: {why}, which may have left the device before a prefix is evicted: "
            "write_back does not store that; use write_through"
        )


def check_components(tree_components: tuple[Any, ...]) -> None:
    """Raises IncompatibleError for models whose state is more than full-attention KV, sliding windows and
    recurrent state."""
    known = ("FULL", "SWA", "MAMBA")
    others = [component.name for component in tree_components if component.name not in known]
    if others:
        raise IncompatibleError(
            f"this model keeps {', '.join(others)} state beside full-attention KV, which sglang-flexkv does "
            "not store yet; start without --enable-flexkv"
        )


def check_boundaries(has_windows: bool) -> None:
    """Raises IncompatibleError where a prefix on the device may lack its window: what is loaded behind it is
    of no use then."""
    if not has_windows:
        raise IncompatibleError(
            "SGLang keeps sliding windows that belong to requests or to a draft model here, and finds "
            "prefixes without them, which sglang-flexkv cannot restore; start without --enable-flexkv"
        )
