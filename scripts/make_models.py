"""Make the small random-weight models that the tests and the demo run.

    python scripts/make_models.py [NAME ...] [--out models] [--force]

Nothing is downloaded. A model directory holds what SGLang loads: `config.json`,
`model.safetensors`, and a byte-level BPE tokenizer trained on the sources of Python's
standard library. The same Python, package versions and script give the same files; a
model that is up to date is left alone (its `recipe.json` says what it was made from).

The weights are random but not arbitrary. Outputs have to show whether the right KV cache
was used, so:

* Attention is sharp (`ATTENTION_GAIN`). Untrained attention averages its whole context,
  and a wrong or missing piece of cache would hardly move the result.
* Greedy outputs vary: input embeddings and output head are independent, otherwise a
  random model just repeats its last token.
* The best token wins by a margin: rows of the output head differ in length
  (`HEAD_SPREAD`), so rounding does not decide between near-equal logits.
* Special tokens have a zero row in the output head: greedy generation never ends early.

Weights are stored in bfloat16, so `--dtype float32` and `--dtype bfloat16` run the same model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

SEED = 20261121
POSITIONS_MAX = 16384
VOCABULARY_SIZE = 4096
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
TRAINING_TEXT_BYTES_MAX = 4 << 20

ATTENTION_GAIN = 1.5
HEAD_SPREAD = 0.3

# One line per message is enough: the models do not understand what they read.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and spread of one tensor. `std` 0 means a norm weight, filled with ones."""

    name: str
    shape: tuple[int, ...]
    std: float


@dataclass(frozen=True)
class ModelSpec:
    """One model: what it is for, its `config.json`, and the tensors that go with it."""

    name: str
    purpose: str
    config: dict[str, Any]
    tensors: Callable[[dict[str, Any]], Iterator[TensorSpec]]


def common_config(**fields: Any) -> dict[str, Any]:
    """Fields every model here shares; token ids follow the order of `SPECIAL_TOKENS`."""
    return {
        "vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": POSITIONS_MAX,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_theta": 10000.0,
        **fields,
    }


def llama_config(
    *, layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int
) -> dict[str, Any]:
    """A Llama config. KV per token is layers * 2 * kv_heads * head_dim elements."""
    return common_config(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=ffn,
        mlp_bias=False,
        rope_scaling=None,
    )


