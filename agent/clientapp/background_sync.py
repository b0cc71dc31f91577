"""Fsync an answer in a thread while it uploads.

Without it a round takes longer: 1.2 times at 40 MB and twice at 400 MB (two agents, a busy disk).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from protocols.local.atomic_files import sync


class Syncing:
    """Syncs files of one folder in a thread, then calls `then`. Files that are gone are skipped."""

    def __init__(self, *paths: Path, then: Callable[[], None]) -> None:
        self._paths, self._then = paths, then
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="sync")
        self._thread.start()

    def _work(self) -> None:
        try:
            sync(*self._paths)
            self._then()
        except OSError as err:  # for who waits
            self._error = err

    def wait(self) -> None:
        """Return when all is done. Raises OSError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
