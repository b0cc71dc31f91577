"""The file of the current fleet card. A changed key or broker gets a new card."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from protocols.enrollment import ca_chain, fleet_card
from protocols.enrollment.fleet_card import FleetCard
from protocols.enrollment.identity import SigningKey
from protocols.enrollment.joining import Chain
from protocols.errors import BadMessage
from protocols.local.atomic_files import write_private
from protocols.messages.mqtt import MqttAddress

FILE = "fleet.card"


class CardFile:
    """The card in a coordinator's home. It is signed again only when its content changes.

    `term`: that of the leader, 0 without replicas. Another replica may have signed a newer card
    than that of this home, so the number of a card is the term at least. All replicas have their
    terms from one clock.
    """

    def __init__(self, home: Path, ca_pem: bytes, chain: Chain = (), term: int = 0) -> None:
        self._path, self._term = home / FILE, term
        self._fleet = ca_chain.fleet_of(ca_pem, chain)
        #: The card in the file, if there is one of this CA.
        self.card: FleetCard | None = None
        self._signed, self._counter = b"", 0
        with contextlib.suppress(OSError):  # none yet
            signed = self._path.read_bytes()
            for one in (ca_pem, *(step.old_ca for step in ca_chain.read_chain(chain))):
                with contextlib.suppress(BadMessage):
                    card = fleet_card.verify_card(one, signed, fleet=self._fleet)
                    self._counter = card.counter  # of an earlier CA, too
                    if one == ca_pem:
                        self.card, self._signed = card, signed

    def current(
        self,
        ca_key: SigningKey,
        public: bytes,
        broker: MqttAddress,
        issuer: bytes = b"",
        old_ca_until: float = 0.0,
        addresses: Sequence[str] = (),
        downloads: Sequence[str] = (),
    ) -> bytes:
        """The signed card for this signing key and broker.

        `issuer`: the certificate (PEM) of the issuer whose key `ca_key` is, or empty.
        `old_ca_until`, `addresses`, `downloads`: as on the card, which has the first addresses of a
        longer list.
        """
        card = FleetCard(
            fleet=self._fleet,
            counter=max(self._counter, 1),
            coordinator_public=public,
            broker=fleet_card.broker_card(broker),
            issuer=issuer,
            old_ca_until=old_ca_until,
            addresses=tuple(addresses[: fleet_card.MAX_ADDRESSES]),
            downloads=tuple(downloads[: fleet_card.MAX_ADDRESSES]),
        )
        if card != self.card or self._counter < self._term:
            # Both keep the counter growing in a home that was restored from a backup.
            self._counter = max(self._counter + 1, self._term or int(time.time()))
            self.card = msgspec.structs.replace(card, counter=self._counter)
            self._signed = fleet_card.issue_card(ca_key, self.card)
            write_private(self._path, self._signed)
        return self._signed
