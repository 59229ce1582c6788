"""What SGLang needs on a machine without an accelerator.

`scripts/setup.sh` copies this module, its `.pth` file and the stand-in package
`sgl_kernel` into the site-packages of the development environment, and only
there: nothing of this is part of the shipped package. Being in the
environment's own site-packages, it also reaches the processes SGLang spawns.

It does two things, at the start of every interpreter of that environment:

* It sets defaults for environment variables. A value the user has set wins.
* It registers an import hook which completes a few modules right after they have
  been imported (`AFTER_IMPORT`). The hook is lazy: it imports nothing itself, so
  a plain `python -c pass` costs what it did before.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # the real one is in `typing`, which is too slow to import here
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    from torch.library import Library

ENVIRONMENT_DEFAULTS = {
    # Without it SGLang looks for a GPU, finds none and falls into code paths that need CUDA.
    "SGLANG_USE_CPU_ENGINE": "1",
    # Models are local directories; a look-up on a hub can only delay or fail.
    "HF_HUB_OFFLINE": "1",
}

# `torchvision/_meta_registrations.py` registers fake kernels for these two, and
# that fails unless the operators are known. The schemas are the ones of torchvision 0.28.
TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# A `Library` takes its definitions back when it is collected, so it has to stay alive.
_libraries: list[Library] = []


def _define_missing_operators(extension: ModuleType) -> None:
    """Declare (not implement) torchvision's operators if they did not load.

    Calling one still fails, with torch's own message that it has no kernel.
    """
    if extension._has_ops():
        return
    from torch.library import Library

    library = Library("torchvision", "FRAGMENT")
    for schema in TORCHVISION_SCHEMAS:
        library.define(schema)
    _libraries.append(library)


def _run_mla_as_mla(handler: ModuleType) -> None:
    """Let the attention that runs on a CPU take MLA in its absorbed form, for prefill as for decode.

    Backends that SGLang has not listed get Triton's answer, which prefills in MHA form; there `torch_native`
    fails on the sizes of the heads. The other form is plain attention over the latent.
    """
    method = handler.AttnForwardMethod.MLA
    handler.AttentionBackendRegistry.register("torch_native", lambda attention, batch: method)


class _InWindow:
    """A table of token slots whose entries are those in the pool of the sliding windows."""

    def __init__(self, table: Any, translate: Callable[[Any], Any]) -> None:
        self._table, self._translate = table, translate

    def __getitem__(self, key: Any) -> Any:
        return self._translate(self._table[key].long())


class _Requests:
    def __init__(self, req_to_token: _InWindow) -> None:
        self.req_to_token = req_to_token


def _is_in_window(attention: Any, layer: Any) -> bool:
    """Whether a layer's KV is in the pool of the sliding windows."""
    there = attention.use_sliding_window_kv_pool
    return bool(there and attention.token_to_kv_pool.layers_mapping[layer.layer_id][1])


