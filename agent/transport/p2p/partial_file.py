"""The file of a version during its download."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from agent.transport.p2p.piece_store import PartialVersion
from protocols.p2p import swarm
from protocols.p2p.swarm import DownloadPlan


class PartialFile:
    """The file of a version during its download, piece by piece, from several threads.

    Pieces that an earlier attempt left in the file are verified and kept.
    """

    def __init__(self, path: Path, plan: DownloadPlan, book: PartialVersion) -> None:
        self._plan, self._book = plan, book
        self._changed = threading.Condition()
        self._file_lock = threading.Lock()
        total = swarm.num_pieces(plan.nbytes, plan.piece_bytes)
        self._wanted = set(range(total))  # neither present nor requested
        self._missing = set(range(total))
        self._file = path.open("r+b", buffering=0)
        for piece in range(total):
            data = self._file.read(plan.piece_bytes)
            if self._matches(piece, data):
                self._mark_present(piece)
        self._file.truncate(plan.nbytes)

    @property
    def complete(self) -> bool:
        return not self._missing

    @property
    def missing(self) -> int:
        """The number of pieces that are not present yet."""
        return len(self._missing)

    def take(self) -> int | None:
        """Takes the first piece that is neither present nor requested; None if there is none."""
        with self._changed:
            if not self._wanted:
                return None
            piece = min(self._wanted)
            self._wanted.discard(piece)
            return piece

    def give_back(self, piece: int) -> None:
        """Returns a piece that was taken but could not be downloaded."""
        with self._changed:
            if piece in self._missing:
                self._wanted.add(piece)
            self._changed.notify_all()

    def span(self, piece: int) -> tuple[int, int]:
        """Bytes `start` to `stop` of a piece."""
        size = self._plan.piece_bytes
        return piece * size, min((piece + 1) * size, self._plan.nbytes)

    def put(self, piece: int, data: bytes) -> bool:
        """Writes a piece; False if the bytes do not match its digest."""
        if not self._matches(piece, data):
            return False
        with self._file_lock:
            self._file.seek(piece * self._plan.piece_bytes)
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
        self._mark_present(piece)
        return True

    def _matches(self, piece: int, data: bytes) -> bool:
        expected = self._plan.pieces[32 * piece : 32 * piece + 32]
        return hashlib.sha256(data).digest() == expected

    def _mark_present(self, piece: int) -> None:
        with self._changed:
            self._wanted.discard(piece)
            self._missing.discard(piece)
            self._changed.notify_all()
        self._book.add(piece)

    def take_range(self, most: int) -> range:
        """Like `take`, but takes up to `most` consecutive pieces; empty if there is none."""
        with self._changed:
            first = min(self._wanted, default=0)
            row = range(first, first)
            while len(row) < most and row.stop in self._wanted:
                self._wanted.discard(row.stop)
                row = range(first, row.stop + 1)
            return row

    def wait(self, within_s: float) -> None:
        """Waits until a piece arrives or is returned, at most `within_s` seconds."""
        with self._changed:
            self._changed.wait(within_s)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
