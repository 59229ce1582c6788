"""A draft model (EAGLE) for a generated one: the same layers again, so that it guesses what that will say."""

from __future__ import annotations

import json
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
    layers["fc.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], 1).to(torch.bfloat16)
    layers["fc.bias"] = torch.zeros(size, dtype=torch.bfloat16)
    directory.mkdir(parents=True)
    save_file(layers, str(directory / "model.safetensors"), metadata={"format": "pt"})
    config["architectures"] = ["LlamaForCausalLMEagle"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory
