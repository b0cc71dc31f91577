"""Local state of runs: one file a run, replaced together with the update that it belongs to.

The next state is staged under its update's digest until the answer that names the update is on
disk. So a crash leaves either the old state without the update or the new state with it, and
nothing is counted twice or lost.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import NamedTuple

from protocols.local.atomic_files import fsync_folder

#: A state that was not used for this long belongs to a run that has ended.
MAX_AGE_S = 30 * 86400.0


class RunStatePaths(NamedTuple):
    """The state file of a run, which may not exist yet, and where to write the next one."""

    file: Path
    next: Path


class RunStateFolder:
    """A folder of state files. Committed ones end in `suffix`."""

    def __init__(self, folder: Path, suffix: str) -> None:
        self._folder, self._suffix = folder, suffix
        #: Most runs have no state: avoids a look into a folder that does not exist.
        self._is_there = folder.exists()
        for path in self._files():
            if time.time() - path.stat().st_mtime > MAX_AGE_S:
                path.unlink()

    def _files(self) -> list[Path]:
        try:
            names = os.listdir(self._folder) if self._is_there else []
        except FileNotFoundError:
            names = []
        return [self._folder / name for name in names]

    @property
    def is_empty(self) -> bool:
        """True without any state."""
        return not self._files()

    def paths(self, run: str) -> RunStatePaths:
        """The files of a run. Its id came from the network, so no part of it enters a path."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._is_there = True
        stem = hashlib.sha256(run.encode()).hexdigest()[:32]
        return RunStatePaths(self._folder / f"{stem}{self._suffix}", self._folder / f"{stem}.new")

    def stage(self, run: str, digest: str) -> None:
        """Stage the written next state with the update of this digest."""
        following = self.paths(run).next
        following.replace(following.with_suffix(f".{digest}"))
        fsync_folder(self._folder)

    def commit(self, digest: str) -> None:
        """Commit the state staged with this update, and drop all others. Empty: drop all."""
        staged = [path for path in self._files() if path.suffix != self._suffix]
        for path in staged:
            if path.suffix == f".{digest}":
                path.replace(path.with_suffix(self._suffix))
            else:
                path.unlink()
        if staged:
            fsync_folder(self._folder)

    def keep_only(self, *runs: str) -> None:
        """Delete the files of all other runs."""
        own = {self.paths(run).file for run in runs}
        for path in self._files():
            if path not in own:
                path.unlink()
