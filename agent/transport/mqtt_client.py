"""The agent's MQTT client: publishes presence and telemetry, receives wake-ups and commands.

Rule 1: the agent never needs it. It reconnects forever and raises no connection errors.
Rule 2: an incoming message counts only with the coordinator's valid signature.
Rule 3: while it is disconnected, only the last presence and a few notices are kept.

The only file of the agent that imports aiomqtt.
"""

from __future__ import annotations

import asyncio
import functools
import math
import ssl
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import aiomqtt
from msgspec.structs import replace

from agent.transport.mqtt_heads import HeadExchange
from protocols.enrollment.identity import verify
from protocols.errors import BadMessage
from protocols.local.mqtt_connection import MqttLink, connect
from protocols.local.timed_wait import wait_at_most
from protocols.messages import topics
from protocols.messages.envelope import (
    Body,
    Command,
    Doorbell,
    LogRequest,
    Notice,
    Presence,
    Sign,
    Telemetry,
    strip_controls,
    unseal,
)
from protocols.messages.mqtt import (
    COMMAND_WINDOW_S,
    MqttAddress,
    ReplayFilter,
    SequencedSigner,
    describe_failure,
    tls_context,
)
from protocols.messages.states import PeerState

TELEMETRY_EVERY_S = 0.25
#: Rate limit for state changes during work. A pause or a fault is published at once.
PRESENCE_EVERY_S = 0.25
_AT_WORK = frozenset({PeerState.IDLE, PeerState.TRAINING, PeerState.SENDING})
#: Presence is published at least this often. A peer counts as stale after three times this.
PRESENCE_REFRESH_S = 30.0
MAX_NOTICES = 32


