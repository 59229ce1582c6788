"""Which arguments and environment variables of SGLang can change the KV of a token sequence, or tell which
weights it loads. ``model_identity`` makes of them what a cache is recognised by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

# Resolved arguments of SGLang, by the names of its own fields.
ARGUMENTS = (
    # What is loaded, and as what.
    "model_path",
    "revision",
    "load_format",
    "model_loader_extra_config",
    "model_impl",
    "model_config_parser",
    "json_model_override_args",  # rope scaling and theta among others
    "context_length",  # some rope variants choose their factors by it
    "is_embedding",
    "enable_multimodal",
    "language_model_only",
    "language_only",
    "custom_weight_loader",
    "weight_version",  # the operator's own word for which weights these are
    # Precision.
    "dtype",
    "quantization",
    "quantization_param_path",  # scales of the KV itself
    "kv_cache_dtype",
    "modelopt_quant",
    "modelopt_checkpoint_restore_path",
    "enable_tf32_matmul",
    "enable_quant_communications",
    "prefill_kv_cache_dequant_dtype",
    "triton_attention_reduce_in_fp32",
    "deepep_dispatcher_output_dtype",
    "enable_w4a4_mxfp4_megamoe",
    "flashinfer_mxfp4_moe_precision",
    "kt_weight_path",
    "kt_method",
    "kt_num_gpu_experts",
    # Kernels. They compute the same up to rounding, but whoever leaves one because it is wrong must not find
    # its KV again, and bitwise reproducible runs cannot mix them.
    "device",
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "mm_attention_backend",
    "fp8_gemm_runner_backend",
    "fp4_gemm_runner_backend",
    "bf16_gemm_backend",
    "moe_runner_backend",
    "moe_a2a_backend",
    "lora_backend",
    "enable_fused_qk_norm_rope",
    "enable_torch_compile",
    "enable_deterministic_inference",
    "rl_on_policy_target",
    # The draft model, whose KV is stored with the target's.
    "speculative_algorithm",
    "speculative_draft_model_path",
    "speculative_draft_model_revision",
    "speculative_draft_load_format",
    "speculative_draft_model_quantization",
    "speculative_draft_attention_backend",
    "speculative_draft_kv_cache_dtype",
    "speculative_draft_window_size",
    "speculative_draft_sink_size",
    "speculative_attention_mode",
    "speculative_moe_runner_backend",
    "speculative_token_map",
    "enable_multi_layer_eagle",
    # What else takes part in the forward pass.
    "forward_hooks",
    "debug_tensor_dump_input_file",
    "dllm_algorithm",
    "dllm_algorithm_config",
    "enable_precise_embedding_interpolation",
    "mm_process_config",
    "image_processor_backend",
    "disable_fast_image_processor",
    "experts_shared_outer_loras",
    "lora_use_virtual_experts",
)
# What else changes the state of recurrent layers, in models that have some.
RECURRENT_ARGUMENTS = (
    "mamba_backend",
    "linear_attn_backend",
    "linear_attn_decode_backend",
    "linear_attn_prefill_backend",
    "enable_mamba_cache_stochastic_rounding",
    "mamba_cache_philox_rounds",
)
# Arguments that name more files to read.
PATH_ARGUMENTS = (
    "quantization_param_path",
    "modelopt_checkpoint_restore_path",
    "decrypted_config_file",
    "kt_weight_path",
    "dllm_algorithm_config",
)
# Formats whose weights are exactly what the model's own files hold. Not here: dummy (the seed is fixed, but
# only floating-point parameters are filled, and others keep what was in memory), and formats that take
# weights from another process, a bucket, or files elsewhere.
FILE_FORMATS = frozenset(
    {
        "auto",
        "bitsandbytes",
        "fastsafetensors",
        "gguf",
        "instanttensor",
        "layered",
        "mistral",
        "npcache",
        "pt",
        "runai_streamer",
        "safetensors",
        "sharded_state",
    }
)

# What SGLang's environment variables are about, judged one by one.
_VARIABLES_FILES = ("sglang_variables.txt", "sglang_variables_0_5_22.txt")


def variables(files: Sequence[str] = _VARIABLES_FILES) -> dict[str, bool]:
    """The environment variables of the versions of SGLang that are supported: whether they change KV."""
    texts = [resources.files(__package__).joinpath(name).read_text(encoding="utf-8") for name in files]
    lines = (line for text in texts for line in text.splitlines())
    judged = (line.split() for line in lines if line.startswith(("yes ", "no ")))
    return {name: verdict == "yes" for verdict, name in judged}


def declared_variables() -> Mapping[str, Any]:
    """SGLang's own declarations of its environment variables (``EnvField``), by name."""
    from sglang.srt.environ import EnvField, envs

    return {name: field for name, field in vars(type(envs)).items() if isinstance(field, EnvField)}
