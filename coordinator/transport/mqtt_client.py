"""MQTT for the coordinator and the monitor: what peers say comes in, orders and events go out.

Rule 1: a message counts if the peer of its topic signed it and its kind belongs on that topic.
        Whatever else is in the broker is counted and shown to `on_rejected`, never to the fleet.
Rule 2: nothing depends on the broker. The client reconnects forever. While the link is down,
        `publish` and the methods that use it return False at once.
Rule 3: memory is bounded. `_IncomingQueue` drops (and counts) the oldest waiting messages: a peer
        repeats its presence, and newer telemetry replaces older.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import cast

import aiomqtt
from msgspec.structs import replace
from paho.mqtt.enums import MQTTErrorCode

from protocols.errors import BadMessage
from protocols.messages import topics
from protocols.messages.envelope import (
    MAX_PAYLOAD_BYTES,
    Body,
    Command,
    Doorbell,
    Envelope,
    EventLine,
    JobChanged,
    Links,
    Notice,
    PeerChanged,
    Presence,
    RoundClosed,
    RunChanged,
    Sign,
    Telemetry,
    Verify,
    seal,
    unseal,
)
from protocols.messages.mqtt import (
    KEEPALIVE_S,
    TIMEOUT_S,
    MqttAddress,
    SequencedSigner,
    describe_failure,
    tls_context,
)
from protocols.messages.topics import COORDINATOR, Kind
from protocols.network.backoff import delays

_ALLOWED: dict[Kind, tuple[type[Body], ...]] = {
    "presence": (Presence,),
    "telemetry": (Telemetry,),
    "notice": (Notice,),
    "event": (PeerChanged, RunChanged, RoundClosed, JobChanged, EventLine, Links),
}
_MAX_PENDING = 4096  # publishes under way; more of them means that the broker is stuck
_MAX_PER_WAKE = 256  # messages that are read from the socket before others have their turn
_MAX_TURN_S = 0.05  # for messages that wait, before others have their turn
_STABLE_S = 10.0  # a link that held this long starts the waits from the first again

_log = logging.getLogger("commonweight.mqtt")
_log.addHandler(logging.NullHandler())


class FleetMqttClient:
    """One link to the broker, for the coordinator (with `sign`) or for a monitor (without).

    `verify(sender, signature, signed bytes)` knows the peers' keys, and the coordinator's if
    `listen_to_coordinator`. `on_envelope(kind, envelope)` gets what counts, `on_change(up, words)`
    whenever either changes, `on_rejected(topic, why)` the rest. All three run on the event loop; an
    exception in them ends `run`. Without `doorbells`, `ring` sends nothing.
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
        doorbells: bool = True,
    ) -> None:
        self.connected = False
        self.rejected = 0
        """Messages that did not count: malformed, forged or out of place."""
        self.dropped = 0
        """Messages that came faster than they could be read."""
        self._address, self._fleet = address, fleet
        self._verify, self._on_envelope = verify, on_envelope
        self._on_change, self._on_rejected = on_change, on_rejected
        self._doorbells = doorbells
        self._sign = sign
        # Orders have numbers of their own: a watcher takes a missing number for a lost event.
        self._command_sequencer = SequencedSigner(COORDINATOR, sign) if sign else None
        # Presence at QoS 0: at QoS 1 rumqttd hands out 100 retained messages and keeps the rest.
        every = functools.partial(topics.all_peers, fleet)
        self._filters = [(every("presence"), 0), (every("telemetry"), 0), (every("notice"), 1)]
        if listen_to_coordinator:
            self._filters.append((topics.event(fleet), 1))
        self._reported: tuple[bool, str] | None = None
        self._client: aiomqtt.Client | None = None
        self._pending = 0

    async def run(self) -> None:
        """Keep the link up until cancelled. Raises UsageError (a CA that is none)."""
        tls = await asyncio.to_thread(tls_context, self._address)
        rng = Random()
        waits = delays(rng)
        while True:
            began = time.monotonic()
            why = f"the link to {self._address.netloc} was lost"
            try:
                await self._session(tls)
            except* aiomqtt.MqttError as group:
                if not self.connected:
                    cause = group.exceptions[0]
                    why = describe_failure(cause.__cause__ or cause.__context__, self._address)
            self.connected = False
            self._report_link(False, why)
            if time.monotonic() - began > _STABLE_S:
                waits = delays(rng)
            await asyncio.sleep(next(waits))

    def _report_link(self, up: bool, why: str) -> None:
        if self._reported != (up, why):
            self._reported = (up, why)
            self._on_change(up, why)

    async def _session(self, tls: ssl.SSLContext | None) -> None:
        queue = _IncomingQueue(self._drop)
        client = aiomqtt.Client(
            self._address.host,
            self._address.port,
            username=self._address.user or None,
            password=self._address.password or None,
            # Whoever knows an id can throw its owner out, hence one that nobody can guess.
            identifier=f"cw{secrets.token_hex(10)}",
            clean_session=True,
            tls_context=tls,
            keepalive=KEEPALIVE_S,
            timeout=TIMEOUT_S,
            queue_type=cast("type[asyncio.Queue[aiomqtt.Message]]", lambda maxsize: queue),
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
            logger=_log,
        )
        client.pending_calls_threshold = _MAX_PENDING  # it warns beyond it, at each one more
        _read_all(client, queue)
        async with _entered(client):
            try:
                codes = await client.subscribe(self._filters)
                allowed = not any(not isinstance(code, int) and code.is_failure for code in codes)
                self.connected, self._client = True, client
                self._report_link(
                    True, "" if allowed else "the broker refuses a subscription (its ACL)"
                )
                async for message in client.messages:
                    self._on_message(message.topic.value, message.payload)
                    await self._drain(queue)
            finally:
                self._client = None

    # --- what comes in -----------------------------------------------------------------------

    async def _drain(self, queue: _IncomingQueue) -> None:
        """All that has come in meanwhile: aiomqtt's iterator costs a task and turns a message."""
        until = time.monotonic() + _MAX_TURN_S
        while not queue.empty():
            message = queue.get_nowait()
            self._on_message(message.topic.value, message.payload)
            if time.monotonic() > until:  # others have their turn
                await asyncio.sleep(0)
                until = time.monotonic() + _MAX_TURN_S

    def _on_message(self, topic: str, payload: object) -> None:
        try:
            heard = self._verified(topic, payload)
        except BadMessage as err:
            self.rejected += 1
            self._on_rejected(topic, err)
        else:
            if heard is not None:
                self._on_envelope(*heard)

    def _verified(self, topic: str, payload: object) -> tuple[Kind, Envelope] | None:
        """What counts, or None for a presence that was cleared. Raises BadMessage."""
        parsed = topics.parse(topic)
        if parsed is None or parsed.fleet != self._fleet or not isinstance(payload, bytes):
            raise BadMessage("not one of this fleet's topics")
        if parsed.kind == "presence" and not payload:
            return None
        envelope = unseal(topic, payload, self._verify)
        if envelope.sender != parsed.peer:
            raise BadMessage(f"{envelope.sender} speaks for {parsed.peer}")
        if not isinstance(envelope.body, _ALLOWED.get(parsed.kind, ())):
            raise BadMessage(f"a {type(envelope.body).__name__} on a topic for {parsed.kind}")
        return parsed.kind, envelope

    def _drop(self) -> None:
        self.dropped += 1

    # --- what goes out -----------------------------------------------------------------------

    async def publish(self, topic: str, body: Body, *, qos: int = 1) -> bool:
        """Sign and send; True once the broker has it. False if the link is down or stuck.

        Raises RuntimeError in a feed that was given no `sign`.
        """
        if self._command_sequencer is None:
            raise RuntimeError("this feed only listens: it was given no key to sign with")
        payload = self._command_sequencer.seal(topic, body)
        if len(payload) > MAX_PAYLOAD_BYTES:
            _log.error("%s of %d bytes was not sent", type(body).__name__, len(payload))
            return False
        return await self._send(topic, payload, qos)

    async def ring_doorbell(self, peer: str) -> bool:
        """Tell `peer` that work is waiting. At QoS 0: one that is away asks when it is back."""
        if not self._doorbells:
            return False
        return await self.publish(topics.command(self._fleet, peer), Doorbell(), qos=0)

    async def command(self, peer: str, command: Command) -> bool:
        """Send an operator's command. True says that the broker has it, not that `peer` obeyed."""
        return await self.publish(topics.command(self._fleet, peer), command)

    async def publish_event(self, envelope: Envelope) -> bool:
        """Tell the monitors what the coordinator has numbered and folded itself."""
        body = envelope.body
        if isinstance(body, RoundClosed) and len(body.norms) > 200:
            # Named by peer, the norms of a large round do not fit; a snapshot has them.
            envelope = replace(envelope, body=replace(body, norms={}))
        topic = topics.event(self._fleet)
        assert self._sign is not None
        payload = seal(topic, envelope, self._sign)
        if len(payload) > MAX_PAYLOAD_BYTES:  # the broker would throw us out for it
            _log.error("%s of %d bytes was not sent", type(body).__name__, len(payload))
            return False
        return await self._send(topic, payload, qos=1)

    async def clear_presence(self, peer: str) -> bool:
        """Clear the retained presence of a peer that was removed."""
        return await self._send(topics.presence(self._fleet, peer), b"", 1, retain=True)

    async def _send(self, topic: str, payload: bytes, qos: int, retain: bool = False) -> bool:
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
    """Messages that wait to be read, bounded in number and bytes; the oldest are dropped."""

    MAX_MESSAGES, MAX_BYTES = 20_000, 32 * 1024 * 1024

    def __init__(self, drop: Callable[[], None]) -> None:
        super().__init__()
        self._drop, self._bytes = drop, 0
        self.num_put = 0

    def put_nowait(self, item: aiomqtt.Message) -> None:
        self.num_put += 1
        self._bytes += _size(item)
        while self.qsize() and (self.qsize() >= self.MAX_MESSAGES or self._bytes > self.MAX_BYTES):
            self.get_nowait()
            self._drop()
        super().put_nowait(item)

    def get_nowait(self) -> aiomqtt.Message:
        item = super().get_nowait()
        self._bytes -= _size(item)
        return item


def _size(message: aiomqtt.Message) -> int:
    return len(message.payload) if isinstance(message.payload, bytes) else 0


def _read_all(client: aiomqtt.Client, queue: _IncomingQueue) -> None:
    """Let each wake of the socket read all that has come.

    paho reads one packet a wake, and in a busy event loop a wake comes seldom: presence waited
    longer than it took to make. aiomqtt has no setting for that.
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


@asynccontextmanager
async def _entered(client: aiomqtt.Client) -> AsyncIterator[None]:
    """The client, connected. A cancelled try is seen to its end first, or its socket stays open."""
    entering = asyncio.ensure_future(client.__aenter__())
    try:
        await asyncio.shield(entering)
    except asyncio.CancelledError:
        done, _ = await asyncio.wait({entering}, timeout=2)
        if not done:
            entering.cancel()
        elif entering.exception() is None:
            with suppress(aiomqtt.MqttError):
                await client.__aexit__(None, None, None)
        raise
    except UnicodeError as err:
        raise aiomqtt.MqttError("not a host name") from err
    try:
        yield
    finally:
        await client.__aexit__(None, None, None)
