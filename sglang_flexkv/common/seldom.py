"""What would be said over and over, said once."""

from __future__ import annotations

import time
from collections import OrderedDict

_QUIET_S = 60.0
_TEXTS_MAX = 16  # that are remembered


class Seldom:
    """Remembers what went wrong: the same is worth a line of the log again when it has not happened for a
    minute. A medium that fails does so for every request."""

    def __init__(self) -> None:
        self._last_s: OrderedDict[str, float] = OrderedDict()

    def is_new(self, text: str) -> bool:
        """Whether to say what has just happened."""
        now_s = time.monotonic()
        last_s = self._last_s.get(text)
        self._last_s[text] = now_s
        self._last_s.move_to_end(text)
        if len(self._last_s) > _TEXTS_MAX:
            self._last_s.popitem(last=False)
        return last_s is None or now_s - last_s > _QUIET_S
