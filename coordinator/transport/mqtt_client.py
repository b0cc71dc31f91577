"""MQTT for the coordinator and the monitor: receives peers' messages, sends commands and events.

Rule 1: a message counts if the peer of its topic signed it and its kind belongs on that topic. All
        others are passed to `on_rejected`.
Rule 2: nothing depends on the broker. The client reconnects forever. While the link is down, each
        method that sends returns False at once.
Rule 3: memory is bounded. `_IncomingQueue` drops the oldest waiting messages: a peer
        repeats its presence, and newer telemetry replaces older.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import ssl
import time
from collections.abc import Callable
from typing import Any, cast

import aiomqtt
from msgspec.structs import replace
from paho.mqtt.enums import MQTTErrorCode

from protocols.errors import BadMessage
from protocols.local.mqtt_connection import MqttLink, connect
from protocols.messages import envelope as wire
from protocols.messages import topics
from protocols.messages.envelope import Envelope, Sign, Verify
from protocols.messages.mqtt import MqttAddress, SequencedSigner
from protocols.messages.topics import COORDINATOR, Kind

_ALLOWED: dict[Kind, Any] = {
    "presence": wire.Presence,
    "telemetry": wire.Telemetry,
    "notice": wire.Notice,
    "event": wire.EventBody,
}
_MAX_PENDING = 4096  # unfinished publishes; at more, the broker is stuck
_MAX_PER_WAKE = 256  # messages read from the socket before other tasks run
_MAX_TURN_S = 0.05  # for waiting messages, before other tasks run

_log = logging.getLogger("commonweight.mqtt")


class FleetMqttClient(MqttLink):
    """One link to the broker, for the coordinator (with `sign`) or for a monitor (without).

    `verify(sender, signature, signed bytes)` has the keys of the peers, and the coordinator's for
    `listen_to_coordinator`. `on_envelope(kind, envelope)` gets the messages that count,
    `on_rejected(topic, error)` the others. `on_change` is that of `MqttLink`.
    All three run on the event loop. An exception in them ends `run`.
    """

    def __init__(
        self,
        address: MqttAddress,
        fleet: str,
        verify: Verify,
        on_envelope: Callable[[Kind, Envelope], None],
        on_change: Callable[[bool, str], None],
        on_rejected: Callable[[str, BadMessage], None],
        *,
        sign: Sign | None = None,
        listen_to_coordinator: bool = False,
    ) -> None:
        super().__init__(address, on_change)
        self._fleet = fleet
        self._verify, self._on_envelope = verify, on_envelope
        self._on_rejected = on_rejected
        self._sign = sign
        # Not the numbers of events: a monitor takes a missing one for a lost event.
        self._command_sequencer = SequencedSigner(COORDINATOR, sign) if sign else None
        # Presence at QoS 0: at QoS 1, rumqttd sends only 100 of the retained messages.
        every = functools.partial(topics.all_peers, fleet)
        self._filters = [(every("presence"), 0), (every("telemetry"), 0), (every("notice"), 1)]
        if listen_to_coordinator:
            self._filters.append((topics.event(fleet), 1))
        self._client: aiomqtt.Client | None = None
        self._pending = 0

    async def _session(self, tls: ssl.SSLContext | None) -> None:
        queue = _IncomingQueue()
        queue_type = cast("type[asyncio.Queue[aiomqtt.Message]]", lambda maxsize: queue)
        async with connect(self._address, tls, queue_type=queue_type) as client:
            client.pending_calls_threshold = _MAX_PENDING  # above it, aiomqtt logs each call
            _read_all(client, queue)
            try:
                codes = await client.subscribe(self._filters)
                refused = any(not isinstance(code, int) and code.is_failure for code in codes)
                self.connected, self._client = True, client
                reason = "the broker refuses a subscription (its ACL)" if refused else ""
                self._report_link(True, reason)
                async for message in client.messages:
                    self._on_message(message.topic.value, message.payload)
                    await self._drain(queue)
            finally:
                self._client = None

    # --- incoming ---

    async def _drain(self, queue: _IncomingQueue) -> None:
        """Handle all waiting messages. aiomqtt's iterator would cost a task for each."""
        until = time.monotonic() + _MAX_TURN_S
        while not queue.empty():
            message = queue.get_nowait()
            self._on_message(message.topic.value, message.payload)
            if time.monotonic() > until:  # let other tasks run
                await asyncio.sleep(0)
                until = time.monotonic() + _MAX_TURN_S

    def _on_message(self, topic: str, payload: object) -> None:
        try:
            verified = self._verified(topic, payload)
        except BadMessage as err:
            self._on_rejected(topic, err)
        else:
            if verified is not None:
                self._on_envelope(*verified)

    def _verified(self, topic: str, payload: object) -> tuple[Kind, Envelope] | None:
        """The verified message, or None for a presence that was cleared. Raises BadMessage."""
        parsed = topics.parse(topic)
        if parsed is None or parsed.fleet != self._fleet or not isinstance(payload, bytes):
            raise BadMessage("not a topic of this fleet")
        if parsed.kind == "presence" and not payload:
            return None
        envelope = wire.unseal(topic, payload, self._verify)
        if envelope.sender != parsed.peer:
            raise BadMessage(f"{envelope.sender} used a topic of {parsed.peer}")
        if not isinstance(envelope.body, _ALLOWED.get(parsed.kind, ())):
            raise BadMessage(f"a {type(envelope.body).__name__} on a topic for {parsed.kind}")
        return parsed.kind, envelope

    # --- outgoing: True once the broker has the message, False if the link is down or stuck ---

    async def ring_doorbell(self, peer: str) -> bool:
        """Tell `peer` that work is waiting. At QoS 0: an offline peer asks when it is back."""
        return await self.send_to(peer, wire.Doorbell(), qos=0)

    async def send_to(self, peer: str, body: wire.CommandBody, *, qos: int = 1) -> bool:
        """Sign a message and send it to one peer. Raises RuntimeError without `sign`."""
        if self._command_sequencer is None:
            raise RuntimeError("this client only listens: it has no key to sign with")
        topic = topics.command(self._fleet, peer)
        return await self._send(topic, self._command_sequencer.seal(topic, body), qos)

    async def publish_event(self, envelope: Envelope) -> bool:
        """Send the monitors an event that the coordinator has numbered."""
        if self._client is None:  # without a connection, do not sign
            return False
        body = envelope.body
        if isinstance(body, wire.RoundClosed) and len(body.norms) > 200:
            # The norms by peer of a large round do not fit. A snapshot contains them.
            envelope = replace(envelope, body=replace(body, norms={}))
        topic = topics.event(self._fleet)
        assert self._sign is not None
        return await self._send(topic, wire.seal(topic, envelope, self._sign))

    async def clear_presence(self, peer: str) -> bool:
        """Clear what the broker keeps of a removed peer."""
        await self._send(topics.head(self._fleet, peer), b"", retain=True)
        return await self._send(topics.presence(self._fleet, peer), b"", retain=True)

    async def _send(
        self, topic: str, payload: bytes, qos: int = 1, *, retain: bool = False
    ) -> bool:
        if len(payload) > wire.MAX_PAYLOAD_BYTES:  # the broker would disconnect us
            _log.error("a message of %d bytes to %s was not sent", len(payload), topic)
            return False
        client = self._client
        if client is None or self._pending >= _MAX_PENDING:
            return False
        self._pending += 1
        try:
            await client.publish(topic, payload, qos=qos, retain=retain)
        except aiomqtt.MqttError:
            return False
        finally:
            self._pending -= 1
        return True


