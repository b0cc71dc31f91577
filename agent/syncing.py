"""An answer becomes durable while it is sent: neither waits for the other."""

from __future__ import annotations

import threading
from pathlib import Path

from protocols.durable import sync


class Syncing:
    """Files that are being synced in a thread, one after the other."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="sync")
        self._thread.start()

    def _work(self) -> None:
        try:
            for path in self._paths:
                sync(path)
        except OSError as err:  # for who waits
            self._error = err

    def wait(self) -> None:
        """Return when all are durable. Raises OSError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
