"""The hit rate that no eviction policy can exceed, because it knows what will be asked for.

Belady's rule on prefixes: what goes is the block whose next use is farthest away, and a block whose next use
is farther than that of everything that could go is not stored. A prefix is used whenever what follows it is
used, so the block to go is always a leaf, and the rule never has to tear a hole. Blocks count alike, as the
incomplete one at the end of a prompt does: on tokens the optimum can be beaten by less than a block per
request.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from sglang_flexkv.replay.trace import Trace


def optimum(trace: Trace, capacity_blocks: int) -> npt.NDArray[np.int64]:
    """Tokens that each request hits in an optimal cache of one tier that starts empty, [requests]."""
    num_blocks, never = trace.num_blocks, trace.num_requests
    next_uses = _next_uses(trace)
    # Of resident blocks. Pages that nothing is written to take no memory, and many blocks are never resident.
    next_use, parent, children = (np.zeros(num_blocks, np.int32).data for _ in range(3))
    resident = np.zeros(num_blocks, np.uint8).data
    # Leaves, the one used last first, each as one small number: (never - next use) * num_blocks + block. An
    # entry whose block has gone, got a child or was used since is passed over. Blocks of the present
    # request need no protection: they are used again no later than what follows them, so they are never
    # farther away than a block that is to be stored behind them.
    leaves: list[int] = []
    free = capacity_blocks
    hits = np.zeros(never, np.int64)

    for number, (blocks, begin) in enumerate(zip(trace.paths(), trace.starts, strict=False)):
        path = blocks.tolist()
        uses = next_uses[begin : begin + len(path)].tolist()
        held = 0
        while held < len(path) and resident[path[held]]:
            held += 1
        hits[number] = held
        for block, use in zip(path[:held], uses[:held], strict=True):
            next_use[block] = use
        stored = held
        while stored < len(path):
            block, use = path[stored], uses[stored]
            if use == never:
                break  # neither this block nor what follows it is worth a place
            if free == 0:
                while leaves:
                    sooner, victim = divmod(leaves[0], num_blocks)
                    if resident[victim] and not children[victim] and next_use[victim] == never - sooner:
                        break
                    heapq.heappop(leaves)
                if not leaves or never - leaves[0] // num_blocks <= use:
                    break
                victim = heapq.heappop(leaves) % num_blocks
                resident[victim] = False
                above = parent[victim]
                if above >= 0:
                    children[above] -= 1
                    if not children[above]:
                        heapq.heappush(leaves, (never - next_use[above]) * num_blocks + above)
            else:
                free -= 1
            parent[block] = path[stored - 1] if stored else -1
            if stored:
                children[path[stored - 1]] += 1
            next_use[block] = use
            resident[block] = True
            stored += 1
        if stored and not children[path[stored - 1]]:
            last = path[stored - 1]
            heapq.heappush(leaves, (never - next_use[last]) * num_blocks + last)
    return np.minimum(hits * trace.tokens_per_block, trace.input_lengths)


def _next_uses(trace: Trace) -> npt.NDArray[np.int32]:
    """Of each block of each request, one after the other, the number of the next request that has it, or that
    of all requests."""
    coming = np.full(trace.num_blocks, trace.num_requests, np.int32)
    result = np.empty(len(trace.blocks), np.int32)
    for number in range(trace.num_requests - 1, -1, -1):
        entries = slice(trace.starts[number], trace.starts[number + 1])
        path = trace.blocks[entries]
        result[entries] = coming[path]
        coming[path] = number
    return result
