"""One client of the gate (`mqtt_gate`): its login, its packets, and its link to the broker."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from typing import TYPE_CHECKING, Any

from coordinator.transport import mqtt_packets as mqtt
from coordinator.transport.connection_limits import client_key
from coordinator.transport.mqtt_access import Login
from coordinator.transport.mqtt_packets import BadPacket, Packet, PacketReader

if TYPE_CHECKING:
    from coordinator.transport.mqtt_gate import Gate

CONNECT_TIMEOUT_S = 10.0
#: The broker ends a connection that is silent for 1.5 times this.
MAX_KEEPALIVE_S = 300
#: What one connection may send. Above it, the gate reads more slowly.
MAX_BURST_BYTES, MAX_BYTES_PER_S = 512 * 1024, 64 * 1024
#: Added for each packet, for the broker's work.
_PACKET_COST_BYTES = 256
_VERSION, _NOT_AUTHORIZED = 1, 5


class _Link(asyncio.Protocol):
    """One side of a connection. Its transport stops the other's reading when it is full."""

    transport: asyncio.Transport | None = None
    peer: _Link | None = None

    def __init__(self) -> None:
        self._held: set[str] = set()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def hold(self, reason: str) -> None:
        """Read nothing more until each reason is released."""
        if self.transport is not None and not self._held:
            self.transport.pause_reading()
        self._held.add(reason)

    def release(self, reason: str) -> None:
        self._held.discard(reason)
        if self.transport is not None and not self._held and not self.transport.is_closing():
            self.transport.resume_reading()

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def pause_writing(self) -> None:
        if self.peer is not None:
            self.peer.hold("full")

    def resume_writing(self) -> None:
        if self.peer is not None:
            self.peer.release("full")


class _ToBroker(_Link):
    """The connection to rumqttd of one client."""

    def __init__(self, client: Connection) -> None:
        super().__init__()
        self.peer = client

    def data_received(self, data: bytes) -> None:
        assert self.peer is not None
        self.peer.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.close()


class Connection(_Link):
    """One client, from the end of its TLS handshake."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate, self._reader = gate, PacketReader()
        self._login: Login | None = None
        self.client = ""
        self._budget, self._budget_at = float(MAX_BURST_BYTES), time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._deadline: asyncio.TimerHandle | None = None
        self._opening: asyncio.Task[None] | None = None

    # --- the client's transport ---

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        address = transport.get_extra_info("peername")
        if address is None:  # it is closed already
            transport.abort()
            return
        self.client = client_key(address[0])
        self._deadline = self._loop.call_later(CONNECT_TIMEOUT_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        passed, count = [], 0
        try:
            for packet in self._reader.feed(data):
                count += 1
                if self._login is None:
                    self._connect(packet)
                elif self._check(self._login, packet):
                    passed.append(packet.data)
        except BadPacket as err:
            self._gate.refuse(self._login, str(err))
            self.transport.abort()
            return
        self._forward(b"".join(passed))
        self._slow_down(len(data) + count * _PACKET_COST_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        for handle in (self._deadline, self._opening):
            if handle is not None:
                handle.cancel()
        if self._login is not None:
            self._gate.forget(self, self._login)
        if self.peer is not None and self.peer.transport is not None:
            self.peer.transport.close()

    def cut(self) -> None:
        """End it at once, without its will."""
        self._forward(mqtt.DISCONNECT_BYTES)
        if self._login is not None:
            self._gate.forget(self, self._login)
        if self.transport is not None:
            self.transport.abort()

    # --- packets ---

    def _connect(self, packet: Packet) -> None:
        """Log in. Packets after CONNECT wait for the broker. Raises BadPacket."""
        if packet.kind != mqtt.CONNECT:
            raise BadPacket("a packet before CONNECT")
        try:
            connect = mqtt.parse_connect(packet)
        except BadPacket:
            self.write(mqtt.encode_refusal(_VERSION))
            raise
        login = self._gate.logins.get(connect.user)
        if login is None or not login.matches(connect.password):
            self._refuse_login(login, "the login is not known or its password is wrong")
            return
        fleet, will = self._gate.config.fleet, connect.will
        if will and not login.may_publish(
            fleet, will.topic, retain=will.retain, nbytes=len(will.payload)
        ):
            self._refuse_login(login, "the login may not leave a will on that topic")
            return
        self._login = login
        assert self._deadline is not None
        self._deadline.cancel()
        self._gate.admit(self, login)
        config = self._gate.config
        own_id = hashlib.sha256(connect.client_id.encode()).hexdigest()[:20]
        mapped = connect._replace(
            client_id=f"{login.user}.{own_id if connect.client_id else secrets.token_hex(10)}",
            keepalive_s=min(connect.keepalive_s or MAX_KEEPALIVE_S, MAX_KEEPALIVE_S),
            user=config.broker_user,
            password=config.broker_password.encode(),
        )
        self.hold("opening")
        self._early = bytearray(mqtt.encode_connect(mapped))
        self._opening = self._loop.create_task(self._open())

    def _refuse_login(self, login: Login | None, why: str) -> None:
        self._gate.refuse(login, why)
        self.write(mqtt.encode_refusal(_NOT_AUTHORIZED))
        assert self.transport is not None
        self.transport.close()

    async def _open(self) -> None:
        port = self._gate.config.broker_port
        link = _ToBroker(self)
        try:
            await self._loop.create_connection(lambda: link, "127.0.0.1", port)
        except OSError:
            assert self.transport is not None
            self.transport.abort()
            return
        self.peer = link
        link.write(bytes(self._early))
        del self._early
        self.release("opening")

    def _forward(self, data: bytes) -> None:
        if not data:
            return
        if self.peer is not None:
            self.peer.write(data)
        elif self._login is not None:  # bounded: one read, because reading is on hold
            self._early += data

    def _check(self, login: Login, packet: Packet) -> bool:
        """Whether the broker gets this packet. Raises BadPacket."""
        fleet = self._gate.config.fleet
        if packet.kind == mqtt.PUBLISH:
            publish = mqtt.parse_publish(packet)
            if not login.may_publish(
                fleet, publish.topic, retain=publish.retain, nbytes=publish.nbytes
            ):
                raise BadPacket(
                    "it may publish on its own topics only, and keep its presence and head only"
                )
        elif packet.kind in (mqtt.SUBSCRIBE, mqtt.UNSUBSCRIBE):
            subscribe = mqtt.parse_subscribe(packet)
            if packet.kind == mqtt.SUBSCRIBE and not all(
                login.may_subscribe(fleet, one) for one in subscribe.filters
            ):
                self._gate.refuse(login, "it may not subscribe to other topics than its own")
                self.write(mqtt.encode_subscribe_refusal(subscribe))
                return False
        elif packet.kind == mqtt.CONNECT:
            raise BadPacket("a second CONNECT")
        else:
            mqtt.check_rest(packet)
        return True

    def _slow_down(self, cost: int) -> None:
        """Read no faster than the limit, after a burst."""
        now = time.monotonic()
        refilled = self._budget + (now - self._budget_at) * MAX_BYTES_PER_S
        self._budget, self._budget_at = min(refilled, MAX_BURST_BYTES) - cost, now
        if self._budget < 0:
            self.hold("rate")
            self._loop.call_later(-self._budget / MAX_BYTES_PER_S, self.release, "rate")
