"""Calls a function at a deadline, unless it is removed before. One thread for all deadlines.

A `threading.Timer` starts a thread for each, which is much for a small request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: The thread without deadlines waits this long for the next deadline, then ends.
_IDLE_S = 60.0


class Deadline:
    """`at`: monotonic time in s. `is_over` is set before `expire` is called."""

    def __init__(self, at: float, expire: Callable[[], None]) -> None:
        self.at, self.expire, self.is_over = at, expire, False


class Deadlines:
    """Deadlines of any threads. `expire` is called in a thread of its own and must not block."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: set[Deadline] = set()
        self._thread: threading.Thread | None = None
        #: When the thread wakes without a signal (monotonic s).
        self._wakes_at = 0.0

    def add(self, within_s: float, expire: Callable[[], None]) -> Deadline:
        deadline = Deadline(time.monotonic() + within_s, expire)
        with self._changed:
            self._open.add(deadline)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="deadlines", daemon=True)
                self._thread.start()
            elif deadline.at < self._wakes_at:
                self._changed.notify()
        return deadline

    def remove(self, deadline: Deadline | None) -> None:
        """The thread is not woken: at its time, it has nothing to do."""
        if deadline is not None:
            with self._changed:
                self._open.discard(deadline)

    def _watch(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                over = [one for one in self._open if one.at <= now]
                self._open.difference_update(over)
                for one in over:
                    one.is_over = True
                if not over:
                    is_empty = not self._open
                    self._wakes_at = min((one.at for one in self._open), default=now + _IDLE_S)
                    self._changed.wait(min(self._wakes_at - now, threading.TIMEOUT_MAX))
                    if is_empty and not self._open and time.monotonic() >= self._wakes_at:
                        self._thread = None
                        return
            for one in over:
                one.expire()
