"""The MQTT broker in a child process: rumqttd behind `mqtt_gate`.

Rule 1: the child ends with this process, even on SIGKILL: it reads our end of its stdin pipe.
Rule 2: the child has a session of its own, so Ctrl-C reaches only us.
Rule 3: rumqttd's password is new at each start, in files with mode 0600, never in an argument list.
        Only the gate and the coordinator use it, on loopback.
Rule 4: agents and monitors have a login each (`mqtt_access`). A removed one is cut off at once.
Rule 5: the child is probed regularly, and restarted if it stays blocked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import queue
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import tomli_w

from coordinator.transport.certificate_probe import (
    first_certificate,
    is_blocked,
    served_certificate,
)
from coordinator.transport.mqtt_access import Login, OnRefused, Passwords, Role
from coordinator.transport.ports import listen_error, listenable
from protocols.errors import CommonweightError, HomeError, PortInUse, UsageError
from protocols.local.atomic_files import write_private
from protocols.messages.envelope import MAX_PAYLOAD_BYTES
from protocols.messages.mqtt import MqttAddress

OnChange = Callable[[bool, str], None]

log = logging.getLogger("commonweight.mqtt")

MAX_CONNECTIONS = 10_000
START_TIMEOUT_S = 20.0
MIN_RETRY_S, MAX_RETRY_S = 0.5, 10.0
_STABLE_S = 60.0  # a child that lived this long resets the retry delay
_POLL_S = 0.2
_STOP_TIMEOUT_S = 5.0

_LOOPBACK = "127.0.0.1"
_USER = "gate"


class EmbeddedBroker:
    """rumqttd behind the gate, which listens with TLS on `host:port` (port 0: any free port).

    Its configuration and log are in `folder`. A renewed `certificate` is used without a restart.
    `fleet` is the fleet's id in topics. `on_refused(user, why)` is
    called in the event loop for each new kind of refusal; `user` is empty for one without a login.
    """

    def __init__(
        self,
        folder: Path,
        host: str,
        port: int,
        certificate: Path,
        key: Path,
        fleet: str,
        passwords: Passwords,
        *,
        stuck_after_s: float = 30.0,
    ) -> None:
        self.host, self.port = host, port
        self._folder = folder
        self._certificate, self._key = certificate, key
        self._fleet, self._passwords = fleet, passwords
        self._logins: dict[str, Login] = {}
        self.on_refused: OnRefused = lambda user, why: None
        self._stuck_after_s = stuck_after_s
        self._inner_port, self._inner_password = 0, ""
        self._lines: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._ip = ""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._process.pid if self._process and self.running else None

    def address(self, host: str, ca_pem: str, user: str = "") -> MqttAddress:
        """The address for a client that knows this machine as `host`, with this user's login."""
        return self._passwords.address(host, self.port, ca_pem, user)

    def own_address(self) -> MqttAddress:
        """The address for this process: past the gate, on loopback, with all rights."""
        return MqttAddress(
            host=_LOOPBACK,
            port=self._inner_port,
            tls=False,
            user=_USER,
            password=self._inner_password,
        )

    def admit(self, user: str, role: Role) -> None:
        """Let a user log in from now on."""
        login = self._logins[user] = self._passwords.login(user, role)
        self._lines.put(list(login))

    def drop(self, user: str) -> None:
        """Refuse a user's login from now on, and cut its connections."""
        if self._logins.pop(user, None) is not None:
            self._lines.put([user, "", ""])

    async def start(self) -> None:
        """Start the child and wait until it accepts connections.

        Raises PortInUse, UsageError (not an address of this machine), HomeError (no certificate),
        CommonweightError (it does not start).
        """
        if self.running:
            return
        await self.stop()  # releases what is left of a child that has ended
        try:
            first_certificate(self._certificate)
            self._key.read_bytes()
        except (OSError, ValueError) as err:
            raise HomeError(f"cannot read {self._certificate} and its key: {err}") from err
        self._ip = await self._resolve()
        try:
            self.port = listenable(self._ip, self.port)
            self._inner_port = listenable(_LOOPBACK, self._inner_port)
        except OSError as err:
            raise listen_error(err, self.host, self.port, port_option="--mqtt-port") from err
        self._process = self._spawn()
        try:
            await self._wait_until_ready()
        except BaseException:  # also if cancelled: leave no child behind
            await self.stop()
            raise

    async def stop(self) -> None:
        """End the child. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        self._lines.put(None)
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, _STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait, _STOP_TIMEOUT_S)
        finally:
            if process.poll() is None:  # cancelled
                process.kill()
            with contextlib.suppress(OSError):  # a line was not read to its end
                if process.stdin is not None:
                    process.stdin.close()

    async def supervise(self, on_change: OnChange) -> None:
        """Restart the child whenever it ends, until cancelled. Cancel this before `stop`.

        `on_change(up, reason)` is called when the state or the reason changes.
        """
        reported = ""
        delay_s, reason = MIN_RETRY_S, "the MQTT broker was not started"
        while True:
            if self.running:
                on_change(True, "")
                reported = ""
                since = time.monotonic()
                reason = await self._wait_until_down()
                if time.monotonic() - since > _STABLE_S:
                    delay_s = MIN_RETRY_S
            if reported != reason:
                on_change(False, reason)
                reported = reason
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_RETRY_S)
            try:
                await self.start()
            except (CommonweightError, OSError) as err:
                reason = f"the MQTT broker does not start again: {err}"

    async def _resolve(self) -> str:
        """The IP address of `host`: rumqttd does not resolve names."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                self.host, self.port or None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as err:
            raise UsageError(f"there is no address {self.host}", "choose another: --host") from err
        first = min(found, key=lambda info: info[0] != socket.AF_INET)  # `localhost` has two
        return str(first[4][0])

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The coordinator's own link keeps its address over a restart of the child.
        self._inner_password = self._inner_password or secrets.token_urlsafe(24)
        config, gate = self._folder / "broker.toml", self._folder / "gate.json"
        write_private(config, self._toml().encode())
        write_private(gate, json.dumps(self._gate_config(config)).encode())
        # -P: a folder named `iotcore` in the current directory must not hide the package.
        with open(self._folder / "broker.log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "coordinator.transport.mqtt_gate", str(gate)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                creationflags=_NEW_GROUP,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        self._lines = queue.SimpleQueue()
        for login in self._logins.values():
            self._lines.put(list(login))
        self._lines.put([])
        told = (asyncio.get_running_loop(), process.stdout)
        pipe = (self._lines, process.stdin)
        threading.Thread(target=_write_lines, args=pipe, daemon=True).start()
        threading.Thread(target=self._read_refusals, args=told, daemon=True).start()
        return process

    def _read_refusals(self, loop: asyncio.AbstractEventLoop, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                user, why = json.loads(line)
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self.on_refused, user, why)

    def _gate_config(self, broker_config: Path) -> dict[str, str | int]:
        """A `mqtt_gate.GateConfig`."""
        return {
            "fleet": self._fleet,
            "host": self._ip,
            "port": self.port,
            "certificate": str(self._certificate.absolute()),
            "key": str(self._key.absolute()),
            "broker_config": str(broker_config.absolute()),
            "broker_port": self._inner_port,
            "broker_user": _USER,
            "broker_password": self._inner_password,
        }

    def _toml(self) -> str:
        server = {
            "name": "mqtt",
            "listen": f"{_LOOPBACK}:{self._inner_port}",
            "next_connection_delay_ms": 0,  # otherwise a fleet that reconnects has to queue
            "connections": {
                "connection_timeout_ms": 10_000,
                "max_payload_size": MAX_PAYLOAD_BYTES + 4096,
                "max_inflight_count": 100,
                "dynamic_filters": False,
                "auth": {_USER: self._inner_password},
            },
        }
        router = {
            "id": 0,
            "max_connections": MAX_CONNECTIONS,
            # Also limits the retained messages of a QoS 0 subscription: one for each peer.
            "max_outgoing_packet_count": MAX_CONNECTIONS,
            "max_segment_size": 1024 * 1024,
            "max_segment_count": 10,
        }
        return tomli_w.dumps({"id": 0, "router": router, "v4": {"1": server}})

    async def _wait_until_ready(self) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while self.running:
            certificate = await served_certificate(self._ip, self.port, 2.0)
            if certificate is not None:
                if certificate == first_certificate(self._certificate):
                    return
                raise PortInUse(
                    f"another program listens on port {self.port}",
                    "choose another: --mqtt-port PORT",
                )
            if time.monotonic() > until:
                raise CommonweightError(
                    f"the MQTT broker did not answer in {START_TIMEOUT_S:.0f} s"
                )
            await asyncio.sleep(0.05)
        log = self._folder / "broker.log"
        lines = log.read_text(errors="replace").strip().splitlines()
        raise CommonweightError(
            "the MQTT broker ended at once" + (f": {lines[-1][:200]}" if lines else ""),
            f"its log: {log}",
        )

    async def _wait_until_down(self) -> str:
        """Wait until the child has ended or does not accept connections. Returns the reason."""
        probe_s = self._stuck_after_s / 3
        probe: asyncio.Task[bool] | None = None
        next_probe = time.monotonic() + probe_s
        try:
            while self._process is not None:
                if (status := self._process.poll()) is not None:
                    return f"the MQTT broker ended (status {status})"
                if probe is None and time.monotonic() >= next_probe:
                    probe = asyncio.create_task(
                        is_blocked(self._ip, self.port, self._stuck_after_s)
                    )
                elif probe is not None and probe.done():
                    if probe.result() and self.running:
                        await self.stop()
                        return f"the MQTT broker was blocked for {self._stuck_after_s:.0f} s"
                    probe, next_probe = None, time.monotonic() + probe_s
                await asyncio.sleep(_POLL_S)
            return "the MQTT broker was stopped"
        finally:
            if probe is not None:
                probe.cancel()


if sys.platform == "win32":
    _NEW_GROUP = subprocess.CREATE_NEW_PROCESS_GROUP
else:
    _NEW_GROUP = 0


def _write_lines(lines: queue.SimpleQueue[list[str] | None], pipe: IO[bytes]) -> None:
    """Write each line until None, in a thread: a full pipe must not stop the event loop."""
    with contextlib.suppress(OSError, ValueError):  # the child has ended
        while (line := lines.get()) is not None:
            pipe.write(json.dumps(line).encode() + b"\n")
            pipe.flush()