def _read_windows_where_they_are(backend: ModuleType) -> None:
    """Let the attention that runs on a CPU read sliding-window layers in their own pool.

    `torch_native` takes the slots of full attention for every layer, which in the pool of the windows are
    those of other tokens.
    """
    attention = backend.TorchNativeAttnBackend

    def translated(forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, q: Any, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
            pool = self.token_to_kv_pool
            if not _is_in_window(self, layer):
                return forward(self, q, k, v, layer, *args, **kwargs)
            requests = self.req_to_token_pool
            self.req_to_token_pool = _Requests(
                _InWindow(requests.req_to_token, pool.translate_loc_from_full_to_swa)
            )
            try:
                return forward(self, q, k, v, layer, *args, **kwargs)
            finally:
                self.req_to_token_pool = requests

        return wrapper

    attention.forward_extend = translated(attention.forward_extend)
    attention.forward_decode = translated(attention.forward_decode)


def _attend_to_drafts(backend: ModuleType) -> None:
    """Let the attention that runs on a CPU verify a tree of drafts: each of them attends to what was there
    before, and to its ancestors."""
    attention = backend.TorchNativeAttnBackend
    forward_extend = attention.forward_extend

    def forward(self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True) -> Any:
        if not batch.forward_mode.is_target_verify():
            return forward_extend(self, q, k, v, layer, batch, save_kv_cache)
        pool, size = self.token_to_kv_pool, batch.spec_info.draft_token_num
        pool.set_kv_buffer(layer, backend.KVWriteLoc(batch.out_cache_loc, self.swa_out_cache_loc), k, v)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        queries = q.view(len(batch.seq_lens), size, layer.tp_q_head_num, layer.qk_head_dim)
        trees = batch.spec_info.custom_mask.reshape(-1, size, size).bool()
        out = []
        for query, tree, row, before in zip(
            queries, trees, batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True
        ):
            slots = self.req_to_token_pool.req_to_token[row, : before + size]
            seen = backend.torch.cat([tree.new_ones(size, before), tree], 1)
            if _is_in_window(self, layer):
                slots = pool.translate_loc_from_full_to_swa(slots.long())
                at = before + tree.sum(1, keepdim=True) - 1
                places = backend.torch.cat([backend.torch.arange(before), at.flatten()])
                seen &= places >= at - layer.sliding_window_size
            heads = (part.transpose(0, 1).to(query.dtype) for part in (query, keys[slots], values[slots]))
            attended = backend.scaled_dot_product_attention(
                *heads, attn_mask=seen, scale=layer.scaling, enable_gqa=True
            )
            out.append(attended.transpose(0, 1).flatten(1))
        return backend.torch.cat(out)

    attention.forward_extend = forward


def _pad_batches(backend: ModuleType) -> None:
    """Let batches have rows that are no request's, which attention on a rank of its own
    (`--enable-dp-attention`) adds to decodes: each reads one token, as it does in SGLang's other backend for
    a CPU."""
    backend.TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1


def _complete_native_attention(backend: ModuleType) -> None:
    _read_windows_where_they_are(backend)
    _attend_to_drafts(backend)
    _pad_batches(backend)


def _draft_with_native_attention(factories: ModuleType) -> None:
    """Let a draft model that guesses one token a step attend as the target does on a CPU."""
    factory = factories.DraftBackendFactory
    create = factory.create_draft_extend_backend

    def create_draft_extend_backend(self: Any) -> Any:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        runner = self.draft_model_runner
        # A draft of a model with states has attention for these, too, and no layer that uses it.
        attention = getattr(runner.attn_backend, "full_attn_backend", runner.attn_backend)
        native = isinstance(attention, TorchNativeAttnBackend)
        return TorchNativeAttnBackend(runner) if native else create(self)

    factory.create_draft_extend_backend = create_draft_extend_backend


def _find_no_nccl(communicator: ModuleType) -> None:
    """Let ranks do without NCCL where PyTorch was built for CUDA and brings it: SGLang takes it for a GPU."""

    def missing(*_: Any) -> None:
        raise OSError("there is no GPU that NCCL could use")

    communicator.NCCLLibrary = missing


class _TorchWithoutPinning:
    """PyTorch as a module sees it that asks for pinned memory."""

    def __getattr__(self, name: str) -> Any:
        import torch

        function = getattr(torch, name)
        if name not in ("tensor", "zeros"):
            return function

        def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
            return function(*args, **options)

        return unpinned


def _pin_nothing(module: ModuleType) -> None:
    """Let LoRA do without pinned memory, which PyTorch has only beside an accelerator."""
    import torch

    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign,assignment]
    module.torch = _TorchWithoutPinning()  # type: ignore[attr-defined]


def _norm_in_torch(layers: ModuleType) -> None:
    """Let the gated norm of linear attention compute in plain torch."""

    def forward(self: Any, x: Any, z: Any = None) -> Any:
        return layers.rms_norm_ref(
            x,
            self.weight,
            self.bias,
            z=z,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )

    layers.RMSNorm.forward = forward


def _gated_norm_in_torch(layers: ModuleType) -> None:
    """The same for its other class."""

    def forward(self: Any, x: Any, g: Any, *_args: Any, **_kwargs: Any) -> Any:
        import torch

        normed = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)
        gate = g.float().sigmoid() if self.activation == "sigmoid" else torch.nn.functional.silu(g.float())
        return (normed * gate).to(x.dtype)

    layers.FusedRMSNormGated.forward = forward


