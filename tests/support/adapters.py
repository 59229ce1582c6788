"""LoRA adapters with random weights, in the files that SGLang loads them from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

_RANK = 8


def make_adapter(directory: Path, model: Path, seed: int) -> Path:
    """Writes an adapter of the attention of a generated model, strong enough to change what it answers.

    Returns:
        The directory.
    """
    config = json.loads((model / "config.json").read_text())
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    queries, keys = (config[f"num_{what}_heads"] * head_dim for what in ("attention", "key_value"))
    sizes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (columns, rows) in sizes.items():
            projection = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(_RANK, columns, generator=generator) / columns**0.5
            up = torch.randn(rows, _RANK, generator=generator) / _RANK**0.5
            tensors[f"{projection}.lora_A.weight"], tensors[f"{projection}.lora_B.weight"] = down, up
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    described = {
        "peft_type": "LORA",
        "r": _RANK,
        "lora_alpha": _RANK,
        "target_modules": list(sizes),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(described))
    return directory
