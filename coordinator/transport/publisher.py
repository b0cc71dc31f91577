"""The coordinator's side of MQTT: presence in; doorbells, commands and events out.

Our own events are also applied to the fleet here, whether a broker is connected or not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from msgspec.structs import replace

from coordinator.fleet.members import Peer
from coordinator.fleet.readings import has_presence
from coordinator.fleet.reducer import reduce
from coordinator.fleet.sessions import Sessions
from coordinator.fleet.state import Fleet
from coordinator.fleet.state import Peer as ShownPeer
from coordinator.storage.settings import Keys
from coordinator.transport.mqtt_client import FleetMqttClient
from protocols.errors import Awaited, BadMessage, Unreachable
from protocols.messages import envelope as wire
from protocols.messages.envelope import Command, Envelope, Verify, strip_controls
from protocols.messages.mqtt import MqttAddress, SequencedSigner
from protocols.messages.states import PeerState
from protocols.messages.topics import COORDINATOR, Kind

log = logging.getLogger("commonweight.hub")

#: Events that wait while the broker hangs.
MAX_OUTGOING = 10_000
#: How long a command waits for a peer that has to connect to the broker again.
_POLL_S, _MAX_POLLS = 0.1, 50
_MAX_REASON = 300
#: The most reasons that are logged while the link is down. The monitor always shows the last one.
_MAX_TOLD = 32


class EventPublisher:
    """Publishes our own messages, and applies what arrives to `fleet` and `sessions`.

    `on_eligibility_change()` is called when a peer's presence changes whether it can be given work,
    `on_up()` when the link to a broker is up.
    """

    def __init__(self, fleet: Fleet, sessions: Sessions, keys: Keys) -> None:
        self._fleet, self._sessions, self._keys = fleet, sessions, keys
        self.on_eligibility_change: Callable[[], None] = lambda: None
        self.on_up: Callable[[], None] = lambda: None
        #: The task for which a run or job awaits a decision of this peer's owner, or "", and it.
        self.awaits: Callable[[str], tuple[str, Awaited]] = lambda peer: ("", "consent")
        #: The peers from which this peer fetched its last version, with bytes/s.
        self.fetched_from: Callable[[str], dict[str, float]] = lambda peer: {}
        self._sequencer = SequencedSigner(COORDINATOR, keys.sign_key.sign)
        self._outgoing: asyncio.Queue[Envelope] = asyncio.Queue(MAX_OUTGOING)
        self._sending: set[asyncio.Task[bool]] = set()
        self._client: FleetMqttClient | None = None
        self._up, self._why = False, ""
        #: Reasons that were told since the link was up. Some are words of the broker.
        self._told: set[str] = set()
        #: The peers whose messages have arrived since the link is up.
        self._heard: set[str] = set()
        self._rejected = 0

    # --- its two tasks ---

    async def listen(self, address: MqttAddress, verify: Verify) -> None:
        """Keep the link to the broker at `address` up until cancelled."""
        self._client = FleetMqttClient(
            address,
            self._keys.fleet,
            verify,
            self._on_message,
            self._on_link,
            self._on_rejected,
            sign=self._keys.sign_key.sign,
        )
        await self._client.run()

    async def relay(self) -> None:
        """Send published events to the monitors until cancelled."""
        while True:
            envelope = await self._outgoing.get()
            if self._client is not None:
                await self._client.publish_event(envelope)

    # --- outgoing ---

    def publish(self, body: wire.CoordinatorBody) -> None:
        """Apply one of our own messages to the fleet and queue it for the monitors."""
        envelope = self._sequencer.next_envelope(body)
        reduce(self._fleet, envelope, time.time())
        if not self._outgoing.full():  # monitors see the gap, and fetch a snapshot
            self._outgoing.put_nowait(envelope)

    def ring_doorbells(self, peers: Sequence[str]) -> None:
        """Tell these peers that work is waiting."""
        if self._client is not None:
            for peer in peers:
                self._send_in_background(self._client.ring_doorbell(peer))

    def clear_presence(self, peer: str) -> None:
        """Remove a removed peer's retained presence from the broker."""
        if self._client is not None:
            self._send_in_background(self._client.clear_presence(peer))

    def _send_in_background(self, saying: Coroutine[Any, Any, bool]) -> None:
        task = asyncio.create_task(saying)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def command(self, peer: str, command: Command) -> None:
        """Send an operator's command. Raises Unreachable if it would be lost.

        A broker that was restarted has no subscriber before the peer is back.
        """
        shown = self._fleet.peers.get(peer)
        is_gone = shown and (shown.no_presence or shown.state is PeerState.OFFLINE)
        for _ in range(0 if is_gone else _MAX_POLLS):
            if peer in self._heard or not self._up:
                break
            await asyncio.sleep(_POLL_S)
        if self._up and shown and (is_gone or peer not in self._heard):
            raise Unreachable(
                f"{shown.name} is not connected to the MQTT broker, and commands travel over it",
                "commonweight status shows when it is back; on its machine: commonweight-agent up",
            )
        if self._client is None or not await self._client.send_to(peer, command):
            raise Unreachable(
                "the MQTT broker is down, and commands travel over it",
                "training continues; try again when the monitor shows mqtt ●",
            )

    async def request_logs(self, peer: str, request: wire.LogRequest) -> bool:
        """Send a request for logs. Returns whether the broker has it."""
        return self._client is not None and await self._client.send_to(peer, request)

    def publish_peer(self, peer: Peer, state: PeerState | None = None) -> None:
        """Publish a peer's identity, whether its session is open, and a state from its requests."""
        task, decision = self.awaits(peer.peer)
        self.publish(
            replace(
                peer.changed(has_session=self._sessions.is_open(peer.peer)),
                state=state,
                awaits_consent=task,
                awaits=decision,
                fetched_from=self.fetched_from(peer.peer),
            )
        )

    def note_request(self, peer: str) -> None:
        """A request is a sign of life of a peer whose presence is missing."""
        shown = self._fleet.peers.get(peer)
        if shown is not None and shown.no_presence:
            shown.seen_at = time.time()

    def publish_links(self, peers: Iterable[Peer] = ()) -> None:
        """Publish changes of links, sessions and the number of rejected messages."""
        now = time.time()
        for peer in peers:
            shown = self._fleet.peers.get(peer.peer)
            if shown is None:
                continue
            state = self._state_without_presence(shown, now)
            if (
                shown.flower is not self._sessions.is_open(peer.peer)
                or (shown.awaits_consent, shown.awaits) != self.awaits(peer.peer)
                or state is not None
            ):
                was_eligible = self._sessions.is_eligible(peer.peer)
                self.publish_peer(peer, state)
                if was_eligible != self._sessions.is_eligible(peer.peer):
                    self.on_eligibility_change()
        online = self._sessions.any_online
        links = wire.Links(mqtt=self._up, flower=online, rejected=self._rejected, why=self._why)
        if links != self._fleet.links:
            self.publish(links)

    def _state_without_presence(self, shown: ShownPeer, now: float) -> PeerState | None:
        """The new state of a peer whose presence is missing; None if it is there, or unchanged."""
        if shown.standing != "enrolled" or (self._up and has_presence(shown, now)):
            return None
        state = self._sessions.state_from_requests(shown.peer)
        if state is None:
            is_gone = shown.no_presence or not self._up
            return PeerState.OFFLINE if is_gone and shown.state is not PeerState.OFFLINE else None
        if not shown.no_presence and not self._sessions.presence_is_due(shown.peer):
            return None
        return None if shown.no_presence and shown.state is state else state

    # --- incoming ---

    def _on_message(self, _: Kind, envelope: Envelope) -> None:
        body = envelope.body
        self._heard.add(envelope.sender)
        before = self._sessions.is_eligible(envelope.sender)
        known = self._presence_numbers(envelope.sender)
        reduce(self._fleet, envelope, time.time())
        # A presence that the reducer ignores is a replay, so it changes nothing here either.
        if isinstance(body, wire.Presence) and known != self._presence_numbers(envelope.sender):
            self._sessions.on_presence(envelope.sender, body)
            if before != self._sessions.is_eligible(envelope.sender):
                self.on_eligibility_change()

    def _presence_numbers(self, peer: str) -> tuple[str, int, int] | None:
        """Numbers that change with each presence that the reducer accepts."""
        shown = self._fleet.peers.get(peer)
        return (shown.epoch, shown.presence_seq, shown.will_seq) if shown else None

    def _on_rejected(self, topic: str, err: BadMessage) -> None:
        self._rejected += 1
        if self._rejected & (self._rejected - 1) == 0:  # 1st, 2nd, 4th, 8th… of a flood
            log.warning(
                "ignored a message on %s: %s", strip_controls(topic), strip_controls(err.message)
            )
            text = f"ignored {self._rejected} malformed or forged MQTT messages so far"
            self.publish(wire.EventLine(level="warning", text=text))

    def _on_link(self, up: bool, why: str) -> None:
        changed = up != self._up
        self._up, self._why = up, strip_controls(why)[:_MAX_REASON]
        if not up:
            self._heard.clear()
        self.publish_links()
        if up:
            if self._told:
                log.info("the MQTT broker is up")
            if changed:
                self.publish(wire.EventLine(level="info", text="the MQTT broker is up"))
            self._told.clear()
            self.on_up()
            return
        # First "was lost", then what a new connection says; each once, however often it is tried.
        if self._why not in self._told and len(self._told) < _MAX_TOLD:
            self._told.add(self._why)
            text = f"no MQTT broker: {self._why}; training continues"
            log.warning("%s", text)
            self.publish(wire.EventLine(level="warning", text=text))