def _take_states_in_torch(backend: ModuleType) -> None:
    """Let states be kept as they are at some token (`--mamba-radix-cache-strategy extra_buffer`)."""

    def of_layer(conv: Any, state: Any, slots: Any, wanted: Any, to: Any, count: int, **_: Any) -> None:
        for i in range(count):
            if bool(wanted[i]):
                conv[to[i]] = conv[slots[i]]
                state[to[i]] = state[slots[i]]

    def of_all_layers(conv: Any, state: Any, slots: Any, wanted: Any, to: Any, count: int, **_: Any) -> None:
        for i in range(count):
            if bool(wanted[i]):
                conv[:, to[i]] = conv[:, slots[i]]
                state[:, to[i]] = state[:, slots[i]]

    backend.track_mamba_states_if_needed = of_layer
    backend.track_mamba_states_all_layers = of_all_layers
    backend.scatter_mamba_states_after_mtp_verify = _take_checked_states


def _take_checked_states(
    states: Any, slots: Any, steps: Any, to: Any, steps_to: Any, rows: Any = None, **_: Any
) -> None:
    """Let requests go on from the state behind the last token of theirs that was accepted, and keep another
    one where that is wanted: the states behind each token that was checked are there, a row for a request."""
    assert rows is None
    buffers = [
        (states.temporal, states.intermediate_ssm),
        *zip(states.conv, states.intermediate_conv_window, strict=True),
    ]
    for into, which in ((slots, steps), (to, steps_to)):
        if into is None:
            continue
        for row, (slot, step) in enumerate(zip(into.tolist(), which.tolist(), strict=False)):
            if step >= 0 and slot >= 0:
                for kept, checked in buffers:
                    kept[:, slot] = checked[:, row, step].to(kept.dtype)


def _share_embeddings_without_a_device(model: ModuleType) -> None:
    """Let a draft of Qwen3-Next have the target's embeddings. SGLang waits for CUDA when it has them."""

    def set_embed_and_head(self: Any, embedding: Any, head: Any) -> None:
        self.model.embed_tokens.weight = embedding
        self.lm_head.weight = head

    model.Qwen3NextForCausalLM.set_embed_and_head = set_embed_and_head


def _allow_states_to_be_taken(arguments: ModuleType) -> None:
    """SGLang knows of no CPU that can."""
    arguments._platform_supports_mamba_cache_extra_buffer = lambda: True


def _prepare_decodes_without_pinning(batches: ModuleType) -> None:
    """Where states are taken, SGLang pins a tensor of a decode's batch without asking whether that can be."""
    batch = batches.ScheduleBatch
    prepare = batch.prepare_for_decode

    def wrapper(self: Any) -> Any:
        import torch

        pin = torch.Tensor.pin_memory
        torch.Tensor.pin_memory = lambda tensor, *_: tensor
        try:
            return prepare(self)
        finally:
            torch.Tensor.pin_memory = pin

    batch.prepare_for_decode = wrapper


# Called with the module of that name after its code has run.
AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    # The submodule that tries to load the operators. Right after it is the only moment when it is known
    # whether they are missing and nothing has used them yet.
    "torchvision.extension": _define_missing_operators,
    "sglang.srt.models.deepseek_common.attention_backend_handler": _run_mla_as_mla,
    "sglang.srt.layers.attention.torch_native_backend": _complete_native_attention,
    "sglang.srt.speculative.draft_utils": _draft_with_native_attention,
    "sglang.srt.distributed.device_communicators.pynccl": _find_no_nccl,
    "sglang.srt.lora.layers": _pin_nothing,
    "sglang.srt.lora.backend.torch_backend": _pin_nothing,
    "sglang.kernels.ops.attention.fla.layernorm_gated": _norm_in_torch,
    "sglang.kernels.ops.attention.fla.fused_norm_gate": _gated_norm_in_torch,
    "sglang.srt.layers.attention.hybrid_linear_attn_backend": _take_states_in_torch,
    "sglang.srt.models.qwen3_next": _share_embeddings_without_a_device,
    "sglang.srt.arg_groups.mamba_hook": _allow_states_to_be_taken,
    "sglang.srt.managers.schedule_batch": _prepare_decodes_without_pinning,
}


class CompletingFinder:
    """Meta-path finder that acts on the modules of `AFTER_IMPORT` alone."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        complete = AFTER_IMPORT.get(name)
        if complete is None:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run_module(module)
            complete(module)

        # The loader object belongs to this spec alone, so nothing else sees the change.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Set the defaults and register the hook. Doing it twice changes nothing."""
    for name, value in ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if CompletingFinder not in sys.meta_path:
        sys.meta_path.insert(0, CompletingFinder)


install()
