"""Limits on uploads: size, number for each peer, and free space on the disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from starlette.exceptions import HTTPException

from protocols.local import disk_space

#: Complete uploads of one peer in the spool: the one that counts, and one that replaces it.
MAX_UPLOADS = 2
#: Kept free for the ledger, in addition to the next version.
_RESERVE_BYTES = 4 * 1024 * 1024
#: An agent retries sooner than this after an upload was refused for lack of space.
_SHORTAGE_S = 20.0


class UploadLimits:
    """The limits of one spool. The current run sets them. Each refusal is an HTTPException."""

    def __init__(self, folder: Path, max_bytes: int = 0) -> None:
        self._folder = folder
        #: Size of one upload.
        self.max_bytes = max_bytes
        #: Complete uploads of one peer. Higher if several of its updates may count.
        self.max_uploads = MAX_UPLOADS
        #: Size of the next version. Uploads must leave space for it.
        self.version_bytes = 0
        #: Bytes that current uploads have announced and not sent yet.
        self.promised_bytes = 0
        self._refused_at = -math.inf
        #: Called when an upload is refused for lack of space.
        self.on_shortage: Callable[[], None] = lambda: None

    @property
    def free_bytes(self) -> int:
        return disk_space.free_bytes(self._folder)

    def has_space(self, nbytes: int = 0) -> bool:
        """True if the disk has space for this and for everything that current uploads announced."""
        free = self.free_bytes - self.promised_bytes
        return free >= nbytes + self.version_bytes + _RESERVE_BYTES

    @property
    def shortage(self) -> str:
        """What is missing, if an upload was refused for lack of space recently; else empty."""
        if time.monotonic() - self._refused_at > _SHORTAGE_S:
            return ""
        return f"space on the coordinator's disk ({self.free_bytes / 1e6:,.0f} MB free)"

    def no_space(self) -> HTTPException:
        """Note that an upload is refused for lack of space. Returns the error to raise."""
        self._refused_at = time.monotonic()
        self.on_shortage()
        return HTTPException(507, "no space on the coordinator's disk")

    def check_size(self, nbytes: int) -> None:
        if nbytes > self.max_bytes:
            raise HTTPException(413, f"an update may have at most {self.max_bytes} bytes")

    def check_count(self, whole: int) -> None:
        """Raise 413 if the peer already has too many complete uploads in the spool."""
        if whole >= self.max_uploads:
            raise HTTPException(413, "this peer has sent enough updates for this round")

    def check_space(self, nbytes: int) -> None:
        if not self.has_space(nbytes):
            raise self.no_space()
