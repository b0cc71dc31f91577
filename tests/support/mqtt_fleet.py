"""A small fleet over MQTT: CA, keys, the embedded broker with TLS, clients of both sides."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiomqtt

from agent.transport.mqtt_client import MqttClient
from coordinator.transport.mqtt_access import Passwords
from coordinator.transport.mqtt_broker import EmbeddedBroker
from coordinator.transport.mqtt_client import FleetMqttClient
from protocols.enrollment import certificates, identity
from protocols.errors import BadMessage
from protocols.local.atomic_files import write_private
from protocols.messages import topics
from protocols.messages.envelope import Body, Command, Doorbell, Envelope, Presence
from protocols.messages.mqtt import MqttAddress, tls_context
from protocols.messages.states import PeerState

HOST = "127.0.0.1"
IDLE = Presence(state=PeerState.IDLE, name="box")


@asynccontextmanager
async def running(*loops: Callable[[], object]) -> AsyncIterator[None]:
    """Run these coroutine functions during the block, then cancel them."""
    tasks = [asyncio.ensure_future(loop()) for loop in loops]  # type: ignore[call-overload]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results), results


class Watch:
    """A coordinator's MQTT client and the messages that it received."""

    def __init__(self, site: Site, address: MqttAddress, **options: object) -> None:
        self._numbers = itertools.count()
        self.heard: list[Envelope] = []
        self.kinds: list[str] = []
        self.refused: list[tuple[str, BadMessage]] = []
        self.changes: list[tuple[bool, str]] = []
        self.feed = FleetMqttClient(
            address,
            site.fleet,
            site.verify,
            self._hear,
            lambda up, why: self.changes.append((up, why)),
            lambda topic, why: self.refused.append((topic, why)),
            **options,  # type: ignore[arg-type]
        )

    async def tell(self, body: Body) -> bool:
        """Send an event like the coordinator, with the next number."""
        envelope = Envelope(
            sender=topics.COORDINATOR, epoch="e", seq=next(self._numbers), at=time.time(), body=body
        )
        return await self.feed.publish_event(envelope)

    def _hear(self, kind: str, envelope: Envelope) -> None:
        self.kinds.append(kind)
        self.heard.append(envelope)

    def bodies(self, kind: type[Body]) -> list[Body]:
        return [one.body for one in self.heard if isinstance(one.body, kind)]


class Agent:
    """An agent's MQTT client and the commands that it received."""

    def __init__(self, site: Site, address: MqttAddress) -> None:
        self.told: list[Doorbell | Command] = []
        self.changes: list[tuple[bool, str]] = []
        self.link = MqttClient(
            address,
            site.fleet,
            site.peer,
            site.agent_key.sign,
            identity.public_bytes(site.coordinator_key),
            self.told.append,
            lambda up, why: self.changes.append((up, why)),
        )


@dataclass
class Site:
    """A folder with a CA and a TLS certificate, the keys, one enrolled peer."""

    folder: Path
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    coordinator_key: identity.SigningKey = field(default_factory=identity.new_signing_key)
    agent_key: identity.SigningKey = field(default_factory=identity.new_signing_key)

    def __post_init__(self) -> None:
        ca_key, ca_pem = certificates.new_ca("test")
        key, pem = certificates.new_server_certificate(ca_key, ca_pem, ["localhost", HOST])
        write_private(self.folder / "tls.key", identity.private_pem(key))
        (self.folder / "tls.pem").write_bytes(pem)
        self.ca_pem = ca_pem.decode()
        self.fleet = certificates.ca_fingerprint(ca_pem).hex()[:16]
        self.peer = identity.peer_id(identity.public_bytes(self.agent_key))
        self.known = {
            self.peer: identity.public_bytes(self.agent_key),
            topics.COORDINATOR: identity.public_bytes(self.coordinator_key),
        }

    def verify(self, sender: str, signature: bytes, signed: bytes) -> bool:
        return identity.verify(self.known.get(sender, b""), signature, signed)

    def broker(self, port: int = 0, **options: float) -> EmbeddedBroker:
        certificate, key = self.folder / "tls.pem", self.folder / "tls.key"
        folder = self.folder / "mqtt"
        broker = EmbeddedBroker(
            folder, HOST, port, certificate, key, self.fleet, Passwords(self.secret), **options
        )
        broker.admit(self.peer, "agent")
        broker.admit("monitor", "monitor")
        return broker

    def address(self, broker: EmbeddedBroker) -> MqttAddress:
        """The coordinator's way past the gate, with all rights: that of a hostile broker too."""
        return broker.own_address()

    def login(self, broker: EmbeddedBroker, user: str = "") -> MqttAddress:
        """The address with the login of the peer, or of another user."""
        return broker.address(HOST, self.ca_pem, user or self.peer)


@asynccontextmanager
async def started(site: Site) -> AsyncIterator[EmbeddedBroker]:
    broker = site.broker()
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


def rogue(address: MqttAddress) -> aiomqtt.Client:
    """An MQTT client with a login but no signing key."""
    return aiomqtt.Client(
        address.host,
        address.port,
        username=address.user,
        password=address.password,
        tls_context=tls_context(address),
    )
