"""A broker of another operator, by its URL. Its logins are its own."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from coordinator.transport.mqtt_access import OnRefused, Role
from coordinator.transport.mqtt_broker import OnChange
from protocols.errors import UsageError
from protocols.messages.mqtt import NO_TLS_HINT, MqttAddress, parse_url

log = logging.getLogger("commonweight.mqtt")


class ExternalBroker:
    """An external broker, by its URL. It has the methods of `EmbeddedBroker`.

    Raises UsageError for a wrong URL or an unreadable CA file.
    """

    on_refused: OnRefused

    def __init__(self, url: str, ca_file: Path | None = None) -> None:
        try:
            ca_pem = ca_file.read_text() if ca_file else ""
        except (OSError, UnicodeDecodeError) as err:
            raise UsageError(f"cannot read the CA file {ca_file}", "it must be PEM") from err
        self._address = parse_url(url, ca_pem)
        if self._address.is_readable_on_the_way:
            log.warning("the MQTT broker %s has no TLS; %s", self._address, NO_TLS_HINT)

    def address(self, host: str = "", ca_pem: str = "", user: str = "") -> MqttAddress:
        """The address in the URL. The parameters are ignored."""
        return self._address

    def own_address(self) -> MqttAddress:
        return self._address

    def admit(self, user: str, role: Role) -> None:
        """Do nothing: that broker has logins of its own."""

    def drop(self, user: str) -> None:
        """Do nothing: that broker has logins of its own."""

    async def start(self) -> None:
        """Do nothing: we do not run this broker."""

    async def stop(self) -> None:
        """Do nothing: we do not run this broker."""

    async def supervise(self, on_change: OnChange) -> None:
        """Wait until cancelled."""
        on_change(True, "")
        await asyncio.Event().wait()
