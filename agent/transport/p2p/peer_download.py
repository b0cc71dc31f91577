"""Downloads pieces from one peer in a thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from agent.home.credentials import Credentials
from agent.transport.p2p.peer_connection import PeerConnection
from agent.transport.p2p.piece_store import PartialVersion
from protocols.errors import BadWeights, Refused, Unreachable
from protocols.p2p.swarm import DOWNLOAD_TOKEN_HEADER, DownloadPlan, PieceSource

log = logging.getLogger("commonweight.share")

#: The time limit for one piece.
PIECE_S = 8.0
#: The number of successive answers in which a peer may not have the piece yet.
_MAX_NOT_READY = 3
_IDLE_S = 0.5


class PieceDownloader:
    """Downloads pieces from one peer until all are present or the peer fails.

    `failed` is true if it sent wrong bytes, too many, or none in time. `rate` is in bytes per
    second, 0 before the first piece. `received(n)` is called for received bytes and may block.
    """

    def __init__(
        self,
        source: PieceSource,
        version: PartialVersion,
        plan: DownloadPlan,
        credentials: Credentials,
        received: Callable[[int], None],
    ) -> None:
        self.peer = source.peer
        self.failed = False
        self.rate = 0.0
        self._version, self._digest, self._received = version, plan.digest, received
        self._connection = PeerConnection(
            source,
            credentials,
            DOWNLOAD_TOKEN_HEADER,
            plan.token,
            stall_s=PIECE_S,
        )
        self._thread = threading.Thread(
            target=self._work, name=f"source {source.peer}", daemon=True
        )
        self._thread.start()

    @property
    def is_working(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        """Aborts the request; callable from another thread."""
        self._connection.end()

    def join(self) -> None:
        self._thread.join()

    def _work(self) -> None:
        began, total, tries = time.monotonic(), 0, _MAX_NOT_READY
        try:
            while tries and self._version.missing:
                if not (pieces := self._version.take()):
                    self._version.changed.wait(_IDLE_S)  # another thread may return one
                    continue
                try:
                    nbytes = self._download(pieces[0])
                finally:
                    self._version.give_back(pieces)
                total += nbytes
                tries = _MAX_NOT_READY if nbytes else tries - 1
        except (OSError, Unreachable, Refused, BadWeights) as err:
            self.failed = True
            log.info("no longer using peer %s for %s: %s", self.peer, self._digest[:12], err)
        finally:
            self._connection.close()
            self.rate = total / max(time.monotonic() - began, 1e-3)

    def _download(self, piece: int) -> int:
        """Downloads a piece; returns its size, or 0 if the peer does not have it yet."""
        start, stop = self._version.span(piece)
        path, wanted = f"/cw/v1/weights/{self._digest}", f"bytes={start}-{stop - 1}"
        with self._connection.exchange("GET", path, PIECE_S, range=wanted) as response:
            if response.status == 503:
                self._connection.close()
                return 0
            if response.status != 206:
                raise Refused(f"it answered {response.status}")
            if response.length != stop - start:
                raise Refused("it sent a different number of bytes than requested")
            data = self._connection.read(response)
        self._received(len(data))
        if not self._version.put(piece, data):
            raise BadWeights("it sent wrong bytes")
        return len(data)
