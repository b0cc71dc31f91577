"""An update becomes durable while it is sent: neither waits for the other."""

from __future__ import annotations

import threading
from pathlib import Path

from protocols.durable import sync


class Syncing:
    """A file that is being synced in a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="sync")
        self._thread.start()

    def _work(self) -> None:
        try:
            sync(self._path)
        except OSError as err:  # for who waits
            self._error = err

    def wait(self) -> None:
        """Return when it is durable. Raises OSError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
