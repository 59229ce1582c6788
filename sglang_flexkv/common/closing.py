"""Closing what consists of several things."""

from __future__ import annotations

from collections.abc import Callable


def run_all(*steps: Callable[[], object]) -> None:
    """Runs every step, whatever becomes of those before it: a disk that cannot take a file must not keep
    threads, locks and memory from being given back.

    Raises:
        BaseException: that of the first step that failed, when all have run; what else failed is in its
            notes.
    """
    first: BaseException | None = None
    for step in steps:
        try:
            step()
        except BaseException as error:  # raised below
            if first is None:
                first = error
            else:
                first.add_note(f"then failed, too: {error!r}")
    if first is not None:
        raise first
