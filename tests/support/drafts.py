"""Draft models for generated ones: layers of these again, so that they guess what these will say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def make_draft(directory: Path, model: Path) -> Path:
    """Writes a draft model for a Llama.

    What EAGLE's has more is a layer that mixes a token's embedding with what the target made of the token
    before; here it takes the embedding alone. What it has less are two norms, which change little in these
    models.

    Returns:
        The directory.
    """
    config = json.loads((model / "config.json").read_text())
    size = config["hidden_size"]
    layers = {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(str(model / "model.safetensors")).items()
        if name.startswith("model.layers.") and name != "model.layers.0.input_layernorm.weight"
    }
    layers["fc.weight"] = takes_embedding(size)
    layers["fc.bias"] = torch.zeros(size, dtype=torch.bfloat16)
    directory.mkdir(parents=True)
    save_file(layers, str(directory / "model.safetensors"), metadata={"format": "pt"})
    config["architectures"] = ["LlamaForCausalLMEagle"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def make_model_that_guesses(directory: Path, model: Path) -> Path:
    """Writes a Qwen3-Next with a layer that guesses (MTP): one of full attention.

    The layer is a copy of the model's first one of that kind, and what the model's others add is made small.
    So both say nearly the same.

    Returns:
        The directory.
    """
    shutil.copytree(model, directory)
    config = json.loads((model / "config.json").read_text())
    size, copied = config["hidden_size"], config["full_attention_interval"] - 1
    tensors = load_file(str(model / "model.safetensors"))
    adds = (".o_proj.weight", ".out_proj.weight", ".down_proj.weight")
    of_copied = f"model.layers.{copied}."
    for name, tensor in tensors.items():
        if name.endswith(adds) and not name.startswith(of_copied):
            tensors[name] = tensor * 0.02
    layer = {
        name.replace(of_copied, "mtp.layers.0."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(of_copied)
    }
    # It mixes a token's embedding with what the target made of the token before; here it takes the embedding.
    norms = {
        f"mtp.pre_fc_norm_{part}.weight": torch.zeros(size).bfloat16() for part in ("embedding", "hidden")
    }
    last = {"mtp.norm.weight": tensors["model.norm.weight"].clone(), "mtp.fc.weight": takes_embedding(size)}
    save_file(
        {**tensors, **layer, **norms, **last},
        str(directory / "model.safetensors"),
        metadata={"format": "pt"},
    )
    return directory


def takes_embedding(size: int) -> torch.Tensor:
    """Of an embedding and what the target made of the token before it the embedding alone."""
    return torch.cat([torch.eye(size), torch.zeros(size, size)], 1).to(torch.bfloat16)
