"""The file of the current fleet card. A changed key or broker gets a new card."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import msgspec

from protocols.enrollment import fleet_card, identity
from protocols.enrollment.fleet_card import FleetCard
from protocols.enrollment.identity import SigningKey
from protocols.errors import BadMessage
from protocols.local.atomic_files import write_private
from protocols.messages.mqtt import MqttAddress

FILE = "fleet.card"


class CardFile:
    """The card in a coordinator's home. It is signed again only when its content changes."""

    def __init__(self, home: Path, ca_pem: bytes) -> None:
        self._path, self._ca_pem = home / FILE, ca_pem
        self._card: FleetCard | None = None
        self._signed = b""
        with contextlib.suppress(OSError, BadMessage):  # none yet, or of another CA
            signed = self._path.read_bytes()
            self._card, self._signed = fleet_card.verify_card(ca_pem, signed), signed

    @property
    def card(self) -> FleetCard | None:
        """The card in the file, if there is one of this CA."""
        return self._card

    def current(
        self, ca_key: SigningKey, public: bytes, broker: MqttAddress, issuer: bytes = b""
    ) -> bytes:
        """The signed card for this signing key and broker.

        `issuer`: the certificate (PEM) of the issuer whose key `ca_key` is, or empty.
        """
        counter = self._card.counter if self._card else 0
        card = FleetCard(
            fleet=identity.fleet_id(self._ca_pem) if self._card is None else self._card.fleet,
            counter=max(counter, 1),
            coordinator_public=public,
            broker=fleet_card.broker_card(broker),
            issuer=issuer,
        )
        if card != self._card:
            # The clock keeps the counter growing in a home that was restored from a backup.
            counter = max(counter + 1, int(time.time()))
            self._card = msgspec.structs.replace(card, counter=counter)
            self._signed = fleet_card.issue_card(ca_key, self._card)
            write_private(self._path, self._signed)
        return self._signed
