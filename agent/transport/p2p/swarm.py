"""Fetching a version piece by piece: from several peers at once, and from the coordinator.

Each piece is checked against the coordinator's list when it comes, so a holder that sends wrong
bytes, endless bytes or none costs time only: it is left out, told of, and the others go on. With no
holder left, or if the plan says so, the coordinator sends what nobody else is fetching. Blocking.
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
#: Without a new piece for so long, or while the coordinator sends, another plan may be better. It
#: is asked for at ever longer intervals.
_PLAN_S = 3.0
#: So long one request to the coordinator should take: then somebody else may be nearer.
_TARGET_REQUEST_S = 1.0


class _Download:
    """One download: its parts, the holders that help, and when to ask for others."""

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
        """Until all is here. Raises what the coordinator's streams raise."""
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
        """Who helped, and who failed."""
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
        """Ask who else could help, if this goes slowly or a holder has failed."""
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
        """A row of pieces that nobody else is fetching, each passed on as soon as it is whole."""
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
                        raise BadWeights("the coordinator's bytes are not those of its own list")
                    del waiting[:size]
                    piece += 1
            if piece < row.stop:
                raise ConnectionError("the coordinator broke off")
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
    """Bring the version into `part`; who helped, and who failed.

    `ask(faulty)` gets a plan from the coordinator, `stream(digest, start, stop)` those bytes, and
    `received(n)` is told of bytes from holders.
    Raises BadMessage, BadWeights, OSError and what these two raise; what has come stays in `part`.
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
