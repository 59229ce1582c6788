"""Kernels of speculative decoding in plain PyTorch: without a draft model (NGRAM), and with one that guesses
one token after the other (EAGLE, `--speculative-eagle-topk 1`).

They do what the compiled ones do, request after request and token after token. Sizes: requests in a batch
times the nodes of a tree of drafts, whose first node is the token that is known.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def reconstruct_indices_from_tree_mask(
    tree_mask: Tensor,
    verified_seq_len: Tensor,
    positions: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """From who is whose ancestor (bool, [requests * nodes * nodes]): each node's position in the sequence,
    its number in the batch, its first child and its next sibling; -1 if it has none."""
    size = draft_token_num
    trees = tree_mask.reshape(batch_size, size, size).bool()
    for request, tree in enumerate(trees.tolist()):
        ancestors = [[other for other in range(node) if tree[node][other]] for node in range(size)]
        parents = [max(above, default=-1) for above in ancestors]
        for node in range(size):
            of_same = [other for other in range(node + 1, size) if parents[other] == parents[node] >= 0]
            children = [other for other in range(node + 1, size) if node in ancestors[other]]
            positions[request * size + node] = verified_seq_len[request] + len(ancestors[node])
            retrive_index[request, node] = request * size + node
            retrive_next_token[request, node] = min(children, default=-1)
            retrive_next_sibling[request, node] = min(of_same, default=-1)


def build_tree_kernel_efficient_cpu(
    parent_list: Tensor,
    top_scores_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: int,
) -> None:
    """What the verification asks for, of trees that are chains; the mask has the nodes alone."""
    if topk != 1 or int(tree_mask_mode) != 1:
        raise NotImplementedError("on a CPU: chains only, --speculative-eagle-topk 1")
    size = num_verify_tokens
    tree_mask.view(-1)[:] = torch.ones(size, size).tril().bool().repeat(len(seq_lens), 1, 1).flatten()
    reconstruct_indices_from_tree_mask(
        tree_mask.view(-1),
        seq_lens,
        positions,
        retrive_index,
        retrive_next_token,
        retrive_next_sibling,
        len(seq_lens),
        size,
    )


def fill_bonus_tokens_cpu(
    accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, accept_stride: int
) -> None:
    """Of each request the last token that is accepted."""
    rows = torch.arange(len(accept_lens)) * accept_stride
    bonus_tokens[:] = accept_tokens.flatten()[rows + accept_lens - 1]


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Goes down each tree as long as a child is what the model predicts at its parent."""
    predicted = target_predict.flatten()
    for request in range(len(candidates)):
        node, count = 0, 0
        last = int(retrive_index[request, 0])
        accept_index[request, 0] = last
        while count + 1 < accept_index.shape[1]:
            node = int(retrive_next_token[request, node])
            while node >= 0 and candidates[request, node] != predicted[last]:
                node = int(retrive_next_sibling[request, node])
            if node < 0:
                break
            count += 1
            predicts[last] = predicted[last]
            last = int(retrive_index[request, node])
            accept_index[request, count] = last
        predicts[last] = predicted[last]
        accept_token_num[request] = count


def assign_extend_cache_locs_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
) -> None:
    """The slots of the tokens from start to end of each request, one after the other."""
    spans = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    slots = torch.cat([req_to_token[row, first:end] for row, first, end in spans])
    out_cache_loc[: len(slots)] = slots


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
    topk: int,
    num_steps: int,
) -> None:
    """The slots behind each request's tokens, for what is guessed."""
    ends = seq_lens + topk * num_steps
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, ends, out_cache_loc, pool_len)


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
) -> None:
    """The other way: slots, one after the other, to the tokens from start to end of each request."""
    taken = 0
    spans = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, first, end in spans:
        req_to_token[row, first:end] = out_cache_loc[taken : taken + end - first]
        taken += end - first


def fill_accept_out_cache_loc_cpu(
    accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor
) -> None:
    """The slots of the accepted nodes, one after the other."""
    accepted = accept_index.flatten()
    slots = out_cache_loc[accepted[accepted >= 0].long()]
    accept_out_cache_loc[: len(slots)] = slots


def copy_all_layer_kv_cache_cpu(
    data_ptrs: Tensor, data_strides: Tensor, tgt_loc: Tensor, src_loc: Tensor, *_: object
) -> None:
    """Rows of all buffers from slots to slots. What is read is read before anything is written."""
    for start, stride in zip(data_ptrs.tolist(), data_strides.tolist(), strict=True):
        rows = [ctypes.string_at(start + slot * stride, stride) for slot in src_loc.tolist()]
        for slot, row in zip(tgt_loc.tolist(), rows, strict=True):
            ctypes.memmove(start + slot * stride, row, stride)
