"""The coordinator's listening socket, its names and its TLS certificate."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path

from starlette.types import ASGIApp

from coordinator.storage import settings
from coordinator.storage.settings import UP_FILE, Keys, Settings
from coordinator.transport.http_server import Server, listen
from protocols.local.atomic_files import write_private
from protocols.network import addresses

log = logging.getLogger("commonweight.hub")

CERTIFICATE_EVERY_S = 6 * 3600.0


class Listener:
    """An open socket with a certificate for all its names. Raises PortInUse, UsageError."""

    def __init__(self, home: Path, keys: Keys, chosen: Settings) -> None:
        self._home, self._keys, self._host = home, keys, chosen.host
        self.names = chosen.names or settings.reachable_names(chosen.host)
        self._mosquitto, self._url = chosen.mqtt_mosquitto, chosen.mqtt_url
        self._public, self._downloads = chosen.public_addresses, chosen.download_addresses
        self._certify()
        self._socket = listen(chosen.host, chosen.port)
        self.port: int = self._socket.getsockname()[1]

    def _certify(self) -> bool:
        """Issue or renew the certificate. Returns False if it is still valid."""
        public = [addresses.parse(one).host for one in (*self._public, *self._downloads)]
        keys = self._keys
        return settings.certify(
            self._home, keys.ca_key, keys.ca_pem, [*self.names, *public], keys.issuer
        )

    def server(self, app: ASGIApp) -> Server:
        return Server(app, self._socket, self._home / "server.pem", self._home / "server.key")

    async def renew_certificate(self, server: Server) -> None:
        """Renew the TLS certificate long before it expires, without a restart."""
        while True:
            await asyncio.sleep(CERTIFICATE_EVERY_S)
            if self._certify():
                server.renew()
                log.info("renewed the TLS certificate")

    def addresses(self) -> tuple[str, ...]:
        """Addresses for a ticket, the public ones first."""
        hosts = (f"[{name}]" if ":" in name else name for name in self.names)
        return (*self._public, *(f"{host}:{self.port}" for host in hosts))[:8]

    def write_up_file(self) -> None:
        """Write the coordinator's address for commands on this machine."""
        local = "127.0.0.1" if self._host in ("0.0.0.0", "::", "") else self._host
        up = {
            "pid": os.getpid(),
            "address": f"{local}:{self.port}",
            "host": self._host,
            "fleet": self._keys.fleet,
            # Without the URL, which may have a password.
            "mosquitto": self._mosquitto,
            "external_broker": bool(self._url or self._mosquitto),
        }
        write_private(self._home / UP_FILE, json.dumps(up).encode())
