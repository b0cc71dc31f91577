"""Mosquitto as the broker: its configuration, and a login and ACL for each member.

`commonweight admin mosquitto FOLDER` writes the files once, and the coordinator keeps them up to
date. Mosquitto reads them again on SIGHUP and then ends connections whose login is gone. It runs on
the coordinator's machine, with the coordinator's TLS certificate.
"""

from __future__ import annotations

import asyncio
import getpass
import hashlib
import logging
import shutil
import signal
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import psutil

from coordinator.transport.mqtt_access import WATCHED, OnRefused, Passwords, Role
from protocols.errors import HomeError
from protocols.local.atomic_files import write_private
from protocols.local.os_errors import os_errors_as
from protocols.messages import topics
from protocols.messages.envelope import MAX_PAYLOAD_BYTES
from protocols.messages.mqtt import MqttAddress

log = logging.getLogger("commonweight.hub")

CONFIG, PASSWORDS, ACL, PID = "mosquitto.conf", "passwords", "acl", "mosquitto.pid"
#: The coordinator's own user.
USER = "coordinator"
#: Of PBKDF2-SHA512. A password has 192 random bits, so it needs no more.
_ITERATIONS = 101
#: Several changes at once are one reload.
_RELOAD_EVERY_S = 0.5


def find_program() -> str:
    """The path of Mosquitto, or its name. Debian installs it outside of the users' search path."""
    name = "mosquitto"
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin") or name


class MosquittoFiles:
    """The files in `folder`. `admit` and `drop` change what the next `write` writes."""

    def __init__(self, folder: Path, fleet: str, passwords: Passwords) -> None:
        self.folder = folder.absolute()
        self._fleet, self.passwords = fleet, passwords
        self._roles: dict[str, Role] = {}
        self._lines: dict[str, str] = {}

    def admit(self, user: str, role: Role) -> None:
        self._roles[user] = role

    def drop(self, user: str) -> None:
        self._roles.pop(user, None)

    def write(self) -> bool:
        """Write the logins and the ACL. Returns whether they have changed. Raises OSError."""
        logins = "".join(self._line(user) for user in (USER, *self._roles))
        changed = False
        for name, text in ((PASSWORDS, logins), (ACL, self._acl())):
            path = self.folder / name
            if not path.exists() or path.read_text() != text:
                write_private(path, text.encode())
                changed = True
        return changed

    def write_empty(self) -> None:
        """Write a login for the coordinator alone, unless the files are there. Raises OSError."""
        if not (self.folder / PASSWORDS).exists() or not (self.folder / ACL).exists():
            self.write()

    def write_config(self, host: str, port: int, certificate: Path, key: Path) -> Path:
        """Write the configuration of a listener with TLS. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lines = (
            f"listener {port} {host}",
            f"certfile {certificate.absolute()}",
            f"keyfile {key.absolute()}",
            "tls_version tlsv1.2",
            "allow_anonymous false",
            f"password_file {self.folder / PASSWORDS}",
            f"acl_file {self.folder / ACL}",
            f"pid_file {self.folder / PID}",
            # Started by root, Mosquitto becomes this user, who can read the files.
            f"user {getpass.getuser()}",
            f"max_packet_size {MAX_PAYLOAD_BYTES + 4096}",
            f"message_size_limit {MAX_PAYLOAD_BYTES}",
            "max_keepalive 300",
            "max_inflight_messages 100",
            "max_queued_messages 20000",
            "max_queued_bytes 33554432",
            "persistence false",
            "set_tcp_nodelay true",
        )
        write_private(self.folder / CONFIG, ("\n".join(lines) + "\n").encode())
        return self.folder / CONFIG

    def _line(self, user: str) -> str:
        """A line of the password file: `$7$` is PBKDF2-SHA512."""
        if user not in self._lines:
            password = self.passwords.of(user).encode()
            salt = hashlib.sha256(b"mosquitto salt\n" + password).digest()[:12]
            digest = hashlib.pbkdf2_hmac("sha512", password, salt, _ITERATIONS)
            encoded = f"{b64encode(salt).decode()}${b64encode(digest).decode()}"
            self._lines[user] = f"{user}:$7${_ITERATIONS}${encoded}\n"
        return self._lines[user]

    def _acl(self) -> str:
        """As in `mqtt_access`. A subscription to other topics is accepted and gets no message."""
        fleet = self._fleet
        lines = [f"user {USER}", f"topic readwrite cw/{fleet}/#"]
        for user, role in self._roles.items():
            lines.append(f"user {user}")
            if role == "agent":
                own = topics.presence, topics.telemetry, topics.notice, topics.head
                lines += [f"topic write {topic(fleet, user)}" for topic in own]
                lines.append(f"topic read {topics.command(fleet, user)}")
                lines.append(f"topic read {topics.all_heads(fleet)}")
            else:
                lines += [f"topic read {topics.all_peers(fleet, kind)}" for kind in WATCHED]
                lines.append(f"topic read {topics.event(fleet)}")
        return "\n".join(lines) + "\n"


class MosquittoBroker:
    """Mosquitto over `files`. It has the methods of `EmbeddedBroker`, and does not start it."""

    on_refused: OnRefused

    def __init__(self, files: MosquittoFiles, host: str, port: int, ca_pem: str) -> None:
        self.host, self.port = host, port
        self._files, self._ca_pem = files, ca_pem
        self._changed = asyncio.Event()

    def address(self, host: str, ca_pem: str, user: str = "") -> MqttAddress:
        """The address for a client that knows this machine as `host`, with this user's login."""
        return self._files.passwords.address(host, self.port, ca_pem, user)

    def own_address(self) -> MqttAddress:
        """The address for this process."""
        local = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return self.address(local, self._ca_pem, USER)

    def admit(self, user: str, role: Role) -> None:
        """Let a user log in from the next reload on."""
        self._files.admit(user, role)
        self._changed.set()

    def drop(self, user: str) -> None:
        """Refuse a user's login from the next reload on, which cuts its connections."""
        self._files.drop(user)
        self._changed.set()

    async def start(self) -> None:
        """Write the files and let a running Mosquitto read them. Raises HomeError."""
        self._changed.clear()
        with os_errors_as(
            HomeError,
            f"cannot write the logins of Mosquitto into {self._files.folder}",
            f"commonweight admin mosquitto {self._files.folder}",
        ):
            if self._files.write():
                self._reload()

    async def stop(self) -> None:
        """Do nothing: we do not run this broker."""

    async def supervise(self, on_change: Callable[[bool, str], None]) -> None:
        """Write changed logins, until cancelled."""
        on_change(True, "")
        while True:
            await self._changed.wait()
            try:
                await self.start()
            except HomeError as err:
                log.warning("%s; %s", err.message, err.hint)
            await asyncio.sleep(_RELOAD_EVERY_S)

    def _reload(self) -> None:
        pid_file = self._files.folder / PID
        try:
            process = psutil.Process(int(pid_file.read_text()))
            if process.name() != "mosquitto":  # it has ended, and its number was given again
                return
            process.send_signal(signal.SIGHUP)
        except (FileNotFoundError, psutil.NoSuchProcess):  # it reads the files at its start
            log.info("Mosquitto does not run over %s", self._files.folder)
        except (OSError, ValueError, psutil.Error) as err:
            log.warning(
                "Mosquitto was not told of changed logins (%s); a removed member keeps its "
                "connection until you run: kill -HUP $(cat %s)",
                err,
                pid_file,
            )
