"""What follows when a peer joins, is removed, opens a session, sends something or goes silent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from coordinator.api.polls import LongPolls
from coordinator.fleet.registry import Peer, Registry
from coordinator.fleet.sessions import Sessions
from coordinator.jobs.manager import JobManager
from coordinator.runs.manager import RunManager
from coordinator.transport.flower import REPLY_ACTIONS, Superlink
from coordinator.transport.publisher import EventPublisher
from coordinator.transport.sharing import SharingRoutes
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
        publisher: EventPublisher,
        sharing: SharingRoutes,
        long_polls: LongPolls,
    ) -> None:
        self._registry, self._superlink, self._sessions = registry, superlink, sessions
        self._publisher, self._sharing, self._long_polls = publisher, sharing, long_polls
        self.queues: Sequence[RunManager | JobManager] = ()

    def name_of(self, peer: str) -> str:
        known = self._registry.peers.get(peer)
        return known.name if known else peer

    def wake_queues(self) -> None:
        """Something changed that runs and jobs may care for."""
        for queue in self.queues:
            queue.wake()

    def announce_work(self, peers: Sequence[str]) -> None:
        """Tell these peers of work: in the answer that they wait for, else by a doorbell."""
        self._publisher.ring_doorbells([peer for peer in peers if not self._long_polls.wake(peer)])

    # --- the registry ---

    def admit_all(self) -> None:
        for peer in self._registry.peers.values():
            self._admit(peer)

    def _admit(self, peer: Peer) -> None:
        """Register an enrolled peer's Flower key and publish the peer."""
        if peer.standing == "enrolled" and self._sessions.node_of(peer.peer) is None:
            self._sessions.add(peer.peer, self._superlink.register_node(peer.node_public))
        if peer.standing != "removed":
            self._publisher.publish_peer(peer)

    def on_change(self, peer: Peer) -> None:
        """A peer's standing changed."""
        if peer.standing == "removed":
            if (node := self._sessions.remove(peer.peer)) is not None:
                self._superlink.remove_node(node)
            self._sharing.remove_peer(peer.peer)
            self._publisher.clear_presence(peer.peer)
            self._publisher.publish_peer(peer)
            self.wake_queues()
        else:
            self._admit(peer)
        text = f"{peer.name} {_CHANGES[peer.standing]}"
        self._publisher.publish(EventLine(level="info", text=text, subject=peer.peer))

    # --- Flower's sessions ---

    def on_request(self, action: str, node_id: int) -> None:
        """A Fleet request of this node succeeded."""
        if action in REPLY_ACTIONS:
            self.wake_queues()
        peer = self._sessions.peer_of(node_id)
        if self._sessions.node_of(peer) is None:
            return
        news = self._sessions.on_request(peer)
        if action == "activate-node":
            self._sessions.open(peer)
            self._sharing.clear_complaints(peer)
            for queue in self.queues:
                queue.session_opened(peer)
            self._publisher.publish_links([self._registry.peers[peer]])
        elif action == "deactivate-node":
            self._sessions.close(peer)
            self.wake_queues()
            self._publisher.publish_links([self._registry.peers[peer]])
        elif news:
            self.wake_queues()

    def refresh_online(self) -> bool:
        """Take over from Flower whose heartbeats hold; True if that is news."""
        # In this thread: a session that opens meanwhile must not be overlooked.
        return self._sessions.set_online(self._superlink.online_nodes())

    async def watch(self) -> None:
        """Notice, without a broker, the peers whose heartbeat has run out."""
        while True:
            if self.refresh_online():
                self.wake_queues()
            # Also how many messages were rejected: not one by one.
            self._publisher.publish_links(self._registry.peers.values())
            await asyncio.sleep(ONLINE_EVERY_S)
