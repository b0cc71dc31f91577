"""Checks what the coordinator says about its fleet by the signature of the fleet's CA. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from agent.home.enrollment_file import Enrollment
from protocols.enrollment import ca_chain, certificates, fleet_card, identity
from protocols.enrollment.ca_chain import CaTrust, ChainResponse
from protocols.enrollment.certificates import NodeCertificate
from protocols.enrollment.fleet_card import FleetCard
from protocols.enrollment.joining import JoinResponse, MqttResponse
from protocols.errors import BadMessage
from protocols.network import addresses


def check_join(
    ca_pem: bytes, answer: JoinResponse, sign: bytes, node: bytes, at_least: int = 0
) -> FleetCard:
    """The fleet card of a join response, after a check of every other field against it and the CA.

    `sign`, `node`: this machine's public keys, as it sent them. `at_least`: the number of the card
    in the ticket. Raises BadMessage.
    """
    fleet = ca_chain.fleet_of(ca_pem, answer.transitions)
    card = fleet_card.verify_card(ca_pem, answer.card, fleet=fleet, at_least=at_least)
    if answer.fleet != fleet:
        raise BadMessage(f"fleet {answer.fleet} is not the fleet of this CA, {fleet}")
    if answer.coordinator_public != card.coordinator_public:
        raise BadMessage("the coordinator's signing key is not the one that this fleet's CA signed")
    ours = check_certificate(ca_pem, fleet, answer.certificate, sign, node)
    if answer.name != ours.name:
        raise BadMessage("this machine's name is not the one in its certificate")
    if answer.peer != identity.peer_id(sign):
        raise BadMessage(f"the id {answer.peer} is not that of this machine's key")
    return card


def check_certificate(
    ca_pem: bytes, fleet: str, certificate: bytes, sign: bytes, node: bytes
) -> NodeCertificate:
    """The certificate, if the CA made it for these two keys and this fleet. Raises BadMessage."""
    ours = certificates.verify_certificate(ca_pem, certificate)
    if (ours.sign_public, ours.node_public) != (sign, node):
        raise BadMessage("the certificate is for another key")
    if ours.fleet != fleet or ours.peer != identity.peer_id(sign):
        raise BadMessage("the certificate is for another fleet or peer")
    return ours


def with_broker(enrollment: Enrollment, told: MqttResponse) -> Enrollment:
    """The enrollment with the broker that the coordinator names. Raises BadMessage.

    Without a card, as from older coordinators, only the login may change.
    """
    host = addresses.parse(enrollment.addresses[0]).host
    if not told.card:
        known = replace(enrollment.mqtt, user=told.user, password=told.password)
        if told.address != known:
            raise BadMessage(
                f"the coordinator names another MQTT broker, {told.netloc}, without the signature "
                "of the fleet's CA",
                "update the coordinator",
            )
        return replace(enrollment, mqtt=told.address)
    ca_pem = enrollment.ca_pem.encode()
    card = fleet_card.verify_card(
        ca_pem, told.card, fleet=enrollment.fleet, newer_than=enrollment.card
    )
    mqtt = fleet_card.checked_broker(card, told.address, host)
    return replace(
        enrollment,
        addresses=known_addresses(enrollment.addresses, card),
        mqtt=mqtt,
        card=told.card,
        coordinator_public=card.coordinator_public,
    )


def known_addresses(tried: Sequence[str], card: FleetCard) -> tuple[str, ...]:
    """The coordinator's addresses: the first one, which works, then the others.

    Those on a card replace the ones of the ticket.
    """
    works, *others = tried
    return (works, *(one for one in card.addresses or others if one != works))


def download_addresses(enrollment: Enrollment) -> tuple[str, ...]:
    """Where replicas of the coordinator send versions. Raises BadMessage."""
    ca_pem, card = enrollment.ca_pem.encode(), enrollment.card
    if not card:
        return ()
    return fleet_card.verify_card(ca_pem, card, fleet=enrollment.fleet).downloads


def with_new_ca(enrollment: Enrollment, told: ChainResponse) -> Enrollment:
    """The enrollment with the newest CA, its card and its key; the same if there is no newer CA.

    The node certificate is still that of the old CA. Raises BadMessage.
    """
    old = enrollment.ca_pem.encode()
    ca_pem = ca_chain.follow(old, enrollment.transitions, told.transitions)
    if ca_pem == old:
        return enrollment
    card = ca_chain.first_card(ca_pem, told.card, old, enrollment.card, enrollment.fleet)
    mqtt = enrollment.mqtt
    if mqtt.ca_pem == enrollment.ca_pem:  # the embedded broker has a certificate of the same CA
        mqtt = replace(mqtt, ca_pem=ca_pem.decode())
    return replace(
        enrollment,
        ca_pem=ca_pem.decode(),
        transitions=told.transitions,
        card=told.card,
        coordinator_public=card.coordinator_public,
        mqtt=mqtt,
    )


def trusted_cas(enrollment: Enrollment) -> CaTrust:
    """The CAs whose node certificates count. Raises BadMessage."""
    ca_pem, until = enrollment.ca_pem.encode(), 0.0
    if enrollment.card:
        card = fleet_card.verify_card(ca_pem, enrollment.card, fleet=enrollment.fleet)
        until = card.old_ca_until
    return CaTrust.of(ca_pem, enrollment.transitions, until)
