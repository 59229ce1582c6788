"""Linear attention with gated deltas (GDN) in plain torch, under the names by which SGLang takes it on a CPU.

Unlike what is in the rest of this package these compute. A token after the other, so slow, and written to be
read: models with recurrent state run here so that a cache can be tested with them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as functional


def _activated(x: torch.Tensor, activation: str | bool | None) -> torch.Tensor:
    return functional.silu(x) if activation in ("silu", "swish", True) else x


def causal_conv1d_fn_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None = None,
    conv_states: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Prompts, one behind the other.

    Args:
        x: [channels, tokens].
        weight: [channels, width].
        conv_states: the last ``width - 1`` inputs of each slot, [slots, channels, width - 1]; updated.
        query_start_loc: where each prompt begins, and the end, [prompts + 1].
    """
    assert conv_states is not None
    assert has_initial_state is not None
    assert cache_indices is not None
    assert query_start_loc is not None
    width = weight.shape[-1]
    out = torch.empty_like(x)
    bounds = query_start_loc.tolist()
    for i, (start, end) in enumerate(pairwise(bounds)):
        slot = int(cache_indices[i])
        if start == end or slot < 0:
            continue
        before = conv_states[slot].to(x.dtype)
        if not bool(has_initial_state[i]):
            before = torch.zeros_like(before)
        inputs = torch.cat([before, x[:, start:end]], 1)
        summed = functional.conv1d(
            inputs.unsqueeze(0).float(),
            weight.unsqueeze(1).float(),
            bias.float() if bias is not None else None,
            groups=x.shape[0],
        )[0]
        out[:, start:end] = _activated(summed, activation).to(x.dtype)
        conv_states[slot] = inputs[:, 1 - width :].to(conv_states.dtype)
    return out


