"""Downloads a version piece by piece from several peers at once and from the coordinator.

Each piece is verified against the coordinator's list of digests. A peer that sends wrong bytes, too
many or none costs time only: it is excluded and reported. Without peers, or if the plan says so,
the coordinator sends the pieces that no peer is sending. Blocking.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.transport.p2p.partial_file import PartialFile
from agent.transport.p2p.peer_download import PieceDownloader, SignRequest
from agent.transport.p2p.piece_store import PieceStore
from protocols.errors import BadWeights
from protocols.p2p import swarm as sharing
from protocols.p2p.swarm import DownloadPlan, DownloadReport

_POLL_S = 0.2
#: After this time without a new piece, or while the coordinator sends, request another plan. The
#: interval doubles each time.
_PLAN_S = 3.0
#: The target duration of one request to the coordinator.
_TARGET_REQUEST_S = 1.0


class _Download:
    """One download: its file, the peers that send, and when to request another plan."""

    def __init__(
        self,
        plan: DownloadPlan,
        parts: PartialFile,
        ask: Callable[[tuple[str, ...]], DownloadPlan],
        stream: Callable[[str, int, int], Iterator[bytes]],
        sign: SignRequest,
        received: Callable[[int], None],
    ) -> None:
        self._parts, self._ask, self._stream, self._sign = parts, ask, stream, sign
        self._received = received
        self._links: list[PieceDownloader] = []
        self._range_length = 1
        self._every_s = _PLAN_S
        self._use_plan(plan)

    def run(self) -> None:
        """Runs until the file is complete. Raises what the coordinator's streams raise."""
        try:
            while not self._parts.complete:
                helped = any(link.is_working for link in self._links)
                if not helped or self._plan.use_coordinator:
                    self._from_coordinator()
                else:
                    self._parts.wait(_POLL_S)
                for link in self._links:
                    link.end_if_overdue()
                self._refresh_plan(helped)
        finally:
            for link in self._links:
                link.end()
            for link in self._links:
                link.join()

    def report(self) -> DownloadReport:
        """Returns the peers that sent pieces, with rates, and those that failed."""
        return DownloadReport(
            rates={link.peer: link.rate for link in self._links if link.rate},
            faulty=tuple(sorted({link.peer for link in self._links if link.failed})),
        )

    def _use_plan(self, plan: DownloadPlan) -> None:
        self._plan, self._planned_at, self._missing_then = plan, time.monotonic(), -1
        working = {link.peer for link in self._links if link.is_working}
        for holder in plan.sources:
            if holder.peer not in working:
                link = PieceDownloader(holder, self._parts, plan, self._sign, self._received)
                self._links.append(link)

    def _refresh_plan(self, helped: bool) -> None:
        """Requests another plan if the download is slow or a peer has failed."""
        failed = not helped and bool(self._links)
        if not failed and time.monotonic() - self._planned_at < self._every_s:
            return
        stuck = self._parts.missing == self._missing_then
        self._missing_then = self._parts.missing
        self._planned_at = time.monotonic()
        if (failed or stuck or self._plan.use_coordinator) and not self._parts.complete:
            self._every_s *= 2
            self._use_plan(self._ask(self.report().faulty))

    def _from_coordinator(self) -> None:
        """Downloads consecutive pieces that nobody else is sending, from the coordinator."""
        row = self._parts.take_range(self._range_length)
        if not row:
            self._parts.wait(_POLL_S)
            return
        began, piece, waiting = time.monotonic(), row.start, bytearray()
        start, stop = self._parts.span(row.start)[0], self._parts.span(row.stop - 1)[1]
        try:
            for data in self._stream(self._plan.digest, start, stop):
                waiting += data
                while piece < row.stop and len(waiting) >= (size := self._size(piece)):
                    if not self._parts.put(piece, bytes(waiting[:size])):
                        raise BadWeights("the coordinator sent bytes that do not match its list")
                    del waiting[:size]
                    piece += 1
            if piece < row.stop:
                raise ConnectionError("the coordinator closed the connection")
        finally:
            for left in range(piece, row.stop):
                self._parts.give_back(left)
        took_s = max(time.monotonic() - began, 1e-3)
        self._range_length = max(1, min(4 * len(row), round(len(row) * _TARGET_REQUEST_S / took_s)))

    def _size(self, piece: int) -> int:
        start, stop = self._parts.span(piece)
        return stop - start


def fetch(
    digest: str,
    nbytes: int,
    part: Path,
    *,
    shelf: PieceStore,
    ask: Callable[[tuple[str, ...]], DownloadPlan],
    stream: Callable[[str, int, int], Iterator[bytes]],
    sign: SignRequest,
    received: Callable[[int], None] = lambda nbytes: None,
) -> DownloadReport:
    """Downloads the version into `part` and returns which peers sent and which failed.

    `ask(faulty)` requests a plan from the coordinator, `stream(digest, start, stop)` those bytes.
    `received(n)` is called for bytes from peers. Raises BadMessage, BadWeights, OSError and what
    the callables raise; received pieces stay in `part`.
    """

    def asked(faulty: tuple[str, ...]) -> DownloadPlan:
        plan = ask(faulty)
        sharing.check_plan(plan, digest, nbytes)
        return plan

    plan = asked(())
    part.touch(mode=0o600)
    parts = PartialFile(part, plan, shelf.begin(digest, part, nbytes))
    try:
        swarm = _Download(plan, parts, asked, stream, sign, received)
        swarm.run()
        parts.sync()
    except BaseException:
        shelf.drop(digest)
        raise
    finally:
        parts.close()
    return swarm.report()
