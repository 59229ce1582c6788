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
    paths, num_blocks = trace.blocks
    next_uses = _next_uses(paths, num_blocks)
    never = len(paths)
    next_use = [never] * num_blocks
    parent = [-1] * num_blocks
    resident = [False] * num_blocks
    children = [0] * num_blocks  # resident ones
    # Leaves as (-next use, block). An entry whose block has gone, got a child or was used since is passed
    # over. Blocks of the present request need no protection: they are used again no later than what follows
    # them, so they are never farther away than a block that is to be stored behind them.
    leaves: list[tuple[int, int]] = []
    free = capacity_blocks
    hits = np.zeros(len(paths), np.int64)

    for number, (path, uses) in enumerate(zip(paths, next_uses, strict=True)):
        held = 0
        while held < len(path) and resident[path[held]]:
            held += 1
        hits[number] = held
        for block, use in zip(path, uses, strict=True):
            next_use[block] = use
        stored = held
        while stored < len(path):
            block, use = path[stored], uses[stored]
            if use == never:
                break  # neither this block nor what follows it is worth a place
            if free == 0:
                while leaves:
                    negative, victim = leaves[0]
                    if resident[victim] and not children[victim] and next_use[victim] == -negative:
                        break
                    heapq.heappop(leaves)
                if not leaves or -leaves[0][0] <= use:
                    break
                victim = heapq.heappop(leaves)[1]
                resident[victim] = False
                above = parent[victim]
                if above >= 0:
                    children[above] -= 1
                    if not children[above]:
                        heapq.heappush(leaves, (-next_use[above], above))
            else:
                free -= 1
            parent[block] = path[stored - 1] if stored else -1
            if stored:
                children[path[stored - 1]] += 1
            resident[block] = True
            stored += 1
        if stored and not children[path[stored - 1]]:
            last = path[stored - 1]
            heapq.heappush(leaves, (-next_use[last], last))
    ends = hits * trace.tokens_per_block
    return np.minimum(ends, np.array([request.input_tokens for request in trace.requests], np.int64))


def _next_uses(paths: list[list[int]], num_blocks: int) -> list[list[int]]:
    """Of each block of each request the number of the next request that has it, or that of all requests."""
    coming = [len(paths)] * num_blocks
    result: list[list[int]] = []
    for number in range(len(paths) - 1, -1, -1):
        path = paths[number]
        result.append([coming[block] for block in path])
        for block in path:
            coming[block] = number
    result.reverse()
    return result
