"""Limits on uploads: whose, of which size, how many of each peer, and free space on the disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from starlette.exceptions import HTTPException

from protocols.local import disk_space

#: Complete uploads of one peer in the spool, in addition to those that count: one whose reply has
#: not arrived yet, and one that replaces it. A further one replaces the oldest.
MAX_UPLOADS = 2
#: Kept free for the ledger, in addition to the next version.
_RESERVE_BYTES = 4 * 1024 * 1024
#: An agent retries sooner than this after an upload was refused for lack of space.
_SHORTAGE_S = 20.0


class UploadLimits:
    """The limits of one spool. The current run sets them. Each refusal is an HTTPException."""

    def __init__(self, folder: Path, max_bytes: int = 0) -> None:
        self._folder = folder
        #: Size of one upload. 0 until it is known.
        self.max_bytes = max_bytes
        #: False while nothing waits for an upload.
        self.is_expected: Callable[[], bool] = lambda: True
        #: Size of the largest upload that this peer may send now. 0: none.
        self.max_bytes_of: Callable[[str], int] = lambda peer: self.max_bytes
        #: Size of the next version. Uploads must leave space for it.
        self.version_bytes = 0
        #: The digests of a peer's updates that the ledger names and no version contains yet.
        self.counted: Callable[[str], Set[str]] = _none
        #: Peers whose replies are being validated. Their uploads must stay until then.
        self.validating: set[str] = set()
        #: Bytes that current uploads have announced and not sent yet.
        self.promised_bytes = 0
        self._refused_at = -math.inf
        #: Called when an upload is refused for lack of space.
        self.on_shortage: Callable[[], None] = lambda: None

    def close(self) -> None:
        """The run has ended: expect no upload before the next run sets its limits."""
        self.max_bytes = self.version_bytes = 0
        self.counted = _none

    @contextmanager
    def keeping(self, peers: Set[str]) -> Iterator[None]:
        """Keep the uploads of these peers for the duration of the block."""
        self.validating |= peers
        try:
            yield
        finally:
            self.validating -= peers

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

    def check_size(self, peer: str, nbytes: int) -> None:
        if nbytes > (limit := self.max_bytes_of(peer)):
            raise HTTPException(
                413, f"it has {nbytes:,} bytes, and this run takes at most {limit:,}"
            )

    def check_space(self, nbytes: int) -> None:
        if not self.has_space(nbytes):
            raise self.no_space()


def _none(_: str) -> Set[str]:
    return frozenset()
