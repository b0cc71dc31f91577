"""The file of a version during its download."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from agent.transport.p2p.piece_store import StoredVersion
from protocols.local.atomic_files import write_all
from protocols.p2p import swarm
from protocols.p2p.swarm import DownloadPlan


class PartialFile:
    """The file of a version during its download, piece by piece, from several threads.

    Pieces that an earlier attempt left in the file are verified and kept. Each present piece is
    reported to `version`, which serves it to other peers.
    """

    def __init__(self, path: Path, plan: DownloadPlan, version: StoredVersion) -> None:
        self._plan, self._version = plan, version
        self._changed = threading.Condition()
        self._file_lock = threading.Lock()
        total = swarm.num_pieces(plan.nbytes, plan.piece_bytes)
        self._missing = set(range(total))
        self._file = path.open("r+b", buffering=0)
        for piece in range(total):
            if self._matches(piece, self._file.read(plan.piece_bytes)):
                self._mark_present(piece)
        self._wanted = self._missing.copy()  # neither present nor requested
        self._file.truncate(plan.nbytes)

    @property
    def complete(self) -> bool:
        return not self._missing

    @property
    def missing(self) -> int:
        """The number of pieces that are not present yet."""
        return len(self._missing)

    def take(self, limit: int = 1) -> range:
        """Takes the first consecutive pieces that are neither present nor requested."""
        with self._changed:
            first = stop = min(self._wanted, default=0)
            while stop - first < limit and stop in self._wanted:
                self._wanted.discard(stop)
                stop += 1
            return range(first, stop)

    def give_back(self, pieces: Iterable[int]) -> None:
        """Returns pieces that were taken; those that are not present can be taken again."""
        with self._changed:
            self._wanted |= self._missing.intersection(pieces)
            self._changed.notify_all()

    def span(self, piece: int) -> tuple[int, int]:
        """Bytes `start` to `stop` of a piece."""
        size = self._plan.piece_bytes
        return piece * size, min((piece + 1) * size, self._plan.nbytes)

    def size(self, piece: int) -> int:
        """Returns the size of a piece in bytes."""
        start, stop = self.span(piece)
        return stop - start

    def put(self, piece: int, data: bytes) -> bool:
        """Writes a piece; False if the bytes do not match its digest."""
        if not self._matches(piece, data):
            return False
        with self._file_lock:
            self._file.seek(piece * self._plan.piece_bytes)
            write_all(self._file, memoryview(data))
        self._mark_present(piece)
        return True

    def _matches(self, piece: int, data: bytes) -> bool:
        expected = self._plan.pieces[32 * piece : 32 * piece + 32]
        return hashlib.sha256(data).digest() == expected

    def _mark_present(self, piece: int) -> None:
        with self._changed:
            self._missing.discard(piece)
            self._changed.notify_all()
        self._version.add(piece)

    def wait(self, within_s: float) -> None:
        """Waits until a piece arrives or is returned, at most `within_s` seconds."""
        with self._changed:
            self._changed.wait(within_s)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
