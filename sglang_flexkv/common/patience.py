"""Calls that a medium may hold for as long as it likes: the system does not take a call on a file back."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Patience:
    """Makes one call at a time, in a thread of its own, and waits for it no longer than it may take."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def call(
        self, what: Callable[[], object], timeout_s: float, undo: Callable[[], object] | None = None
    ) -> bool:
        """Raises what the call raises.

        Args:
            undo: made in place of a result that comes when nobody waits for it any more.

        Returns:
            Whether the call has ended in time. While one that has not is still held, none is made.
        """
        if self._thread is not None and self._thread.is_alive():
            return False
        lock = threading.Lock()  # over what follows
        given_up = ended = False
        raised: BaseException | None = None

        def run() -> None:
            nonlocal ended, raised
            error: BaseException | None = None
            try:
                what()
            except BaseException as caught:  # raised below, by who waits
                error = caught
            with lock:
                ended, raised = not given_up, error
            if given_up and error is None and undo is not None:
                undo()

        self._thread = threading.Thread(target=run, name="flexkv-patience", daemon=True)
        self._thread.start()
        self._thread.join(timeout_s)
        with lock:
            given_up = not ended
        if raised is not None and ended:
            raise raised
        return ended

    def wait(self) -> None:
        """Until nothing is held any more."""
        if self._thread is not None:
            self._thread.join()