def mla_config() -> dict[str, Any]:
    """A DeepSeek-V2 config with the latent and RoPE sizes that MLA kernels are built for."""
    return common_config(
        architectures=["DeepseekV2ForCausalLM"],
        model_type="deepseek_v2",
        num_hidden_layers=3,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=704,
        moe_intermediate_size=128,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        moe_layer_freq=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        aux_loss_alpha=0.0,
        seq_aux=True,
        # SGLang's DeepSeek code needs both `rope_scaling` and `moe_layer_freq` to be there.
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": POSITIONS_MAX // 4,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    )


def swa_config() -> dict[str, Any]:
    """A Laguna config, dense, with two layers of a sliding window for each one of full attention."""
    layers = 6
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    return common_config(
        architectures=["LagunaForCausalLM"],
        model_type="laguna",
        num_hidden_layers=layers,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=704,
        gating=False,
        sliding_window=128,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * (layers // 3),
        mlp_layer_types=["dense"] * layers,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        rope_parameters={"full_attention": rope, "sliding_attention": rope},
    )


def gdn_config() -> dict[str, Any]:
    """A Qwen3-Next config: every second layer has linear attention, with recurrent state."""
    return common_config(
        architectures=["Qwen3NextForCausalLM"],
        model_type="qwen3_next",
        num_hidden_layers=4,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=704,
        full_attention_interval=2,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=64,
        shared_expert_intermediate_size=0,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        partial_rotary_factor=0.25,
        rope_scaling=None,
    )


def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> TensorSpec:
    """A projection that keeps the variance of its input (times `gain` squared)."""
    return TensorSpec(f"{name}.weight", (rows, columns), gain / math.sqrt(columns))


def norm(name: str, size: int) -> TensorSpec:
    return TensorSpec(f"{name}.weight", (size,), 0.0)


def swiglu_tensors(prefix: str, hidden: int, ffn: int) -> Iterator[TensorSpec]:
    # silu(a) * b of unit normals has a standard deviation of about 0.6, hence the gain.
    yield matrix(f"{prefix}.gate_proj", ffn, hidden)
    yield matrix(f"{prefix}.up_proj", ffn, hidden)
    yield matrix(f"{prefix}.down_proj", hidden, ffn, gain=1.7)


def outer_tensors(config: dict[str, Any]) -> Iterator[TensorSpec]:
    hidden = config["hidden_size"]
    yield TensorSpec("model.embed_tokens.weight", (VOCABULARY_SIZE, hidden), 1.0)
    yield norm("model.norm", hidden)
    yield matrix("lm_head", VOCABULARY_SIZE, hidden, gain=3.0)
    for layer in range(config["num_hidden_layers"]):
        yield norm(f"model.layers.{layer}.input_layernorm", hidden)
        yield norm(f"model.layers.{layer}.post_attention_layernorm", hidden)


def llama_tensors(config: dict[str, Any]) -> Iterator[TensorSpec]:
    yield from outer_tensors(config)
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    for layer in range(config["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn"
        yield matrix(f"{attention}.q_proj", q_size, hidden, gain=ATTENTION_GAIN)
        yield matrix(f"{attention}.k_proj", kv_size, hidden, gain=ATTENTION_GAIN)
        yield matrix(f"{attention}.v_proj", kv_size, hidden)
        yield matrix(f"{attention}.o_proj", hidden, q_size, gain=2.0)
        yield from swiglu_tensors(f"model.layers.{layer}.mlp", hidden, config["intermediate_size"])


def swa_tensors(config: dict[str, Any]) -> Iterator[TensorSpec]:
    yield from llama_tensors(config)
    for layer in range(config["num_hidden_layers"]):
        for part in ("q_norm", "k_norm"):
            yield norm(f"model.layers.{layer}.self_attn.{part}", config["head_dim"])


def gdn_tensors(config: dict[str, Any]) -> Iterator[TensorSpec]:
    yield from outer_tensors(config)
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    heads = config["linear_num_value_heads"]
    k_size = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    v_size = heads * config["linear_value_head_dim"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        if (layer + 1) % config["full_attention_interval"] == 0:
            attention = f"{prefix}.self_attn"
            # With a gate for each element of the output.
            yield matrix(f"{attention}.q_proj", 2 * q_size, hidden, gain=ATTENTION_GAIN)
            yield matrix(f"{attention}.k_proj", kv_size, hidden, gain=ATTENTION_GAIN)
            yield matrix(f"{attention}.v_proj", kv_size, hidden)
            yield matrix(f"{attention}.o_proj", hidden, q_size, gain=2.0)
            for part in ("q_norm", "k_norm"):
                yield norm(f"{attention}.{part}", head_dim)
        else:
            attention = f"{prefix}.linear_attn"
            yield matrix(f"{attention}.in_proj_qkvz", 2 * (k_size + v_size), hidden)
            yield matrix(f"{attention}.in_proj_ba", 2 * heads, hidden)
            convolved = (2 * k_size + v_size, 1, config["linear_conv_kernel_dim"])
            yield TensorSpec(f"{attention}.conv1d.weight", convolved, 0.5)
            yield TensorSpec(f"{attention}.A_log", (heads,), 0.5)
            yield TensorSpec(f"{attention}.dt_bias", (heads,), 0.5)
            yield norm(f"{attention}.norm", config["linear_value_head_dim"])
            yield matrix(f"{attention}.out_proj", hidden, v_size, gain=2.0)
        mlp, expert_ffn = f"{prefix}.mlp", config["moe_intermediate_size"]
        yield matrix(f"{mlp}.gate", config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            yield from swiglu_tensors(f"{mlp}.experts.{expert}", hidden, expert_ffn)


def mla_tensors(config: dict[str, Any]) -> Iterator[TensorSpec]:
    yield from outer_tensors(config)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    latent, v_dim = config["kv_lora_rank"], config["v_head_dim"]
    for layer in range(config["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn"
        yield matrix(f"{attention}.q_proj", heads * (nope + rope), hidden, gain=ATTENTION_GAIN)
        yield matrix(f"{attention}.kv_a_proj_with_mqa", latent + rope, hidden, gain=ATTENTION_GAIN)
        yield norm(f"{attention}.kv_a_layernorm", latent)
        yield matrix(f"{attention}.kv_b_proj", heads * (nope + v_dim), latent)
        yield matrix(f"{attention}.o_proj", hidden, heads * v_dim, gain=2.0)
        mlp = f"model.layers.{layer}.mlp"
        if layer < config["first_k_dense_replace"]:
            yield from swiglu_tensors(mlp, hidden, config["intermediate_size"])
            continue
        expert_ffn = config["moe_intermediate_size"]
        yield matrix(f"{mlp}.gate", config["n_routed_experts"], hidden)
        for expert in range(config["n_routed_experts"]):
            yield from swiglu_tensors(f"{mlp}.experts.{expert}", hidden, expert_ffn)
        shared_ffn = expert_ffn * config["n_shared_experts"]
        yield from swiglu_tensors(f"{mlp}.shared_experts", hidden, shared_ffn)


MODELS = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "tiny-mha",
            "every query head has its own KV head; 2,048 KV elements per token",
            llama_config(layers=4, hidden=256, heads=4, kv_heads=4, head_dim=64, ffn=704),
            llama_tensors,
        ),
        ModelSpec(
            "tiny-gqa",
            "two query heads share a KV head; 1,024 KV elements per token; tensor parallel up to 2",
            llama_config(layers=4, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=704),
            llama_tensors,
        ),
        ModelSpec(
            "small-gqa",
            "a prefill worth caching; 2,048 KV elements per token (4 KiB bfloat16, 8 KiB float32)",
            # Wide layers, few heads: SGLang's attention on CPU computes every query again even for
            # a cached prefix, so what a cache cannot save there is kept small.
            llama_config(layers=8, hidden=1024, heads=4, kv_heads=2, head_dim=64, ffn=4096),
            llama_tensors,
        ),
        ModelSpec(
            "tiny-mla",
            "multi-head latent attention and a mixture of experts; 1,728 KV elements per token",
            mla_config(),
            mla_tensors,
        ),
        ModelSpec(
            "tiny-swa",
            "two layers in three have a sliding window of 128 tokens; KV in two pools",
            swa_config(),
            swa_tensors,
        ),
        ModelSpec(
            "tiny-gdn",
            "every second layer has linear attention; a state for a request beside KV",
            gdn_config(),
            gdn_tensors,
        ),
    )
}


def seed_of(name: str) -> int:
    """A seed per tensor name: a tensor does not change when another one is added or moved."""
    return int.from_bytes(hashlib.sha256(f"{SEED}:{name}".encode()).digest()[:7], "little")


def make_tensor(spec: TensorSpec) -> Any:
    """The tensor in bfloat16, drawn from its own generator."""
    import torch

    if spec.std == 0.0:
        return torch.ones(spec.shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed_of(spec.name))
    values = torch.randn(spec.shape, generator=generator) * spec.std
    if spec.name == "lm_head.weight":
        values *= torch.exp(HEAD_SPREAD * torch.randn((spec.shape[0], 1), generator=generator))
        values[: len(SPECIAL_TOKENS)] = 0.0
    return values.to(torch.bfloat16)


def training_text() -> Iterator[str]:
    """Sources of the standard library in a fixed order, up to `TRAINING_TEXT_BYTES_MAX`."""
    left_bytes = TRAINING_TEXT_BYTES_MAX
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        yield text
        left_bytes -= len(text)
        if left_bytes <= 0:
            return


def make_tokenizer(directory: Path) -> None:
    """Train the BPE tokenizer and write the files `transformers` loads it from."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY_SIZE:
        raise RuntimeError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens instead of {VOCABULARY_SIZE}: "
            "the standard library's sources are missing or too short (is this a stripped Python?)"
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    bos, eos, pad = SPECIAL_TOKENS
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "model_max_length": POSITIONS_MAX,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def recipe_of(spec: ModelSpec) -> dict[str, str]:
    """What decides the content of a model directory; a change in it means "make it again"."""
    return {
        "model": spec.name,
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "python": platform.python_version(),
    }


def is_current(spec: ModelSpec, directory: Path) -> bool:
    try:
        return bool(json.loads((directory / "recipe.json").read_text()) == recipe_of(spec))
    except (OSError, ValueError):
        return False


def make_model(spec: ModelSpec, directory: Path) -> int:
    """Make one model in `directory`, replacing what is there. Returns its parameter count.

    The files are written beside it and moved into place at the end, with `recipe.json` among
    them: an interrupted run leaves nothing that looks finished.
    """
    from safetensors.torch import save_file

    scratch = directory.with_name(directory.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tensors = {tensor.name: make_tensor(tensor) for tensor in spec.tensors(spec.config)}
    save_file(tensors, str(scratch / "model.safetensors"), metadata={"format": "pt"})
    write_json(scratch / "config.json", spec.config)
    generation = {key: spec.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(scratch / "generation_config.json", generation)
    make_tokenizer(scratch)
    write_json(scratch / "recipe.json", recipe_of(spec))
    shutil.rmtree(directory, ignore_errors=True)
    scratch.rename(directory)
    return sum(tensor.numel() for tensor in tensors.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the small random-weight models.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "models", help="where to put them")
    parser.add_argument("--force", action="store_true", help="make them even if up to date")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    for name in options.names or MODELS:
        spec, directory = MODELS[name], options.out / name
        if not options.force and is_current(spec, directory):
            print(f"{name}: up to date ({directory})")
            continue
        print(f"{name}: {spec.purpose}", flush=True)
        start_s = time.monotonic()
        parameters = make_model(spec, directory)
        size_mb = (directory / "model.safetensors").stat().st_size / 1e6
        print(
            f"{name}: {parameters / 1e6:.1f} M parameters, {size_mb:.0f} MB, "
            f"made in {time.monotonic() - start_s:.1f} s ({directory})",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
