"""What the monitor asks of the coordinator, and what came of it as the fleet itself shows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import NamedTuple

from coordinator.fleet.reducer import Fleet, Level, called, shown_state
from coordinator.monitor.confirmations import (
    OperatorAction,
    PendingAction,
    outcome,
    start_pending,
    timeout_text,
)
from coordinator.remote.source import Action, Source
from protocols.errors import CommonweightError
from protocols.messages.states import PeerState

MAX_CONCURRENT = 8
#: A drain is a finish whose end is waited for, as on the command line.
_SENT_AS: dict[OperatorAction, Action] = {
    "pause": "pause",
    "resume": "resume",
    "finish": "finish",
    "drain": "finish",
    "approve": "approve",
    "remove": "remove",
}
_NEEDS_CONNECTION = frozenset({"pause", "resume", "finish", "drain"})


class Notice(NamedTuple):
    """A line for a person on a deed."""

    level: Level
    text: str
    subject: str


class ActionTracker:
    """Asks, and keeps what was asked for until it is confirmed."""

    def __init__(self, source: Source, clock: Callable[[], float]) -> None:
        self._source, self._clock = source, clock
        self.pending: list[PendingAction] = []

    async def request(
        self, deed: OperatorAction, peers: Iterable[str], fleet: Fleet
    ) -> list[Notice]:
        """Ask for `deed` on each peer; what could not even be asked."""
        places = asyncio.Semaphore(MAX_CONCURRENT)

        async def one(peer: str) -> Notice | None:
            async with places:
                return await self._request(deed, peer, fleet)

        answers = await asyncio.gather(*map(one, peers))
        return [news for news in answers if news is not None]

    async def _request(self, deed: OperatorAction, peer_id: str, fleet: Fleet) -> Notice | None:
        peer = fleet.peers.get(peer_id)
        if peer is None:
            return Notice("error", f"{deed}: this peer is no longer in the fleet", peer_id)
        name, now = called(peer), self._clock()
        if deed in _NEEDS_CONNECTION and shown_state(peer, now) is PeerState.OFFLINE:
            why = "it is offline and hears nothing. Try again when it is back."
            return Notice("error", f"{deed} {name}: {why}", peer_id)
        if deed == "approve" and peer.standing == "enrolled":
            return Notice("info", f"{name} is approved already", peer_id)
        try:
            await self._source.command(peer_id, _SENT_AS[deed])
        except CommonweightError as err:
            return Notice("error", f"{deed} {name}: {err.message}. {err.hint}".rstrip(), peer_id)
        self.expect(deed, peer_id, name)
        return None

    def expect(self, deed: OperatorAction, subject: str, name: str) -> None:
        """Wait for the fleet to show this; what was asked of the same before is forgotten."""
        self.pending = [one for one in self.pending if one.subject != subject]
        self.pending.append(start_pending(deed, subject, name, self._clock()))

    def take_notices(self, fleet: Fleet | None) -> list[Notice]:
        """What was confirmed since the last look, or is overdue."""
        if fleet is None or not self.pending:
            return []
        told: list[Notice] = []
        left: list[PendingAction] = []
        for awaited in self.pending:
            if words := outcome(fleet, awaited):
                told.append(Notice("info", words, awaited.subject))
            elif self._clock() >= awaited.deadline:
                told.append(Notice("warning", timeout_text(awaited), awaited.subject))
            else:
                left.append(awaited)
        self.pending = left
        return told

    @property
    def summary(self) -> str:
        """What is waited for, short."""
        if not self.pending:
            return ""
        first = self.pending[0]
        more = f" and {len(self.pending) - 1} more" if len(self.pending) > 1 else ""
        return f"asked: {first.action} {first.name}{more}"
