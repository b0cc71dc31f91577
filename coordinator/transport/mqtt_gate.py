"""The child process of the embedded broker: rumqttd on loopback, and a gate in front of it.

rumqttd (from iotcore) has one password for all, no ACL, and does one TLS handshake at a time
without a timeout. So the gate terminates TLS, checks each CONNECT, PUBLISH and SUBSCRIBE, and
passes the bytes on. It is no broker: it keeps no message and no subscription.

Rule 1: nothing reaches the broker before a login, and no packet that is not well-formed.
Rule 2: a client id is changed to one under its user, so no client takes over another's connection.
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
import json
import logging
import os
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

from coordinator.transport.connection_limits import (
    RateLimitedListener,
    raise_open_file_limit,
)
from coordinator.transport.gate_connection import Connection
from coordinator.transport.mqtt_access import Login

HANDSHAKE_TIMEOUT_S = 10.0
#: Connections without a login, of one address.
MAX_WAITING = 1024
#: Of one user; a further one ends its oldest.
MAX_PER_USER = 8
#: Kinds of refusals that are remembered, and so reported once.
_MAX_REPORTED = 10_000
_CHECK_EVERY_S = 30.0

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