def causal_conv1d_update_cpu(
    x: torch.Tensor,
    conv_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None = None,
    conv_state_indices: torch.Tensor | None = None,
    intermediate_conv_window: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    retrieve_next_token: torch.Tensor | None = None,
    retrieve_next_sibling: torch.Tensor | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """One token of each request, [requests, channels]; otherwise as ``causal_conv1d_fn_cpu``.

    Or a tree of tokens of each that are being checked, [requests, channels, tokens]; a chain where there are
    no links. No state changes then. What it would be behind each token goes to ``intermediate_conv_window``,
    [rows, tokens, channels, width - 1].

    Args:
        intermediate_state_indices: the row of each request.
        retrieve_next_token, retrieve_next_sibling: of each token its first child and its next sibling, or -1.
        retrieve_parent_token: is told the parents.
    """
    assert conv_state_indices is not None
    out = torch.empty_like(x)
    slots = conv_state_indices.tolist()[: x.shape[0]]
    if intermediate_conv_window is None:
        for i, slot in enumerate(slots):
            if slot >= 0:
                before = conv_states[slot].to(x.dtype)
                out[i], window = _convolved(before, x[i], weight, bias, activation)
                conv_states[slot] = window.to(conv_states.dtype)
        return out
    assert intermediate_state_indices is not None
    parents = _parents(retrieve_next_token, retrieve_next_sibling, retrieve_parent_token, x)
    for i, (slot, row) in enumerate(zip(slots, intermediate_state_indices.tolist(), strict=True)):
        windows = intermediate_conv_window[row]
        for token in range(x.shape[2]) if slot >= 0 else ():
            parent = int(parents[i, token])
            before = (windows[parent] if parent >= 0 else conv_states[slot]).to(x.dtype)
            out[i, :, token], window = _convolved(before, x[i, :, token], weight, bias, activation)
            windows[token] = window.to(windows.dtype)
    return out


def _convolved(
    before: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token, [channels], behind the last ``width - 1`` inputs; and the last ones then."""
    inputs = torch.cat([before, x.unsqueeze(1)], 1)
    summed = (inputs.float() * weight.float()).sum(1)
    if bias is not None:
        summed = summed + bias.float()
    return _activated(summed, activation).to(x.dtype), inputs[:, 1:]


def _parents(
    children: torch.Tensor | None,
    siblings: torch.Tensor | None,
    parents: torch.Tensor | None,
    x: torch.Tensor,
) -> torch.Tensor:
    """Of each token in each request's tree, -1 for the first one, [requests, tokens]. They are told to the
    caller, who hands them on."""
    if children is None or siblings is None or parents is None:
        return torch.arange(-1, x.shape[2] - 1).expand(x.shape[0], -1)
    parents.fill_(-1)
    for of_request, first, further in zip(parents, children.tolist(), siblings.tolist(), strict=True):
        for token, child in enumerate(first):
            while child >= 0:
                of_request[child] = token
                child = further[child]
    return parents


def _gates(
    a_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of how much of a state is kept, and how much of a token is taken, [1, tokens, heads]."""
    kept = -a_log.float().exp() * functional.softplus(a.float() + dt_bias.float())
    return kept.unsqueeze(0), b.float().sigmoid().unsqueeze(0)


# SGLang takes a state from the middle of a prompt by the number of its chunk.
_CHUNK_TOKENS = 64


def _delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept: torch.Tensor,
    taken: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    bounds: torch.Tensor,
    after_tokens: list[torch.Tensor] | None = None,
    parents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts, one behind the other.

    Args:
        q, k: [1, tokens, heads, K]; several heads of v may share one.
        v: [1, tokens, heads of v, V].
        states: [slots, heads of v, V, K]; updated, unless the states behind each token are wanted.
        after_tokens: of each prompt, where these go, [tokens, heads of v, V, K].
        parents: where its tokens are a tree, of each the one before it, or -1, [prompts, tokens].

    Returns:
        The output, as v, and the states before each chunk of each prompt, [1, chunks, heads of v, V, K].
    """
    q, k = (functional.normalize(x[0].float(), dim=-1) for x in (q, k))
    v = v[0].float().unsqueeze(-1)
    sharing = v.shape[1] // q.shape[1]
    q = (q * q.shape[-1] ** -0.5).repeat_interleave(sharing, 1).unsqueeze(-2)
    k = k.repeat_interleave(sharing, 1).unsqueeze(-2)
    decay = kept.reshape(-1, kept.shape[-1]).float().exp()[:, :, None, None]
    strength = taken.reshape(-1, taken.shape[-1]).float()[:, :, None, None]
    out, before_chunks = torch.zeros_like(v), []
    starts = bounds.tolist()
    for i, ((start, end), slot) in enumerate(zip(pairwise(starts), slots.tolist(), strict=False)):
        if slot < 0:
            continue
        state = states[slot].float()
        for token in range(start, end):
            if (token - start) % _CHUNK_TOKENS == 0:
                before_chunks.append(state)
            if after_tokens is not None and parents is not None:
                parent = int(parents[i, token - start])
                state = (after_tokens[i][parent] if parent >= 0 else states[slot]).float()
            # Products of so few numbers are not worth a thread, which matrix products take all the same.
            state = state * decay[token]
            known = (state * k[token]).sum(-1, keepdim=True)
            state = state + (v[token] - known) * strength[token] * k[token]
            out[token] = (state * q[token]).sum(-1, keepdim=True)
            if after_tokens is not None:
                after_tokens[i][token - start] = state.to(states.dtype)
        if after_tokens is None:
            states[slot] = state.to(states.dtype)
    out = out.squeeze(-1)
    return out.unsqueeze(0), torch.stack(before_chunks).unsqueeze(0) if before_chunks else None


def chunk_gated_delta_rule_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state_indices: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None, torch.Tensor | None]:
    out, before_chunks = _delta_rule(q, k, v, g, beta, initial_state, initial_state_indices, cu_seqlens)
    return out.to(q.dtype), None, before_chunks


def _update(
    *,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    softplus_beta: float,
    softplus_threshold: float,
    is_kda: bool = False,
    disable_state_update: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    cache_steps: int = 0,
    retrieve_parent_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """A token of each request; or a tree of tokens that are being checked, whose states go to rows of
    ``intermediate_states_buffer``, [rows, tokens, heads of v, V, K]."""
    after_tokens = None
    if intermediate_states_buffer is not None:
        assert intermediate_state_indices is not None
        after_tokens = [intermediate_states_buffer[row] for row in intermediate_state_indices.tolist()]
    kept, taken = _gates(A_log, a, b, dt_bias)
    out, _ = _delta_rule(
        q,
        k,
        v,
        kept,
        taken,
        initial_state_source,
        initial_state_indices,
        cu_seqlens,
        after_tokens,
        retrieve_parent_token,
    )
    return out.to(q.dtype)


# SGLang looks these up as operators of torch. The library takes them back when it is collected.
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("fused_gdn_gating_cpu(Tensor A_log, Tensor a, Tensor b, Tensor dt_bias) -> (Tensor, Tensor)")
_library.impl("fused_gdn_gating_cpu", _gates, "CompositeExplicitAutograd")
_library.define(
    "fused_sigmoid_gating_delta_rule_update_cpu(*, Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, "
    "Tensor v, Tensor a, Tensor b, Tensor(a!) initial_state_source, Tensor initial_state_indices, "
    "Tensor cu_seqlens, bool use_qk_l2norm_in_kernel, float softplus_beta, float softplus_threshold, "
    "bool is_kda=False, bool disable_state_update=False, Tensor(b!)? intermediate_states_buffer=None, "
    "Tensor? intermediate_state_indices=None, int cache_steps=0, "
    "Tensor? retrieve_parent_token=None) -> Tensor"
)
_library.impl("fused_sigmoid_gating_delta_rule_update_cpu", _update, "CompositeExplicitAutograd")
