"""Model folders for `--load-format dummy`: a config and a tokenizer, no weights.

    python make_gpu_models.py OUT TOKENIZER_DIR

``big-gqa`` has the shape of an 8-billion-parameter Llama (GQA, 128 KiB of KV per token in bf16), ``big-mla``
that of DeepSeek-V2-Lite's attention with dense layers only, so that no kernel for experts is needed. The
vocabulary is the tokenizer's.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_cache": True,
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
}
MODELS: dict[str, dict[str, Any]] = {
    "big-gqa": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
    },
    "big-mla": {
        **COMMON,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_hidden_layers": 27,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        # Every layer is dense: there are experts in name only.
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 27,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "aux_loss_alpha": 0.0,
        "seq_aux": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
}
# The same with fewer and smaller layers, for a try-out on a CPU.
MODELS["little-gqa"] = {
    **MODELS["big-gqa"],
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def main() -> None:
    out, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
    vocabulary = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    for name, fields in MODELS.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**fields, "vocab_size": vocabulary}, indent=1) + "\n")
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(tokenizer / file, folder / file)


if __name__ == "__main__":
    main()
