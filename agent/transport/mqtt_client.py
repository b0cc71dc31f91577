"""The agent's MQTT link: says how the agent is, hears doorbells and commands.

Rule 1: the link is never needed. It reconnects for ever and never raises for trouble of the link.
Rule 2: whatever comes in is forged until the coordinator's signature says otherwise.
Rule 3: nothing piles up while the link is down: the last presence and a few notices are kept.

The only file of the agent that imports aiomqtt.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from random import Random

import aiomqtt
from msgspec.structs import replace

from protocols.enrollment.identity import verify
from protocols.errors import BadMessage
from protocols.messages import topics
from protocols.messages.envelope import (
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
    KEEPALIVE_S,
    TIMEOUT_S,
    MqttAddress,
    ReplayFilter,
    SequencedSigner,
    describe_failure,
    tls_context,
)
from protocols.messages.states import PeerState
from protocols.network.backoff import delays

TELEMETRY_EVERY_S = 0.25
#: What an agent at work does next is said no faster than that; a pause or a fault is, at once.
PRESENCE_EVERY_S = 0.25
_AT_WORK = frozenset({PeerState.IDLE, PeerState.TRAINING, PeerState.SENDING})
#: Presence is said again at least this often; watchers call a peer stale after three times that.
PRESENCE_REFRESH_S = 30.0
MAX_NOTICES = 32
_STABLE_S = 10.0  # a link that held this long starts the waits from the first again

_log = logging.getLogger("commonweight.mqtt")
_log.addHandler(logging.NullHandler())


class MqttClient:
    """One agent's link to the broker. Its methods are cheap and for the event loop's thread.

    `sign` makes the node's Ed25519 signature (64 bytes); `coordinator_public` is the coordinator's
    Ed25519 key (raw, 32 bytes). `on_command` gets verified messages only, each once; `on_change`
    gets (up, words for a person) whenever either changes. Both run on the event loop: an exception
    in them ends `run`.
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
    ) -> None:
        self.connected = False
        self.rejected = 0
        """Messages that were not obeyed: malformed, forged, replayed or out of time."""
        self.rejected_why = ""
        """Why the last of them was not, in words."""
        self._address, self._peer, self._sign = address, peer, sign
        self._presence_topic = topics.presence(fleet, peer)
        self._telemetry_topic = topics.telemetry(fleet, peer)
        self._notice_topic = topics.notice(fleet, peer)
        self._command_topic = topics.command(fleet, peer)
        self._coordinator_public = coordinator_public
        self._on_command, self._on_change = on_command, on_change
        self._reported: tuple[bool, str] | None = None
        self._replay_filter = ReplayFilter()
        self._began_at = time.time()
        self._rng = Random()
        self._wake, self._reconnect = asyncio.Event(), asyncio.Event()
        self._presence: Presence | None = None
        self._telemetry: Telemetry | None = None
        self._notices: deque[Notice] = deque(maxlen=MAX_NOTICES)

    def set_presence(self, presence: Presence) -> None:
        """Say this now, at every reconnect, and as a sign of life until the next one."""
        self._presence = replace(presence, reason=strip_controls(presence.reason))
        self._wake.set()

    def telemetry(self, telemetry: Telemetry) -> None:
        """Say this at most four times a second: the last one wins. Dropped while down."""
        if self.connected:
            self._telemetry = telemetry
            self._wake.set()

    def notice(self, notice: Notice) -> None:
        """Say this once. While the link is down the last few are kept."""
        self._notices.append(replace(notice, text=strip_controls(notice.text)))
        self._wake.set()

    def move(self, address: MqttAddress) -> None:
        """Use this broker or login from the next connection on."""
        self._address = address

    def reconnect(self) -> None:
        """Drop the link and connect anew at once: after a sleep of the machine it is dead."""
        self._reconnect.set()

    async def run(self) -> None:
        """Keep the link up until cancelled; then say "stopped" and leave. Raises UsageError."""
        address: MqttAddress | None = None
        waits = delays(self._rng)
        while True:
            if address is not self._address:
                address = self._address
                tls = await asyncio.to_thread(tls_context, address)
            began = time.monotonic()
            self._reconnect.clear()
            why = f"the link to {address.netloc} was lost"
            try:
                await self._session(tls)
            except* aiomqtt.MqttError as group:
                if not self.connected:
                    cause = group.exceptions[0]
                    why = describe_failure(cause.__cause__ or cause.__context__, self._address)
            self.connected, self._telemetry = False, None
            self._report_status(False, why)
            if time.monotonic() - began > _STABLE_S:
                waits = delays(self._rng)
            with suppress(TimeoutError):
                async with asyncio.timeout(next(waits)):
                    await self._reconnect.wait()

    def _report_status(self, up: bool, why: str) -> None:
        if self._reported != (up, why):
            self._reported = (up, why)
            self._on_change(up, why)

    async def _session(self, tls: ssl.SSLContext | None) -> None:
        voice = SequencedSigner(self._peer, self._sign)
        will = self._offline("connection lost", will=True)
        client = aiomqtt.Client(
            self._address.host,
            self._address.port,
            username=self._address.user or None,
            password=self._address.password or None,
            # Whoever knows an id can throw its owner out, hence one that nobody can guess.
            identifier=f"cw{secrets.token_hex(10)}",
            will=aiomqtt.Will(
                self._presence_topic, voice.seal(self._presence_topic, will), qos=1, retain=True
            ),
            clean_session=True,
            tls_context=tls,
            keepalive=KEEPALIVE_S,
            timeout=TIMEOUT_S,
            # Under a flood the newest are dropped; the agent asks the coordinator by itself too.
            max_queued_incoming_messages=64,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
            logger=_log,
        )
        async with _connected(client):
            try:
                codes = await client.subscribe(self._command_topic, qos=1)
                self.connected = True
                allowed = not any(not isinstance(code, int) and code.is_failure for code in codes)
                self._report_status(
                    True, "" if allowed else "the broker lets no commands through (its ACL)"
                )
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._receive(client), name="mqtt hear")
                    group.create_task(self._publish(client, voice), name="mqtt say")
                    group.create_task(self._end_on_reconnect(), name="mqtt again")
            except asyncio.CancelledError:
                await self._publish_offline(client, voice)
                raise

    async def _end_on_reconnect(self) -> None:
        await self._reconnect.wait()
        raise aiomqtt.MqttError("asked to connect anew")

    # --- what we say -------------------------------------------------------------------------

    async def _publish(self, client: aiomqtt.Client, voice: SequencedSigner) -> None:
        said: Presence | None = None
        say_again, telemetry_from, presence_from = math.inf, 0.0, 0.0
        while True:
            self._wake.clear()
            presence = self._presence
            if said is not None and presence is not None and presence != said:
                steady = {presence.state, said.state} <= _AT_WORK
                say_again = presence_from if steady else 0.0
            if presence is not None and (said is None or time.monotonic() >= say_again):
                payload = voice.seal(self._presence_topic, presence)
                await client.publish(self._presence_topic, payload, qos=1, retain=True)
                said = presence
                presence_from = time.monotonic() + PRESENCE_EVERY_S
                say_again = time.monotonic() + PRESENCE_REFRESH_S * self._rng.uniform(0.8, 1.0)
            while self._notices:
                notice = self._notices.popleft()
                payload = voice.seal(self._notice_topic, notice)
                await client.publish(self._notice_topic, payload, qos=1)
            if self._telemetry is not None and time.monotonic() >= telemetry_from:
                telemetry, self._telemetry = self._telemetry, None
                payload = voice.seal(self._telemetry_topic, telemetry)
                await client.publish(self._telemetry_topic, payload)
                telemetry_from = time.monotonic() + TELEMETRY_EVERY_S
            due = say_again if self._telemetry is None else min(say_again, telemetry_from)
            await self._wait_until(due)

    async def _wait_until(self, due: float) -> None:
        """Wait until `due` (monotonic s). What is not telemetry is not kept waiting by it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(None if due == math.inf else max(0, due - time.monotonic())):
                await self._wake.wait()

    async def _publish_offline(self, client: aiomqtt.Client, voice: SequencedSigner) -> None:
        payload = voice.seal(self._presence_topic, self._offline("stopped"))
        with suppress(aiomqtt.MqttError):
            await client.publish(self._presence_topic, payload, qos=1, retain=True, timeout=2)

    def _offline(self, reason: str, will: bool = False) -> Presence:
        last = self._presence or Presence(state=PeerState.OFFLINE)
        return replace(last, state=PeerState.OFFLINE, reason=reason, run="", round=0, will=will)

    # --- what we hear ------------------------------------------------------------------------

    async def _receive(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            try:
                heard = self._verify_message(message.topic.value, message.payload)
            except BadMessage as err:
                self.rejected += 1
                self.rejected_why = err.message
            else:
                self._on_command(heard)

    def _verify_message(self, topic: str, payload: object) -> Doorbell | Command | LogRequest:
        """The message in `payload`, if the coordinator sent it to us just now. Raises BadMessage.

        A doorbell carries nothing to trust, so a wrong clock does not keep it out; whoever rings
        it again only makes the agent ask the coordinator once more.
        """
        if topic != self._command_topic or not isinstance(payload, bytes):
            raise BadMessage("not on our command topic")
        envelope = unseal(topic, payload, self._by_coordinator)
        body = envelope.body
        if not isinstance(body, Doorbell | Command | LogRequest):
            raise BadMessage(f"a {type(body).__name__} is no command")
        late_s = time.time() - envelope.at
        if not isinstance(body, Doorbell) and not abs(late_s) <= COMMAND_WINDOW_S:
            raise BadMessage(f"a command from {late_s:+.0f} s ago: replayed, or a clock is wrong")
        if not isinstance(body, Doorbell) and envelope.at < self._began_at:
            # What this agent heard in its last life it does not remember: none of that counts.
            raise BadMessage("a command from before this agent's start")
        if not self._replay_filter.is_new(envelope.epoch, type(body).__name__, envelope.seq):
            raise BadMessage("a message that was heard before")
        return body

    def _by_coordinator(self, sender: str, signature: bytes, signed: bytes) -> bool:
        return sender == topics.COORDINATOR and verify(self._coordinator_public, signature, signed)


async def try_login(address: MqttAddress) -> str:
    """Log in and out again: words for what is wrong, or "". Raises UsageError (a CA that is none).

    A session of its own that says nothing: a running agent's link is not disturbed.
    """
    client = aiomqtt.Client(
        address.host,
        address.port,
        username=address.user or None,
        password=address.password or None,
        identifier=f"cw{secrets.token_hex(10)}",
        clean_session=True,
        tls_context=await asyncio.to_thread(tls_context, address),
        timeout=TIMEOUT_S,
        logger=_log,
    )
    try:
        async with _connected(client):
            return ""
    except aiomqtt.MqttError as err:
        return describe_failure(err.__cause__ or err.__context__, address)


@asynccontextmanager
async def _connected(client: aiomqtt.Client) -> AsyncIterator[None]:
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
