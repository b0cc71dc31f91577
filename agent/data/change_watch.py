"""Notices that the files of the owner's data changed, so that deleted rows are not used again."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterator
from pathlib import Path

from agent.data import sources

#: The files are checked for at most this share of the time, and no more often than this.
LOOK_EVERY_S = 30.0
#: A database cannot be watched for changes: its table is read again after this time.
READ_AGAIN_AFTER_S = 3600.0
_COST_FACTOR = 20


class ChangeWatch:
    """Compares the stamps of all files at a path with those of the last look."""

    def __init__(self, path: str) -> None:
        self._path = path
        began = time.monotonic()
        self._stamp = self._look()
        self._next_at = self._wait_from(began)

    def changed(self) -> bool:
        """True if files came, went or changed. Looks at most every `LOOK_EVERY_S`."""
        began = time.monotonic()
        if not self._path or began < self._next_at:
            return False
        stamp = self._look()
        self._next_at = self._wait_from(began)
        return stamp != self._stamp

    @staticmethod
    def _wait_from(began: float) -> float:
        now = time.monotonic()
        return now + max(LOOK_EVERY_S, _COST_FACTOR * (now - began))

    def _look(self) -> int:
        return hash(tuple(file_stamps(self._path))) if self._path else 0


def file_stamps(path: str) -> Iterator[tuple[object, ...]]:
    """One for each file at a path, which changes with the file."""
    source = sources.parse(path)
    if source.is_remote:
        yield path, int(time.time() / READ_AGAIN_AFTER_S)
        return
    given = Path(path if source.kind == "files" else source.file)
    files: Iterator[Path]
    if given.is_dir():
        files = (Path(folder, name) for folder, _, names in os.walk(given) for name in names)
    else:
        files = iter([given] if given.exists() else [Path(name) for name in glob.glob(path)])
    if source.kind == "sql":  # SQLite writes to a second file first
        files = iter([given, given.with_name(f"{given.name}-wal")])
    for file in files:
        try:
            of = file.stat()
        except OSError:
            continue
        yield str(file), of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns
