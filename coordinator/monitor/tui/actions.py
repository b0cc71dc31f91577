"""Requests of the operator, and their outcomes as the fleet reports them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from coordinator.fleet.readings import display_name, shown_state
from coordinator.fleet.state import Fleet, Level
from coordinator.monitor import confirmations
from coordinator.monitor.confirmations import OperatorAction, PendingAction
from coordinator.remote.source import Source
from protocols.errors import CommonweightError
from protocols.messages.envelope import Command
from protocols.messages.states import PeerState

if TYPE_CHECKING:
    from coordinator.remote.api_client import Remote

MAX_CONCURRENT = 8
#: A drain is a finish that is watched to its end, as on the command line.
_REQUESTS: dict[OperatorAction, Callable[[Remote, str], object]] = {
    "pause": lambda remote, peer: remote.command(peer, Command(action="pause")),
    "resume": lambda remote, peer: remote.command(peer, Command(action="resume")),
    "finish": lambda remote, peer: remote.command(peer, Command(action="finish")),
    "drain": lambda remote, peer: remote.command(peer, Command(action="finish")),
    "approve": lambda remote, peer: remote.approve(peer),
    "remove": lambda remote, peer: remote.remove(peer),
}
_NEEDS_CONNECTION = frozenset({"pause", "resume", "finish", "drain"})


class Notice(NamedTuple):
    """A line for the operator about an action."""

    level: Level
    text: str
    subject: str


class ActionTracker:
    """Sends commands, and waits until the fleet confirms them."""

    def __init__(self, source: Source, clock: Callable[[], float]) -> None:
        self._source, self._clock = source, clock
        self.pending: list[PendingAction] = []

    async def request(
        self, action: OperatorAction, peers: Iterable[str], fleet: Fleet
    ) -> list[Notice]:
        """Request `action` from each peer; returns the requests that failed."""
        slots = asyncio.Semaphore(MAX_CONCURRENT)

        async def request_one(peer: str) -> Notice | None:
            async with slots:
                return await self._request(action, peer, fleet)

        notices = await asyncio.gather(*map(request_one, peers))
        return [notice for notice in notices if notice is not None]

    async def _request(self, action: OperatorAction, peer_id: str, fleet: Fleet) -> Notice | None:
        peer = fleet.peers.get(peer_id)
        if peer is None:
            return Notice("error", f"{action}: this peer is no longer in the fleet", peer_id)
        name, state = display_name(peer), shown_state(peer, self._clock())
        if action in _NEEDS_CONNECTION and state is PeerState.OFFLINE:
            text = f"{action} {name}: it is offline. Try again when it is back."
            return Notice("error", text, peer_id)
        if action == "approve" and peer.standing == "enrolled":
            return Notice("info", f"{name} is already approved", peer_id)
        try:
            await self._source.ask(lambda remote: _REQUESTS[action](remote, peer_id))
        except CommonweightError as err:
            text = f"{action} {name}: {err.message}. {err.hint}".rstrip()
            return Notice("error", text, peer_id)
        self.expect(action, peer_id, name)
        return None

    def expect(self, action: OperatorAction, subject: str, name: str) -> None:
        """Wait for the outcome; an earlier action on the same subject is forgotten."""
        self.pending = [one for one in self.pending if one.subject != subject]
        self.pending.append(confirmations.start_pending(action, subject, name, self._clock()))

    def take_notices(self, fleet: Fleet | None) -> list[Notice]:
        """Notices about the actions that now have an outcome or are overdue."""
        if fleet is None:
            return []
        notices: list[Notice] = []
        still_pending: list[PendingAction] = []
        for pending in self.pending:
            if text := confirmations.outcome(fleet, pending):
                notices.append(Notice("info", text, pending.subject))
            elif self._clock() >= pending.deadline:
                notices.append(
                    Notice("warning", confirmations.timeout_text(pending), pending.subject)
                )
            else:
                still_pending.append(pending)
        self.pending = still_pending
        return notices

    @property
    def summary(self) -> str:
        """A short line about the pending actions."""
        if not self.pending:
            return ""
        first = self.pending[0]
        more = f" and {len(self.pending) - 1} more" if len(self.pending) > 1 else ""
        return f"requested: {first.action} {first.name}{more}"
