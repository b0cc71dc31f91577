"""The MQTT broker: our own in a child process (rumqttd, from iotcore), or somebody else's by URL.

Rule 1: the child ends with us, even on SIGKILL: it holds our end of its stdin pipe.
Rule 2: Ctrl-C is ours to handle: the child has a session of its own.
Rule 3: the password is in one file, 0600, never in an argument list.
Rule 4: rumqttd does one TLS handshake at a time and has no time-out for it. A client that stalls in
        its handshake (a lid that was closed) shuts the door for everybody, so we try it regularly
        and start the child anew when the door stays shut.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tomli_w

from coordinator.transport.ports import listenable
from protocols.errors import CommonweightError, HomeError, PortInUse, UsageError
from protocols.local.atomic_files import write_private
from protocols.messages.envelope import MAX_PAYLOAD_BYTES
from protocols.messages.mqtt import MqttAddress, parse_url

OnChange = Callable[[bool, str], None]

MAX_CONNECTIONS = 10_000
START_TIMEOUT_S = 20.0
MIN_RETRY_S, MAX_RETRY_S = 0.5, 10.0
_STABLE_S = 60.0  # a child that lived this long starts the waits from the first again
_POLL_S = 0.2
_CHOOSE = "choose another port: --mqtt-port PORT"

# -P: a folder named `iotcore` where the operator stands must not be taken for the package. rumqttd
# reports each packet as an error, so its log is shut; a panic still comes out on stderr.
_CHILD = """
import logging, os, sys, threading
from iotcore import IotCoreBroker

def end_with_parent():
    sys.stdin.buffer.read()
    os._exit(0)

logging.disable(logging.CRITICAL)
threading.Thread(target=end_with_parent, daemon=True).start()
IotCoreBroker(config_path=sys.argv[1]).run_forever()
"""


class EmbeddedBroker:
    """rumqttd with TLS and one login, listening on `host:port` (port 0: any free one).

    `folder` gets its configuration and its log. A renewed `certificate` is used without a restart.
    """

    def __init__(
        self,
        folder: Path,
        host: str,
        port: int,
        certificate: Path,
        key: Path,
        user: str,
        password: str,
        *,
        stuck_after_s: float = 30.0,
    ) -> None:
        self.host, self.port = host, port
        self._folder = folder
        self._certificate, self._key = certificate, key
        self._user, self._password = user, password
        self._stuck_after_s = stuck_after_s
        self._process: subprocess.Popen[bytes] | None = None
        self._ip = ""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._process.pid if self._process and self.running else None

    def address(self, host: str, ca_pem: str) -> MqttAddress:
        """What a client needs that knows this machine as `host`."""
        return MqttAddress(
            host=host, port=self.port, user=self._user, password=self._password, ca_pem=ca_pem
        )

    async def start(self) -> None:
        """Start the child and wait until it answers.

        Raises PortInUse, UsageError (no such address here), HomeError (no certificate),
        CommonweightError (it does not start).
        """
        if self.running:
            return
        try:
            _first_certificate(self._certificate)
            self._key.read_bytes()
        except (OSError, ValueError) as err:
            raise HomeError(f"cannot read {self._certificate} and its key: {err}") from err
        self._ip = await self._resolve()
        self.port = _free_port(self._ip, self.host, self.port)
        self._process = self._spawn()
        try:
            await self._wait_until_ready()
        except BaseException:  # cancelled or failed: no child may be left behind
            await self.stop()
            raise

    async def stop(self) -> None:
        """End the child. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            if not await _wait_for_exit(process, 5.0):
                process.kill()
                await _wait_for_exit(process, 5.0)
        finally:
            if process.poll() is None:
                process.kill()
            if process.stdin is not None:
                process.stdin.close()

    async def supervise(self, on_change: OnChange) -> None:
        """Keep the child up until cancelled; `on_change(up, why)` says when that changes.

        Cancel this before `stop`, or the child is started again.
        """
        told = ""
        wait_s, why = MIN_RETRY_S, "the MQTT broker was not started"
        while True:
            if self.running:
                on_change(True, "")
                told = ""
                since = time.monotonic()
                why = await self._wait_until_down()
                if time.monotonic() - since > _STABLE_S:
                    wait_s = MIN_RETRY_S
            if told != why:
                on_change(False, why)
                told = why
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_RETRY_S)
            try:
                await self.start()
            except (CommonweightError, OSError) as err:
                why = f"the MQTT broker does not start again: {err}"

    async def _resolve(self) -> str:
        """rumqttd listens on addresses, not on names."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                self.host, self.port or None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as err:
            raise UsageError(f"there is no address {self.host}", "choose another: --host") from err
        first = min(found, key=lambda one: one[0] != socket.AF_INET)  # `localhost` has two
        return str(first[4][0])

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        config = self._folder / "broker.toml"
        write_private(config, self._toml().encode())
        with open(self._folder / "broker.log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD, str(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
                creationflags=_NEW_GROUP,
            )

    def _toml(self) -> str:
        listen = f"[{self._ip}]:{self.port}" if ":" in self._ip else f"{self._ip}:{self.port}"
        server = {
            "name": "mqtt",
            "listen": listen,
            "next_connection_delay_ms": 0,  # otherwise a fleet that comes back queues at the door
            "tls": {
                "certpath": str(self._certificate.absolute()),
                "keypath": str(self._key.absolute()),
            },
            "connections": {
                "connection_timeout_ms": 10_000,
                "max_payload_size": MAX_PAYLOAD_BYTES + 4096,
                "max_inflight_count": 100,
                "dynamic_filters": False,
                "auth": {self._user: self._password},
            },
        }
        router = {
            "id": 0,
            "max_connections": MAX_CONNECTIONS,
            # Also the most retained messages that a QoS 0 subscription gets: one for each peer.
            "max_outgoing_packet_count": MAX_CONNECTIONS,
            "max_segment_size": 1024 * 1024,
            "max_segment_count": 10,
        }
        return tomli_w.dumps({"id": 0, "router": router, "v4": {"1": server}})

    async def _wait_until_ready(self) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while self.running:
            certificate = await self._served_certificate(timeout_s=2.0)
            if certificate is not None:
                if certificate == _first_certificate(self._certificate):
                    return
                raise PortInUse(f"another program answers at port {self.port}", _CHOOSE)
            if time.monotonic() > until:
                raise CommonweightError(
                    f"the MQTT broker did not answer in {START_TIMEOUT_S:.0f} s"
                )
            await asyncio.sleep(0.05)
        log = self._folder / "broker.log"
        lines = log.read_text(errors="replace").strip().splitlines()
        raise CommonweightError(
            "the MQTT broker ended at once" + (f": {lines[-1][:200]}" if lines else ""),
            f"its words are in {log}",
        )

    async def _wait_until_down(self) -> str:
        """Wait until the child ended or stopped answering; why."""
        next_try = time.monotonic() + self._stuck_after_s / 3
        trial: asyncio.Task[bytes | None] | None = None
        try:
            while self._process is not None:
                if (status := self._process.poll()) is not None:
                    return f"the MQTT broker ended (status {status})"
                if trial is None and time.monotonic() >= next_try:
                    trial = asyncio.create_task(
                        self._served_certificate(timeout_s=self._stuck_after_s)
                    )
                elif trial is not None and trial.done():
                    if trial.result() is None and self.running:
                        await self.stop()
                        return f"the MQTT broker answered nobody for {self._stuck_after_s:.0f} s"
                    trial, next_try = None, time.monotonic() + self._stuck_after_s / 3
                await asyncio.sleep(_POLL_S)
            return "the MQTT broker was stopped"
        finally:
            if trial is not None:
                trial.cancel()

    async def _served_certificate(self, timeout_s: float) -> bytes | None:
        """The certificate (DER) that whoever listens shows, or None: no TLS handshake in time."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # compared with our own instead
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._ip, self._ip)
        try:
            async with asyncio.timeout(timeout_s):
                _, writer = await asyncio.open_connection(host, self.port, ssl=context)
        except OSError:  # a time-out is one as well
            return None
        shown: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.transport.abort()
        return shown


