"""What the coordinator says and hears on MQTT: presence, doorbells, and a mirror for the monitors.

Its own messages are folded into the fleet here as well, whether a broker is there or not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from coordinator.fleet import reducer as fleets
from coordinator.fleet.reducer import Fleet
from coordinator.fleet.registry import Peer
from coordinator.fleet.sessions import Sessions
from coordinator.storage.settings import Keys
from coordinator.transport.mqtt_client import Feed
from protocols.errors import BadMessage, Unreachable
from protocols.messages import topics
from protocols.messages.envelope import (
    Command,
    CoordinatorBody,
    Envelope,
    EventLine,
    Links,
    LogRequest,
    PeerChanged,
    Presence,
    Verify,
    strip_controls,
)
from protocols.messages.mqtt import MqttAddress, SequencedSigner
from protocols.messages.topics import COORDINATOR, Kind

log = logging.getLogger("commonweight.hub")

#: Events that wait for a broker that hangs.
MOST_OUTGOING = 10_000


class Mirror:
    """`on_news()` is told that somebody comes, goes or pauses, `on_up()` that a broker is back."""

    def __init__(self, fleet: Fleet, sessions: Sessions, keys: Keys) -> None:
        self._fleet, self._sessions, self._keys = fleet, sessions, keys
        self.on_news: Callable[[], None] = lambda: None
        self.on_up: Callable[[], None] = lambda: None
        self._voice = SequencedSigner(COORDINATOR, keys.sign_key.sign)
        self._outgoing: asyncio.Queue[Envelope] = asyncio.Queue(MOST_OUTGOING)
        self._saying: set[asyncio.Task[bool]] = set()
        self._feed: Feed | None = None
        self._up = False
        self._rejected = 0

    # --- its two tasks ---

    async def listen(self, address: MqttAddress, verify: Verify) -> None:
        """Hold the link to the broker at `address`, again and again."""
        self._feed = Feed(
            address,
            self._keys.fleet,
            verify,
            self._heard,
            self._on_link,
            self._on_rejected,
            sign=self._keys.sign_key.sign,
        )
        await self._feed.run()

    async def relay(self) -> None:
        """Send the monitors what was published."""
        while True:
            envelope = await self._outgoing.get()
            if self._feed is not None:
                await self._feed.relay(envelope)

    # --- saying ---

    def publish(self, body: CoordinatorBody) -> None:
        """Fold one of our own messages and queue it for the monitors."""
        envelope = self._voice.next_envelope(body)
        fleets.fold(self._fleet, envelope, time.time())
        if not self._outgoing.full():  # monitors see the gap in the numbers, and ask for a snapshot
            self._outgoing.put_nowait(envelope)

    def ring(self, peers: Sequence[str]) -> None:
        """Tell these that work is waiting."""
        if self._feed is not None:
            for peer in peers:
                self._say_soon(self._feed.ring(peer))

    def forget(self, peer: str) -> None:
        """Take a removed peer's retained messages off the broker."""
        if self._feed is not None:
            self._say_soon(self._feed.forget(peer))

    def _say_soon(self, saying: Coroutine[Any, Any, bool]) -> None:
        """Something that nobody waits for."""
        task = asyncio.create_task(saying)
        self._saying.add(task)
        task.add_done_callback(self._saying.discard)

    async def command(self, peer: str, command: Command) -> None:
        """Send an operator's command. Raises Unreachable."""
        if self._feed is None or not await self._feed.command(peer, command):
            raise Unreachable(
                "the MQTT broker is away, and commands travel over it",
                "training goes on; try again when the monitor shows mqtt ●",
            )

    async def ask_logs(self, peer: str, asked: LogRequest) -> bool:
        """Whether the broker has the question."""
        topic = topics.command(self._keys.fleet, peer)
        return self._feed is not None and await self._feed.publish(topic, asked)

    def tell_of(self, peer: Peer) -> None:
        """Who a peer is, and whether its session holds."""
        self.publish(
            PeerChanged(
                peer=peer.peer,
                name=peer.name,
                labels=peer.labels,
                enrollment=peer.standing,
                public_key=peer.sign_public,
                has_session=self._sessions.is_open(peer.peer),
            )
        )

    def tell_links(self, peers: Iterable[Peer] = ()) -> None:
        """What is up, how many messages were rejected, whose session holds, if that is news."""
        for peer in peers:
            shown = self._fleet.peers.get(peer.peer)
            if shown is not None and shown.flower is not self._sessions.is_open(peer.peer):
                self.tell_of(peer)
        online = self._sessions.any_online
        links = Links(mqtt=self._up, flower=online, rejected=self._rejected)
        if links != self._fleet.links:
            self.publish(links)

    # --- hearing ---

    def _heard(self, _: Kind, envelope: Envelope) -> None:
        body = envelope.body
        before = self._sessions.is_eligible(envelope.sender)
        known = self._presence_numbers(envelope.sender)
        fleets.fold(self._fleet, envelope, time.time())
        # One that the fold has ignored was sent again by somebody: it moves nothing here either.
        if isinstance(body, Presence) and known != self._presence_numbers(envelope.sender):
            self._sessions.heard_presence(envelope.sender, body)
            if before != self._sessions.is_eligible(envelope.sender):
                self.on_news()

    def _presence_numbers(self, peer: str) -> tuple[str, int, int] | None:
        """What changes with each presence that the fold takes."""
        shown = self._fleet.peers.get(peer)
        return (shown.epoch, shown.presence_seq, shown.will_seq) if shown else None

    def _on_rejected(self, topic: str, err: BadMessage) -> None:
        self._rejected += 1
        if self._rejected & (self._rejected - 1) == 0:  # 1st, 2nd, 4th, 8th…: a flood stays quiet
            log.warning(
                "ignored a message on %s: %s", strip_controls(topic), strip_controls(err.message)
            )
            text = f"ignored {self._rejected} malformed or forged MQTT messages so far"
            self.publish(EventLine(level="warning", text=text))

    def _on_link(self, up: bool, why: str) -> None:
        changed = up != self._up
        self._up = up
        self.tell_links()
        if changed:
            text = "the MQTT broker is up" if up else f"no MQTT broker: {why}; training goes on"
            self.publish(EventLine(level="info" if up else "warning", text=strip_controls(text)))
        if up:
            self.on_up()
