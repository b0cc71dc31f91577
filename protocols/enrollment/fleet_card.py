"""The fleet card: the coordinator's signing key and its broker, signed by the fleet's CA. Pure.

A machine that joins, or asks for the broker later, trusts only the content of the card. A server
that has the TLS key, but not the CA's key, can thus not bring in a signing key or a broker of its
own.
"""

from __future__ import annotations

import contextlib
import hashlib
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from protocols.enrollment import certificates, identity
from protocols.enrollment.identity import SigningKey
from protocols.errors import BadMessage
from protocols.messages.envelope import Count, Id, PublicKey
from protocols.messages.mqtt import MqttAddress
from protocols.messages.signing import SignedJson
from protocols.network.addresses import CoordinatorAddress

FORMAT = 1
MAX_ADDRESSES = 8
MAX_CARD_BYTES = 16 * 1024


class BrokerCard(Struct, frozen=True, kw_only=True):
    """A broker without its login. An empty `host` is the host of the coordinator.

    `ca_sha256`: of the PEM text of the only CA to trust there; empty for the system's CAs.
    """

    host: Annotated[str, Meta(max_length=253)] = ""
    port: Annotated[int, Meta(ge=0, le=65535)]
    tls: bool = True
    ca_sha256: Annotated[bytes, Meta(max_length=32)] = b""


class FleetCard(Struct, frozen=True, kw_only=True):
    """The CA's statement about its coordinator.

    `coordinator_public`: the Ed25519 key (raw, 32 bytes) of its commands and versions. `counter`
    grows with each change: an older card is refused. `issuer`: the certificate (PEM) of the issuer
    that signed it, or empty for the CA; after a newer issuer, an older one is refused.
    `old_ca_until`: node certificates of the CA before this one count until then (Unix s).
    `addresses`: where the coordinator and its replicas can be reached, if the operator names them.
    `downloads`: where replicas that wait send versions.
    """

    v: Count = FORMAT
    fleet: Id
    counter: Annotated[int, Meta(ge=1, le=2**53)]
    coordinator_public: PublicKey
    broker: BrokerCard
    issuer: Annotated[bytes, Meta(max_length=2048)] = b""
    old_ca_until: Annotated[float, Meta(ge=0, le=2**40)] = 0.0
    addresses: Annotated[tuple[CoordinatorAddress, ...], Meta(max_length=MAX_ADDRESSES)] = ()
    downloads: Annotated[tuple[CoordinatorAddress, ...], Meta(max_length=MAX_ADDRESSES)] = ()


_SIGNED = SignedJson(FleetCard, "fleet card", "fleet card", "this fleet's CA")


def broker_card(mqtt: MqttAddress) -> BrokerCard:
    """The broker of an address, as it stands on a card."""
    ca = hashlib.sha256(mqtt.ca_pem.encode()).digest() if mqtt.ca_pem else b""
    return BrokerCard(host=mqtt.host, port=mqtt.port, tls=mqtt.tls, ca_sha256=ca)


def issue_card(ca_key: SigningKey, card: FleetCard) -> bytes:
    """The signed card: 64 bytes of signature, then JSON."""
    return _SIGNED.pack(card, ca_key.sign)


def verify_card(
    ca_pem: bytes, data: bytes, *, fleet: str = "", newer_than: bytes = b"", at_least: int = 0
) -> FleetCard:
    """The card in `data`, if this CA signed it for its own fleet. Raises BadMessage.

    `fleet`: its id, if this CA is not the first of its fleet (`ca_chain.fleet_of`). `newer_than`:
    the card that is known; one with a lower counter is refused. `at_least`: the lowest counter,
    from a ticket.
    """
    if len(data) > MAX_CARD_BYTES:
        raise BadMessage(f"a fleet card of {len(data)} bytes; the limit is {MAX_CARD_BYTES}")
    issuer = b""
    with contextlib.suppress(BadMessage):  # whoever signed it; `unpack` says why it is not valid
        issuer = _SIGNED.decode(data[64:]).issuer
    signer = certificates.signer_public(ca_pem, issuer)
    card = _SIGNED.unpack(data, partial(identity.verify, signer))
    if card.v != FORMAT:
        raise BadMessage(f"a fleet card of format {card.v}; this version reads {FORMAT}")
    if card.fleet != (fleet or certificates.fleet_id(ca_pem)):
        raise BadMessage(f"the card is for fleet {card.fleet}, not for this CA's fleet")
    if card.counter < at_least:
        raise BadMessage(
            f"the fleet card is older (number {card.counter}) than the ticket ({at_least})"
        )
    if newer_than and newer_than != data:
        known = verify_card(ca_pem, newer_than, fleet=fleet)
        if certificates.issued_at(card.issuer) < certificates.issued_at(known.issuer):
            raise BadMessage("the fleet card is of an issuer that was replaced")
        if card.counter <= known.counter and card != known:
            raise BadMessage(
                f"the fleet card is older (number {card.counter}) than the one known here "
                f"({known.counter})"
            )
    return card


def checked_broker(card: FleetCard, told: MqttAddress, coordinator_host: str) -> MqttAddress:
    """The broker with its login, if it is the one on the card. Raises BadMessage.

    If the card names no host, it is the host by which this machine knows the coordinator.
    """
    wanted = card.broker
    address = msgspec.structs.replace(told, host=wanted.host or coordinator_host)
    if wanted.host and wanted.host != told.host:
        raise BadMessage(f"the broker {told.netloc} is not the one that this fleet's CA signed")
    if msgspec.structs.replace(broker_card(address), host=wanted.host) != wanted:
        raise BadMessage(f"the broker {address} is not the one that this fleet's CA signed")
    return address