class ExternalBroker:
    """A broker that somebody else runs, given by its URL; the same doors as `EmbeddedBroker`.

    Raises UsageError for a wrong URL or an unreadable CA file.
    """

    running = True
    pid = None

    def __init__(self, url: str, ca_file: Path | None = None) -> None:
        try:
            ca_pem = ca_file.read_text() if ca_file else ""
        except (OSError, UnicodeDecodeError) as err:
            raise UsageError(f"cannot read the CA file {ca_file}", "it must be PEM") from err
        self._address = parse_url(url, ca_pem)
        self.host, self.port = self._address.host, self._address.port

    def address(self, host: str = "", ca_pem: str = "") -> MqttAddress:
        """What a client needs: the URL's, whatever this machine or its CA is."""
        return self._address

    async def start(self) -> None:
        """Nothing: it is not ours to start. The feed says whether it answers."""

    async def stop(self) -> None:
        """Nothing: it is not ours to stop."""

    async def supervise(self, on_change: OnChange) -> None:
        """Wait until cancelled."""
        on_change(True, "")
        await asyncio.Event().wait()


if sys.platform == "win32":
    _NEW_GROUP = subprocess.CREATE_NEW_PROCESS_GROUP
else:
    _NEW_GROUP = 0


def _free_port(ip: str, host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises PortInUse, UsageError."""
    try:
        return listenable(ip, port)
    except OSError as err:
        if err.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} of {host} is in use", _CHOOSE) from err
        if err.errno == errno.EADDRNOTAVAIL:
            hint = "choose another: --host"
            raise UsageError(f"this machine has no address {host}", hint) from err
        raise UsageError(f"cannot listen on {host}:{port}: {err.strerror}", _CHOOSE) from err


def _first_certificate(path: Path) -> bytes:
    """The DER form of the first certificate in a PEM file."""
    text = path.read_text()
    end = "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(text[text.index("-----BEGIN") : text.index(end) + len(end)])


async def _wait_for_exit(process: subprocess.Popen[bytes], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while process.poll() is None:
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.02)
    return True
