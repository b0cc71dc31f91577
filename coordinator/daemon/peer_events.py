"""What follows when a peer joins, is removed, opens a session, sends something or goes silent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from coordinator.api.exchange import Lingering
from coordinator.fleet.registry import Peer, Registry
from coordinator.fleet.sessions import Sessions
from coordinator.jobs.manager import JobManager
from coordinator.runs.manager import RunManager
from coordinator.transport.flower import ARRIVALS, Superlink
from coordinator.transport.publisher import Mirror
from coordinator.transport.sharing import SharingDesk
from protocols.messages.envelope import EventLine

ONLINE_EVERY_S = 2.0
_CHANGES = {"enrolled": "joined", "awaiting": "asks to join", "removed": "was removed"}


class PeerEvents:
    """Keeps Flower's nodes, the sessions and the mirror in step with the registry.

    `queues` hear of whatever may concern their work.
    """

    def __init__(
        self,
        registry: Registry,
        superlink: Superlink,
        sessions: Sessions,
        mirror: Mirror,
        sharing: SharingDesk,
        lingering: Lingering,
    ) -> None:
        self._registry, self._superlink, self._sessions = registry, superlink, sessions
        self._mirror, self._sharing, self._lingering = mirror, sharing, lingering
        self.queues: Sequence[RunManager | JobManager] = ()

    def name_of(self, peer: str) -> str:
        known = self._registry.peers.get(peer)
        return known.name if known else peer

    def wake(self) -> None:
        """Something changed that runs and jobs may care for."""
        for queue in self.queues:
            queue.wake()

    def ring(self, peers: Sequence[str]) -> None:
        """Tell these peers of work: in the answer that they wait for, else by a doorbell."""
        self._mirror.ring([peer for peer in peers if not self._lingering.wake(peer)])

    # --- the registry ---

    def admit_all(self) -> None:
        for peer in self._registry.peers.values():
            self._admit(peer)

    def _admit(self, peer: Peer) -> None:
        """Register an enrolled peer's Flower key and publish the peer."""
        if peer.standing == "enrolled" and self._sessions.node_of(peer.peer) is None:
            self._sessions.admit(peer.peer, self._superlink.register(peer.node_public))
        if peer.standing != "removed":
            self._mirror.tell_of(peer)

    def on_change(self, peer: Peer) -> None:
        """A peer's standing changed."""
        if peer.standing == "removed":
            if (node := self._sessions.dismiss(peer.peer)) is not None:
                self._superlink.forget(node)
            self._sharing.gone(peer.peer)
            self._mirror.forget(peer.peer)
            self._mirror.tell_of(peer)
            self.wake()
        else:
            self._admit(peer)
        text = f"{peer.name} {_CHANGES[peer.standing]}"
        self._mirror.publish(EventLine(level="info", text=text, subject=peer.peer))

    # --- Flower's sessions ---

    def on_request(self, action: str, node_id: int) -> None:
        """A Fleet request of this node succeeded."""
        if action in ARRIVALS:
            self.wake()
        peer = self._sessions.peer_of(node_id)
        if self._sessions.node_of(peer) is None:
            return
        news = self._sessions.heard(peer)
        if action == "activate-node":
            self._sessions.opened(peer)
            self._sharing.forgive(peer)
            for queue in self.queues:
                queue.session_opened(peer)
            self._mirror.tell_links([self._registry.peers[peer]])
        elif action == "deactivate-node":
            self._sessions.closed(peer)
            self.wake()
            self._mirror.tell_links([self._registry.peers[peer]])
        elif news:
            self.wake()

    def look(self) -> bool:
        """Take over from Flower whose heartbeats hold; True if that is news."""
        # In this thread: a session that opens meanwhile must not be overlooked.
        return self._sessions.set_online(self._superlink.online())

    async def watch(self) -> None:
        """Notice, without a broker, the peers whose heartbeat has run out."""
        while True:
            if self.look():
                self.wake()
            # Also how many messages were rejected: not one by one.
            self._mirror.tell_links(self._registry.peers.values())
            await asyncio.sleep(ONLINE_EVERY_S)