class MqttClient(MqttLink):
    """One agent's connection to the broker. Its methods are cheap; call them on the event loop.

    `sign` makes the node's Ed25519 signature (64 bytes); `coordinator_public` is the coordinator's
    Ed25519 key (raw, 32 bytes). `on_command` gets verified messages only, each once. `on_change`
    gets (connected, reason) whenever either changes. Both run on the event loop; an exception in
    them ends `run`. A cancelled `run` publishes "stopped". `heads` exchanges what agents have seen
    of the log of versions.
    """

    def __init__(
        self,
        address: MqttAddress,
        fleet: str,
        peer: str,
        sign: Sign,
        coordinator_public: bytes,
        on_command: Callable[[Doorbell | Command | LogRequest], None],
        on_change: Callable[[bool, str], None],
        heads: HeadExchange | None = None,
    ) -> None:
        super().__init__(address, on_change)
        self.rejected = 0
        """Number of rejected messages: malformed, forged, replayed or expired."""
        self.rejected_why = ""
        """The reason of the last rejection."""
        self._peer, self._sign = peer, sign
        self._heads = heads
        self._presence_topic = topics.presence(fleet, peer)
        self._telemetry_topic = topics.telemetry(fleet, peer)
        self._notice_topic = topics.notice(fleet, peer)
        self._command_topic = topics.command(fleet, peer)
        self._coordinator_public = coordinator_public
        self._on_command = on_command
        self._replay_filter = ReplayFilter()
        self._began_at = time.time()
        self._wake = asyncio.Event()
        self._presence: Presence | None = None
        #: The presence that this connection published last, when the next one of work is due, and
        #: until when `_publish` sleeps; monotonic s.
        self._published: Presence | None = None
        self._presence_from, self._wakes_at = 0.0, math.inf
        self._telemetry: Telemetry | None = None
        self._notices: deque[Notice] = deque(maxlen=MAX_NOTICES)

    def set_presence(self, presence: Presence) -> None:
        """Publishes this now, at every reconnect, and periodically until the next one."""
        self._presence = replace(presence, reason=strip_controls(presence.reason))
        if self._due(self._presence) < self._wakes_at:
            self._wake.set()

    def telemetry(self, telemetry: Telemetry) -> None:
        """Publishes the latest, at most four times a second. Dropped while disconnected."""
        if self.connected:
            self._telemetry = telemetry
            self._wake.set()

    def notice(self, notice: Notice) -> None:
        """Publishes this once. While disconnected, the latest few are kept."""
        self._notices.append(replace(notice, text=strip_controls(notice.text)))
        self._wake.set()

    def move(self, address: MqttAddress) -> None:
        """Uses this broker and login from the next connection on."""
        self._address = address

    def reconnect(self) -> None:
        """Reconnects at once, for example after the machine was suspended."""
        self._reconnect.set()

    async def _session(self, tls: ssl.SSLContext | None) -> None:
        self._telemetry = None
        signer = SequencedSigner(self._peer, self._sign)
        will = signer.seal(self._presence_topic, self._offline("connection lost", will=True))
        async with connect(
            self._address,
            tls,
            will=aiomqtt.Will(self._presence_topic, will, qos=1, retain=True),
            # A flood drops the newest messages; the agent polls the coordinator anyway.
            max_queued_incoming_messages=64,
        ) as client:
            try:
                allowed = await _subscribe(client, [self._command_topic], qos=1)
                self.connected = True
                self._report_link(True, "" if allowed else "the broker's ACL blocks commands")
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._receive(client), name="mqtt receive")
                    group.create_task(self._publish(client, signer), name="mqtt publish")
                    group.create_task(self._end_on_reconnect(), name="mqtt reconnect")
                    if self._heads is not None:
                        exchange = self._heads.run(
                            functools.partial(_subscribe, client, qos=0),
                            functools.partial(client.publish, qos=0, retain=True),
                        )
                        group.create_task(exchange, name="mqtt heads")
            except asyncio.CancelledError:
                payload = signer.seal(self._presence_topic, self._offline("stopped"))
                with suppress(aiomqtt.MqttError):
                    await client.publish(
                        self._presence_topic, payload, qos=1, retain=True, timeout=2
                    )
                raise

    async def _end_on_reconnect(self) -> None:
        await self._reconnect.wait()
        raise aiomqtt.MqttError("reconnect requested")

    # --- publish -----------------------------------------------------------------------------

    def _due(self, presence: Presence) -> float:
        """When to publish this presence, monotonic s; infinite if it is published."""
        last = self._published
        if presence == last:
            return math.inf
        at_work = last is not None and {presence.state, last.state} <= _AT_WORK
        return self._presence_from if at_work else 0.0

    async def _publish(self, client: aiomqtt.Client, signer: SequencedSigner) -> None:
        async def send(topic: str, body: Body, qos: int, retain: bool = False) -> None:
            await client.publish(topic, signer.seal(topic, body), qos=qos, retain=retain)

        self._published = None
        presence_due, telemetry_from = math.inf, 0.0
        while True:
            self._wake.clear()
            self._wakes_at = math.inf  # what comes in between is not seen here
            presence = self._presence
            if presence is not None:
                presence_due = min(presence_due, self._due(presence))
            if presence is not None and time.monotonic() >= presence_due:
                await send(self._presence_topic, presence, qos=1, retain=True)
                self._published = presence
                self._presence_from = time.monotonic() + PRESENCE_EVERY_S
                presence_due = time.monotonic() + PRESENCE_REFRESH_S * self._rng.uniform(0.8, 1.0)
            while self._notices:
                await send(self._notice_topic, self._notices.popleft(), qos=1)
            if self._telemetry is not None and time.monotonic() >= telemetry_from:
                telemetry, self._telemetry = self._telemetry, None
                await send(self._telemetry_topic, telemetry, qos=0)
                telemetry_from = time.monotonic() + TELEMETRY_EVERY_S
            due = presence_due if self._telemetry is None else min(presence_due, telemetry_from)
            wait_s = None if due == math.inf else max(0, due - time.monotonic())
            self._wakes_at = due
            await wait_at_most(self._wake, wait_s)

    def _offline(self, reason: str, will: bool = False) -> Presence:
        last = self._presence or Presence(state=PeerState.OFFLINE)
        return replace(last, state=PeerState.OFFLINE, reason=reason, run="", round=0, will=will)

    # --- receive -----------------------------------------------------------------------------

    async def _receive(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            topic = message.topic.value
            try:
                if topic != self._command_topic and self._heads is not None:
                    self._heads.receive(topic, message.payload)
                    continue
                body = self._verify_message(topic, message.payload)
            except BadMessage as err:
                self.rejected += 1
                self.rejected_why = err.message
            else:
                self._on_command(body)

    def _verify_message(self, topic: str, payload: object) -> Doorbell | Command | LogRequest:
        """Verifies that the coordinator has just sent this message. Raises BadMessage.

        A wake-up is exempt from the check of time: replaying it only causes one more poll.
        """
        if topic != self._command_topic or not isinstance(payload, bytes):
            raise BadMessage("not on this peer's command topic")
        envelope = unseal(topic, payload, self._by_coordinator)
        body = envelope.body
        if not isinstance(body, Doorbell | Command | LogRequest):
            raise BadMessage(f"a {type(body).__name__} is not a command")
        late_s = time.time() - envelope.at
        if not isinstance(body, Doorbell) and not abs(late_s) <= COMMAND_WINDOW_S:
            raise BadMessage(f"a command from {late_s:+.0f} s ago: replayed, or a clock is wrong")
        if not isinstance(body, Doorbell) and envelope.at < self._began_at:
            # The replay filter does not survive a restart, so older commands are refused.
            raise BadMessage("a command from before this agent's start")
        if not self._replay_filter.is_new(envelope.epoch, type(body).__name__, envelope.seq):
            raise BadMessage("a repeated message")
        return body

    def _by_coordinator(self, sender: str, signature: bytes, signed: bytes) -> bool:
        return sender == topics.COORDINATOR and verify(self._coordinator_public, signature, signed)


async def _subscribe(client: aiomqtt.Client, filters: list[str], *, qos: int) -> bool:
    """Subscribe to these filters. False if the broker refuses one."""
    codes = await client.subscribe([(one, qos) for one in filters])
    return not any(not isinstance(code, int) and code.is_failure for code in codes)


async def try_login(address: MqttAddress) -> str:
    """Logs in and out again; returns what is wrong, or "". Raises UsageError for an invalid CA.

    Uses a session of its own, so a running agent stays connected.
    """
    tls = await asyncio.to_thread(tls_context, address)
    try:
        async with connect(address, tls):
            return ""
    except aiomqtt.MqttError as err:
        return describe_failure(err.__cause__ or err.__context__, address)
