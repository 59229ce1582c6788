"""Loads that several requests want: made once, into one place on the device.

SGLang loads into slots that belong to a request alone, and the tree learns of them when the request has run.
For a request that is alone nothing of that changes. Once another one wants what it loads, that becomes a part
of the tree, and from there on it is to SGLang as any prefix that two requests have in common: for its budget,
its locks, its eviction. The batch that both are in waits for its loads layer by layer, and so for this one.
Until a load has landed only requests of its batch can find it, because the loads of a batch end before the
next one is chosen; if it fails, they are known, and what it left is taken out of the tree.

Everything here follows from what is asked for in which order, and is alike on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_flexkv.integration.compat.requests import name_of
from sglang_flexkv.integration.compat.tree import TreeCache, is_virtual_node


@dataclass
class Load:
    """What one request loads, or has loaded and not inserted yet."""

    req: Any
    name: str  # the request's
    tokens: Any  # its prompt, which begins with these whatever becomes of it
    first_page: str  # hash of the first page, which says all that is before it
    first: int  # token of the prompt
    slots: torch.Tensor  # of its tokens
    begun: bool = False
    ended: bool = False
    # Once it is in the tree:
    key: Any = None  # of the prompt up to its end
    lock: Any = None
    sharers: dict[str, int] = field(default_factory=dict)  # who has found how many of its tokens
    failed: bool = False


class SharedLoads:
    """The loads of one rank that others may share. Requests go by their names (``compat.requests``)."""

    def __init__(self, tree: TreeCache) -> None:
        self._tree = tree
        self._private: dict[str, Load] = {}  # by the hash of the first page
        self._by_request: dict[str, Load] = {}
        self._shared: list[Load] = []  # that have not ended; what is below another one comes after it

    def __bool__(self) -> bool:
        return bool(self._by_request or self._shared)

    def add(self, req: Any, first_page: str, first: int, slots: torch.Tensor) -> None:
        """A request has been admitted, and loads."""
        load = Load(req, name_of(req), req.full_untruncated_fill_ids, first_page, first, slots)
        self._private[first_page] = self._by_request[load.name] = load

    def find(self, first_page: str) -> Load | None:
        """A load that begins with this page and that the tree does not know yet."""
        load = self._private.get(first_page)
        # Who found one that runs could be in a batch that does not wait for it. What a session's turn has
        # loaded belongs to its session once it runs.
        if load is None or load.begun != load.ended or is_virtual_node(load.req.last_node):
            return None
        # Of what the tree has already without a window behind it, it keeps its own.
        if not self._tree.would_take_all(load.req, load.tokens, load.first, len(load.slots)):
            return None
        return load

    def share(self, load: Load) -> None:
        """Makes a load a part of the tree."""
        self.forget(load.name)
        load.key, load.lock = self._tree.take_prefix(load.req, load.tokens, load.first, load.slots)
        if load.ended:
            self._tree.unlock(load.lock)
        else:
            # The lock of its request does not outlast it, and nothing else may get these slots meanwhile.
            self._shared.append(load)

    def note_match(self, name: str, key: Any, device_tokens: int) -> None:
        """A request has found this many tokens of its prompt on the device, or on their way there."""
        for load in self._shared:
            reached = min(self._tree.common_tokens(load.key, key), device_tokens)
            load.sharers.pop(name, None)
            if reached > load.first:
                load.sharers[name] = reached - load.first

    def is_shared(self, name: str) -> bool:
        """Whether this request's load is wanted whatever becomes of the request."""
        return any(load.name == name for load in self._shared)

    def begin_batch(self) -> None:
        """All loads begin that have not."""
        for load in self._by_request.values():
            load.begun = True

    def end(self, names: Sequence[str], failed: Iterable[str]) -> set[str]:
        """The loads of these requests have ended, and some of them have failed.

        Returns:
            The requests that have not got what they wanted: these, and those that have relied on them.
        """
        lost = set(failed)
        for load in self._shared:
            load.failed = load.name in lost
            if load.failed:
                lost.update(load.sharers)
        for name in names:
            if name in self._by_request:
                self._by_request[name].ended = True
        return lost

    def end_batch(self, reqs: Sequence[Any], failed: Sequence[Any]) -> int:
        """What is left to do when the loads of a batch have ended.

        Args:
            reqs: those of the batch.
            failed: of these the ones that have not got what they wanted.

        Returns:
            Tokens that requests had from loads of others.
        """
        for req in failed:
            self.forget(name_of(req))
        if not self._shared:
            return 0
        loads, self._shared = self._shared, []
        lost = [load for load in loads if load.failed]
        failed_names = {name_of(req) for req in failed}
        for load in loads:
            self._tree.unlock(load.lock)
        for req in failed:
            if any(name_of(req) == load.name or name_of(req) in load.sharers for load in lost):
                self._tree.let_go_of_prefix(req)
        for load in sorted(lost, key=lambda load: load.first, reverse=True):  # leaves first
            self._tree.drop_prefix(load.key, load.first)
        served = {name_of(req) for req in reqs} - failed_names
        return sum(load.sharers.get(name, 0) for load in loads for name in served if not load.failed)

    def forget(self, name: str) -> None:
        """A request has inserted what it has loaded, or has ended. What is in the tree stays there."""
        load = self._by_request.pop(name, None)
        if load is not None and self._private.get(load.first_page) is load:
            del self._private[load.first_page]

    def clear(self) -> None:
        self._private.clear()
        self._by_request.clear()
        self._shared.clear()
