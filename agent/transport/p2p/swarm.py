"""Downloads a version piece by piece from several peers at once and from the coordinator.

Each piece is verified against the coordinator's list of digests. A peer that sends wrong bytes, too
many or none costs time only: it is excluded and reported. Without peers, or if the plan says so,
the coordinator sends the pieces that no peer is sending. Blocking.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.download_replicas import DownloadReplica
from agent.transport.p2p.peer_download import PieceDownloader
from agent.transport.p2p.piece_store import PartialVersion
from agent.transport.p2p.sharing import Sharing
from protocols.errors import BadWeights, Refused, Unreachable
from protocols.p2p.swarm import DownloadReport, check_plan

_POLL_S = 0.2
#: After this time without a new piece, or while the coordinator sends, request another plan. The
#: interval doubles each time.
_PLAN_S = 3.0
#: The target duration of one request to the coordinator.
_TARGET_REQUEST_S = 1.0


class SwarmDownload:
    """One download of a version. `received(n)` is called for bytes from peers."""

    def __init__(
        self,
        digest: str,
        nbytes: int,
        link: CoordinatorClient,
        sharing: Sharing,
        received: Callable[[int], None],
    ) -> None:
        self._digest, self._nbytes = digest, nbytes
        self._link, self._sharing, self._received = link, sharing, received
        self._downloaders: list[PieceDownloader] = []
        self._pieces_per_request = 1
        self._replan_s = _PLAN_S

    def run(self, part: Path) -> DownloadReport:
        """Downloads into `part`; pieces stay there if it fails. Serves them to peers during the
        download.

        Returns which peers sent and which failed. Raises BadMessage, BadWeights, OSError and what
        the coordinator's client raises.
        """
        self._next_plan()
        part.touch(mode=0o600)
        self._version = PartialVersion(part, self._plan)
        self._sharing.pieces.add(self._digest, self._version)
        try:
            self._download()
            self._version.sync()
        except BaseException:
            self._sharing.pieces.drop(self._digest)
            raise
        finally:
            self._version.end_writing()
        return self._report()

    def _download(self) -> None:
        self._start_downloaders()
        try:
            while self._version.missing:
                is_helped = any(one.is_working for one in self._downloaders)
                if not is_helped or self._plan.use_coordinator:
                    self._fetch_from_coordinator()
                else:
                    self._version.changed.wait(_POLL_S)
                self._refresh_plan(is_helped)
        finally:
            for one in self._downloaders:
                one.end()
            for one in self._downloaders:
                one.join()

    def _report(self) -> DownloadReport:
        """Returns the peers that sent pieces, with rates, and those that failed."""
        return DownloadReport(
            rates={one.peer: one.rate for one in self._downloaders if one.rate},
            faulty=tuple(sorted({one.peer for one in self._downloaders if one.failed})),
        )

    def _next_plan(self) -> None:
        request = self._sharing.plan_request(self._report().faulty)
        self._plan = self._link.download_plan(self._digest, self._nbytes, request)
        check_plan(self._plan, self._digest, self._nbytes)
        self._planned_at, self._plan_missing = time.monotonic(), -1

    def _start_downloaders(self) -> None:
        working = {one.peer for one in self._downloaders if one.is_working}
        self._downloaders += [
            PieceDownloader(
                source, self._version, self._plan, self._sharing.credentials, self._received
            )
            for source in self._plan.sources
            if source.peer not in working
        ]

    def _refresh_plan(self, is_helped: bool) -> None:
        """Requests another plan if the download is slow or a peer has failed."""
        failed = not is_helped and bool(self._downloaders)
        if not failed and time.monotonic() - self._planned_at < self._replan_s:
            return
        is_stuck = len(self._version.missing) == self._plan_missing
        self._planned_at, self._plan_missing = time.monotonic(), len(self._version.missing)
        if (failed or is_stuck or self._plan.use_coordinator) and self._version.missing:
            self._replan_s *= 2
            self._next_plan()
            self._start_downloaders()

    def _fetch_from_coordinator(self) -> None:
        """Downloads consecutive pieces that no peer is sending, from the coordinator or a replica.

        If the replica fails, the next call asks another one, or the coordinator.
        """
        replica = self._link.replicas.choose(self._nbytes)
        try:
            self._fetch_pieces(replica)
        except (BadWeights, Unreachable, Refused) as err:
            if replica is None:
                raise
            replica.fail(err)

    def _fetch_pieces(self, replica: DownloadReplica | None) -> None:
        pieces = self._version.take(self._pieces_per_request)
        if not pieces:
            self._version.changed.wait(_POLL_S)
            return
        began, piece, waiting = time.monotonic(), pieces.start, bytearray()
        start, stop = self._version.span(pieces[0])[0], self._version.span(pieces[-1])[1]
        try:
            for data in self._link.stream(self._digest, start, stop, replica):
                waiting += data
                while piece in pieces and len(waiting) >= (size := self._version.size(piece)):
                    if not self._version.put(piece, bytes(waiting[:size])):
                        raise BadWeights("the bytes do not match the coordinator's list")
                    del waiting[:size]
                    piece += 1
            if piece in pieces:
                raise Unreachable("the connection was closed before the last byte")
        finally:
            self._version.give_back(pieces)
        took_s = max(time.monotonic() - began, 1e-3)
        self._pieces_per_request = max(
            1, min(4 * len(pieces), round(len(pieces) * _TARGET_REQUEST_S / took_s))
        )
