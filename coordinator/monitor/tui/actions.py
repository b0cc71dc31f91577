"""What the monitor asks of the coordinator, and what came of it as the fleet itself shows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import NamedTuple

from coordinator.fleet.reducer import Fleet, Level, called, shown_state
from coordinator.monitor.confirmations import Awaited, Deed, await_deed, confirmed, unconfirmed
from coordinator.remote.source import Action, Source
from protocols.errors import CommonweightError
from protocols.messages.states import PeerState

AT_ONCE = 8
#: A drain is a finish whose end is waited for, as on the command line.
_SENT_AS: dict[Deed, Action] = {
    "pause": "pause",
    "resume": "resume",
    "finish": "finish",
    "drain": "finish",
    "approve": "approve",
    "remove": "remove",
}
_NEEDS_EARS = frozenset({"pause", "resume", "finish", "drain"})


class News(NamedTuple):
    """A line for a person on a deed."""

    level: Level
    text: str
    subject: str


class Deeds:
    """Asks, and keeps what was asked for until it is confirmed."""

    def __init__(self, source: Source, clock: Callable[[], float]) -> None:
        self._source, self._clock = source, clock
        self.awaited: list[Awaited] = []

    async def ask(self, deed: Deed, peers: Iterable[str], fleet: Fleet) -> list[News]:
        """Ask for `deed` on each peer; what could not even be asked."""
        places = asyncio.Semaphore(AT_ONCE)

        async def one(peer: str) -> News | None:
            async with places:
                return await self._ask(deed, peer, fleet)

        answers = await asyncio.gather(*map(one, peers))
        return [news for news in answers if news is not None]

    async def _ask(self, deed: Deed, peer_id: str, fleet: Fleet) -> News | None:
        peer = fleet.peers.get(peer_id)
        if peer is None:
            return News("error", f"{deed}: this peer is no longer in the fleet", peer_id)
        name, now = called(peer), self._clock()
        if deed in _NEEDS_EARS and shown_state(peer, now) is PeerState.OFFLINE:
            why = "it is offline and hears nothing. Try again when it is back."
            return News("error", f"{deed} {name}: {why}", peer_id)
        if deed == "approve" and peer.standing == "enrolled":
            return News("info", f"{name} is approved already", peer_id)
        try:
            await self._source.command(peer_id, _SENT_AS[deed])
        except CommonweightError as err:
            return News("error", f"{deed} {name}: {err.message}. {err.hint}".rstrip(), peer_id)
        self.expect(deed, peer_id, name)
        return None

    def expect(self, deed: Deed, subject: str, name: str) -> None:
        """Wait for the fleet to show this; what was asked of the same before is forgotten."""
        self.awaited = [one for one in self.awaited if one.subject != subject]
        self.awaited.append(await_deed(deed, subject, name, self._clock()))

    def news(self, fleet: Fleet | None) -> list[News]:
        """What was confirmed since the last look, or is overdue."""
        if fleet is None or not self.awaited:
            return []
        told: list[News] = []
        left: list[Awaited] = []
        for awaited in self.awaited:
            if words := confirmed(fleet, awaited):
                told.append(News("info", words, awaited.subject))
            elif self._clock() >= awaited.until:
                told.append(News("warning", unconfirmed(awaited), awaited.subject))
            else:
                left.append(awaited)
        self.awaited = left
        return told

    @property
    def words(self) -> str:
        """What is waited for, short."""
        if not self.awaited:
            return ""
        first = self.awaited[0]
        more = f" and {len(self.awaited) - 1} more" if len(self.awaited) > 1 else ""
        return f"asked: {first.deed} {first.name}{more}"
