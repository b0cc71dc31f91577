"""Reactions to peers: joining, removal, sessions, requests and missed heartbeats."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from coordinator.api.polls import LongPolls
from coordinator.fleet.auth import OPERATOR
from coordinator.fleet.members import Operator, Peer
from coordinator.fleet.registry import Registry
from coordinator.fleet.sessions import Sessions
from coordinator.jobs.manager import JobManager
from coordinator.runs.manager import RunManager
from coordinator.transport.external_broker import ExternalBroker
from coordinator.transport.flower import REPLY_ACTIONS, Superlink
from coordinator.transport.mosquitto import MosquittoBroker
from coordinator.transport.mqtt_access import monitor_user
from coordinator.transport.mqtt_broker import EmbeddedBroker
from coordinator.transport.publisher import EventPublisher
from coordinator.transport.sharing import SharingRoutes
from protocols.messages.envelope import EventLine, strip_controls

log = logging.getLogger("commonweight.hub")

ONLINE_EVERY_S = 2.0
_CHANGES = {"enrolled": "joined", "awaiting": "asks to join", "removed": "was removed"}


class PeerEvents:
    """Updates Flower's nodes, sessions, MQTT logins, events, and the run and job `queues`."""

    def __init__(
        self,
        registry: Registry,
        superlink: Superlink,
        sessions: Sessions,
        publisher: EventPublisher,
        sharing: SharingRoutes,
        long_polls: LongPolls,
        broker: EmbeddedBroker | ExternalBroker | MosquittoBroker,
    ) -> None:
        self._registry, self._superlink, self._sessions = registry, superlink, sessions
        self._publisher, self._sharing, self._long_polls = publisher, sharing, long_polls
        self._broker = broker
        self.queues: Sequence[RunManager | JobManager] = ()
        self.on_removed: Callable[[str], None] = lambda peer: None

    def name_of(self, peer: str) -> str:
        known = self._registry.peers.get(peer)
        return known.name if known else peer

    def wake_queues(self) -> None:
        """Let runs and jobs check for a change."""
        for queue in self.queues:
            queue.wake()

    def announce_work(self, peers: Sequence[str]) -> None:
        """Notify these peers of work: in the response that they wait for, or by a doorbell."""
        self._publisher.ring_doorbells([peer for peer in peers if not self._long_polls.wake(peer)])

    # --- the registry ---

    def admit_all(self) -> None:
        for peer in self._registry.peers.values():
            self._admit(peer)
        self._broker.admit(monitor_user(OPERATOR), "monitor")
        for operator in self._registry.operators.values():
            self.on_operator_change(operator)

    def _admit(self, peer: Peer) -> None:
        """Register an enrolled peer's Flower key and MQTT login, and publish the peer."""
        if peer.standing == "enrolled" and self._sessions.node_of(peer.peer) is None:
            self._sessions.add(peer.peer, self._superlink.register_node(peer.node_public))
            self._broker.admit(peer.peer, "agent")
        if peer.standing != "removed":
            self._publisher.publish_peer(peer)

    def on_change(self, peer: Peer) -> None:
        if peer.standing == "removed":
            if (node := self._sessions.remove(peer.peer)) is not None:
                self._superlink.remove_node(node)
            self._sharing.remove_peer(peer.peer)
            self.on_removed(peer.peer)
            self._broker.drop(peer.peer)
            self._publisher.clear_presence(peer.peer)
            self._publisher.publish_peer(peer)
            self.wake_queues()
        else:
            self._admit(peer)
        text = f"{peer.name} {_CHANGES[peer.standing]}"
        self._publisher.publish(EventLine(level="info", text=text, subject=peer.peer))

    def publish(self, peer: str) -> None:
        """Publish what has changed about an enrolled peer."""
        self._publisher.publish_peer(self._registry.peers[peer])

    def on_operator_change(self, operator: Operator) -> None:
        """An operator or observer joined or was removed."""
        user = monitor_user(operator.operator)
        if operator.removed:
            self._broker.drop(user)
        else:
            self._broker.admit(user, "monitor")

    def on_mqtt_refused(self, user: str, why: str) -> None:
        """The broker's gate refused something for the first time."""
        who = self.name_of(user) if user else "a client without a valid login"
        log.warning("MQTT: refused %s: %s", strip_controls(who), why)
        text = strip_controls(f"MQTT: refused {who}: {why}")
        self._publisher.publish(EventLine(level="warning", text=text, subject=user[:64]))

    # --- Flower's sessions ---

    def on_request(self, action: str, node_id: int) -> None:
        """Handle a successful Fleet request or poll of this node."""
        if action in REPLY_ACTIONS:
            self.wake_queues()
        peer = self._sessions.peer_of(node_id)
        if self._sessions.node_of(peer) is None:
            return
        is_back = self._sessions.on_request(peer)
        self._publisher.note_request(peer)
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
        elif is_back:
            self.wake_queues()

    def refresh_online(self) -> bool:
        """Update the online peers from Flower's heartbeats. Returns True if they changed."""
        # Not in another thread, or a session that opens at that time could be missed.
        return self._sessions.set_online(self._superlink.online_nodes())

    async def watch(self) -> None:
        """Detect expired heartbeats, which also works without a broker."""
        while True:
            if self.refresh_online():
                self.wake_queues()
            # This also publishes the number of rejected messages.
            self._publisher.publish_links(self._registry.peers.values())
            await asyncio.sleep(ONLINE_EVERY_S)
