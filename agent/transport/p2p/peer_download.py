"""Downloads pieces from one peer in a thread."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from base64 import b64encode
from collections.abc import Callable

from agent.transport.p2p.partial_file import PartialFile
from agent.transport.p2p.pinned_tls import PinnedConnection
from protocols.errors import BadWeights, Refused
from protocols.p2p import swarm
from protocols.p2p.swarm import DownloadPlan, PieceSource

log = logging.getLogger("commonweight.share")

#: The time limit for one piece.
PIECE_S = 8.0
#: How often in a row a peer may answer that it does not have the piece yet.
_PATIENCE = 3
_IDLE_S = 0.5

#: `sign(method, path)` returns the headers of a signed request.
SignRequest = Callable[[str, str], dict[str, str]]


class PieceDownloader:
    """Downloads pieces from one peer until all are present or the peer fails.

    `failed` is true if it sent wrong bytes, too many, or none in time. `rate` is in bytes per
    second, 0 before the first piece. `received(n)` is called for received bytes and may block.
    """

    def __init__(
        self,
        holder: PieceSource,
        parts: PartialFile,
        plan: DownloadPlan,
        sign: SignRequest,
        received: Callable[[int], None],
    ) -> None:
        self.peer = holder.peer
        self.failed = False
        self.rate = 0.0
        self._parts, self._plan, self._sign = parts, plan, sign
        self._received = received
        self._connection = PinnedConnection(holder.address, holder.node_public)
        self._thread = threading.Thread(
            target=self._work, name=f"holder {holder.peer}", daemon=True
        )
        self._thread.start()

    @property
    def is_working(self) -> bool:
        return self._thread.is_alive()

    def end_if_overdue(self) -> None:
        """Aborts a request that is past its time limit."""
        self._connection.end_if_overdue()

    def end(self) -> None:
        """Aborts the request; callable from another thread."""
        self._connection.end()

    def join(self) -> None:
        self._thread.join()

    def _work(self) -> None:
        began, got, patience = time.monotonic(), 0, _PATIENCE
        parts = self._parts
        try:
            while patience and not parts.complete:
                if (piece := parts.take()) is None:
                    parts.wait(_IDLE_S)  # another thread may return one
                    continue
                try:
                    data = _piece(self._connection, self._plan, self._sign, *parts.span(piece))
                    self._received(len(data))
                    if not parts.put(piece, data):
                        raise BadWeights("wrong bytes")
                except _NotYet:
                    parts.give_back(piece)
                    patience -= 1
                    continue
                except BaseException:
                    parts.give_back(piece)
                    raise
                got, patience = got + len(data), _PATIENCE
        except (OSError, http.client.HTTPException, Refused, BadWeights) as err:
            self.failed = True
            log.info(
                "no longer using peer %s for %s: %s",
                self.peer,
                self._plan.digest[:12],
                err,
            )
        finally:
            self._connection.close()
            self.rate = got / max(time.monotonic() - began, 1e-3)


class _NotYet(Exception):
    """The peer does not have the piece yet."""


def _piece(
    connection: PinnedConnection, plan: DownloadPlan, sign: SignRequest, start: int, stop: int
) -> bytes:
    """Downloads the bytes `start` to `stop` within the time limit."""
    path = f"/cw/v1/weights/{plan.digest}"
    connection.due = time.monotonic() + PIECE_S
    headers = sign("GET", path)
    headers[swarm.DOWNLOAD_TOKEN_HEADER] = b64encode(plan.token).decode()
    headers["range"] = f"bytes={start}-{stop - 1}"
    connection.request("GET", path, headers=headers)
    connection.sock.settimeout(PIECE_S)
    answer = connection.getresponse()
    if answer.status == 503:
        connection.close()
        connection.due = float("inf")
        raise _NotYet
    if answer.status != 206:
        raise Refused(f"it answered {answer.status}")
    if answer.length != stop - start:
        raise Refused("it sent a different number of bytes than requested")
    data = bytearray()
    while len(data) < stop - start:
        got = answer.read1(stop - start - len(data))
        if not got:
            raise ConnectionError("it broke off")
        data += got
    answer.read()  # reads to the end, so that the connection can be reused
    connection.due = float("inf")
    return bytes(data)
