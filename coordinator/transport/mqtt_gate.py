"""The child process of the embedded broker: rumqttd on loopback, and a gate in front of it.

rumqttd (from iotcore) has one password for all, no ACL, and does one TLS handshake at a time
without a timeout. So the gate terminates TLS, checks each CONNECT, PUBLISH and SUBSCRIBE, and
passes the bytes on. It is no broker: it keeps no message and no subscription.

Rule 1: nothing reaches the broker before a login, and no packet that is not well-formed.
Rule 2: a client id is changed to one under its user, so nobody takes over another's connection.
Rule 3: time, bytes and connections are bounded: the handshake and CONNECT together, the rate of
        each connection, connections of each user and of each address.
Rule 4: the process ends when its stdin does, so also when the coordinator is killed.

stdin has one JSON array a line: [user, role, SHA-256 of the password]; without a role, the login
ends and its connections are cut. An empty array ends the first list of logins: the gate opens.
stdout has [user, why] for each new kind of refusal.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
import socket
import ssl
import sys
import threading
import time
from asyncio import sslproto
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from coordinator.transport import mqtt_packets as mqtt
from coordinator.transport.connection_limits import (
    RateLimitedListener,
    client_key,
    raise_open_file_limit,
)
from coordinator.transport.mqtt_access import Login
from coordinator.transport.mqtt_packets import BadPacket, Packet, PacketReader

HANDSHAKE_TIMEOUT_S, CONNECT_TIMEOUT_S = 10.0, 10.0
#: The broker ends a connection that is silent for 1.5 times this.
MAX_KEEPALIVE_S = 300
#: Connections without a login, of one address.
MAX_WAITING = 1024
#: Of one user; a further one ends its oldest.
MAX_PER_USER = 8
#: What one connection may send. Above it, the gate reads more slowly.
MAX_BURST_BYTES, MAX_BYTES_PER_S = 512 * 1024, 64 * 1024
#: Added for each packet, for the broker's work.
_PACKET_COST_BYTES = 256
#: Kinds of refusals that are remembered, and so reported once.
_MAX_REPORTED = 10_000
_CHECK_EVERY_S = 30.0
_VERSION, _NOT_AUTHORIZED = 1, 5

# Each TLS connection allocates a read buffer of this size; asyncio's own is 256 KB.
sslproto.SSLProtocol.max_size = 16 * 1024


class GateConfig(NamedTuple):
    """Where the gate listens, and the broker behind it with its only login."""

    fleet: str
    host: str
    port: int
    certificate: str
    key: str
    broker_config: str
    broker_port: int
    broker_user: str
    broker_password: str


class Gate:
    """The logins and the open connections. `report(user, why)` gets refusals, each kind once."""

    def __init__(self, config: GateConfig, report: Callable[[str, str], None]) -> None:
        self.config, self._report = config, report
        self.logins: dict[str, Login] = {}
        self.connections: defaultdict[str, dict[Connection, None]] = defaultdict(dict)
        self._reported: set[tuple[str, str]] = set()
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self.listener = RateLimitedListener(family)
        self.listener.max_unsettled = MAX_WAITING
        self._files = (Path(config.certificate), Path(config.key))
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._loaded: list[int] = []
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2

    async def serve(self) -> None:
        """Listen until cancelled."""
        if os.name != "nt":
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((self.config.host, self.config.port))
        self.listener.setblocking(False)
        self._tls.load_cert_chain(*self._files)
        self._loaded = [path.stat().st_mtime_ns for path in self._files]
        max_files = raise_open_file_limit()
        if max_files is not None:  # one from the client, and two to the broker
            self.listener.max_connections = min(self.listener.max_connections, max_files // 4)
        await asyncio.get_running_loop().create_server(
            self._new_connection,
            sock=self.listener,
            ssl=self._tls,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            ssl_shutdown_timeout=2.0,
            backlog=2048,
        )
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            self.listener.drop_full_buckets(time.monotonic())

    def _new_connection(self) -> Connection:
        """Called before the handshake, so that this one has a renewed certificate already."""
        with contextlib.suppress(OSError):  # between two files: the next time
            written = [path.stat().st_mtime_ns for path in self._files]
            if written != self._loaded:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*self._files)
                self._tls.load_cert_chain(*self._files)
                self._loaded = written
        return Connection(self)

    def set_login(self, user: str, role: Any, password_sha256: str) -> None:
        """Admit a user; without a role, end its login and cut its connections."""
        if role:
            self.logins[user] = Login(user, role, password_sha256)
        elif self.logins.pop(user, None) is not None:
            for connection in list(self.connections[user]):
                connection.cut()

    def admit(self, connection: Connection, login: Login) -> None:
        own = self.connections[login.user]
        while len(own) >= MAX_PER_USER:
            next(iter(own)).cut()
        own[connection] = None
        self.listener.settled[connection.client] += 1

    def forget(self, connection: Connection, login: Login) -> None:
        """`connection` is closed. May be called twice."""
        own = self.connections[login.user]
        if connection not in own:
            return
        del own[connection]
        if not own:
            del self.connections[login.user]
        _decrement(self.listener.settled, connection.client)

    def refuse(self, login: Login | None, why: str) -> None:
        """Report a refusal of a user, or of somebody without a login, unless it was."""
        key = (login.user if login else "", why)
        if key not in self._reported and len(self._reported) < _MAX_REPORTED:
            self._reported.add(key)
            self._report(*key)


def _decrement(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


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
        self._forward(mqtt.encode_disconnect())
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


def _read_logins(loop: asyncio.AbstractEventLoop, gate: Gate, complete: asyncio.Event) -> None:
    """Pass the lines of stdin to the gate, and end the process with stdin."""
    try:
        for line in sys.stdin.buffer:
            if login := json.loads(line):
                loop.call_soon_threadsafe(gate.set_login, *login)
            else:
                loop.call_soon_threadsafe(complete.set)
    finally:
        os._exit(0)


def _report(user: str, why: str) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps([user, why]) + "\n")
        sys.stdout.flush()


async def _main(config: GateConfig) -> None:
    from iotcore import IotCoreBroker

    IotCoreBroker(config_path=config.broker_config).start()
    gate, complete = Gate(config, _report), asyncio.Event()
    loop = asyncio.get_running_loop()
    threading.Thread(target=_read_logins, args=(loop, gate, complete), daemon=True).start()
    await complete.wait()
    await _wait_for_broker(config.broker_port)
    await gate.serve()


async def _wait_for_broker(port: int) -> None:
    """Wait until rumqttd listens. The parent ends us if that takes too long."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
        else:
            writer.close()
            return


if __name__ == "__main__":
    # rumqttd logs each packet as an error. A panic is still written to stderr.
    logging.disable(logging.CRITICAL)
    asyncio.run(_main(GateConfig(**json.loads(Path(sys.argv[1]).read_bytes()))))
