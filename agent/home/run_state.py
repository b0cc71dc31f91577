"""What an agent keeps of a run for itself, in one file a run that moves on with its updates.

The next file waits under an update's digest until the answer that names that update is safe: so a
crash leaves the old file with no update or the new one with it, and nothing is counted twice or
lost.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import NamedTuple

from protocols.local.atomic_files import fsync_folder

#: What nobody has asked for so long is of a run that is over.
MAX_AGE_S = 30 * 86400.0


class RunStatePaths(NamedTuple):
    """A run's file, which may not be there yet, and where the next one is to be written."""

    file: Path
    next: Path


class RunStateFolder:
    """A folder of such files; those that are in force end in `suffix`."""

    def __init__(self, folder: Path, suffix: str) -> None:
        self._folder, self._suffix = folder, suffix
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in folder.iterdir():
            if time.time() - path.stat().st_mtime > MAX_AGE_S:
                path.unlink()

    def paths(self, run: str) -> RunStatePaths:
        """The files of a run. Its id is text that came from afar: no part of a path."""
        stem = hashlib.sha256(run.encode()).hexdigest()[:32]
        return RunStatePaths(self._folder / f"{stem}{self._suffix}", self._folder / f"{stem}.new")

    def stage(self, run: str, digest: str) -> None:
        """The next one is written; it belongs to the update with this digest."""
        written = self.paths(run).next
        written.replace(written.with_suffix(f".{digest}"))
        fsync_folder(self._folder)

    def commit(self, digest: str) -> None:
        """The update with this digest (empty: none) is the one that is sent; any other is not."""
        settled = False
        for path in self._folder.iterdir():
            if path.suffix == self._suffix:
                continue
            settled = True
            if path.suffix == f".{digest}":
                path.replace(path.with_suffix(self._suffix))
            else:
                path.unlink()
        if settled:
            fsync_folder(self._folder)

    def keep_only(self, run: str) -> None:
        """Only this run's file is wanted from now on."""
        kept = self.paths(run).file
        for other in self._folder.iterdir():
            if other != kept:
                other.unlink()