class _IncomingQueue(asyncio.Queue[aiomqtt.Message]):
    """Waiting messages, bounded in number and bytes. The oldest are dropped."""

    MAX_MESSAGES, MAX_BYTES = 20_000, 32 * 1024 * 1024

    def __init__(self) -> None:
        super().__init__()
        self._bytes = self.num_put = 0

    def put_nowait(self, item: aiomqtt.Message) -> None:
        self.num_put += 1
        self._bytes += _size(item)
        while self.qsize() and (self.qsize() >= self.MAX_MESSAGES or self._bytes > self.MAX_BYTES):
            self.get_nowait()
        super().put_nowait(item)

    def get_nowait(self) -> aiomqtt.Message:
        item = super().get_nowait()
        self._bytes -= _size(item)
        return item


def _size(message: aiomqtt.Message) -> int:
    return len(message.payload) if isinstance(message.payload, bytes) else 0


def _read_all(client: aiomqtt.Client, queue: _IncomingQueue) -> None:
    """Read all packets whenever the socket is readable.

    paho reads one packet each time. In a busy event loop, messages then arrive faster than they are
    read. aiomqtt has no setting for it.
    """
    paho = client._client
    read_one = paho.loop_read

    def read(max_packets: int = 1) -> MQTTErrorCode:
        for _ in range(_MAX_PER_WAKE):
            before = queue.num_put
            code = read_one(max_packets)
            if queue.num_put == before:
                break
        return code

    paho.loop_read = read  # type: ignore[method-assign]
