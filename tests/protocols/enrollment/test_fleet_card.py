"""The fleet card, and what an enrolled machine accepts of it later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.home import fleet_trust
from agent.home.enrollment_file import Enrollment
from coordinator.storage.fleet_cards import CardFile
from protocols.enrollment import certificates, fleet_card
from protocols.enrollment.fleet_card import FleetCard
from protocols.enrollment.joining import MqttResponse
from protocols.errors import BadMessage
from protocols.messages.mqtt import MqttAddress

CA_KEY, CA = certificates.new_ca("test")
OTHER_KEY, OTHER_CA = certificates.new_ca("other")
BROKER = MqttAddress(host="hub", port=1883, user="fleet", password="word", ca_pem=CA.decode())
PUBLIC = bytes(range(32))


def card(counter: int = 5, broker: MqttAddress = BROKER, **changed: Any) -> bytes:
    own = msgspec.structs.replace(fleet_card.broker_card(broker), host="")
    fields = {"fleet": certificates.fleet_id(CA), "coordinator_public": PUBLIC, "broker": own}
    return fleet_card.issue_card(CA_KEY, FleetCard(counter=counter, **(fields | changed)))


def enrolled(known: bytes) -> Enrollment:
    return Enrollment(
        peer="P",
        name="box",
        fleet=certificates.fleet_id(CA),
        addresses=("hub:1",),
        ca_pem=CA.decode(),
        certificate=b"",
        coordinator_public=PUBLIC,
        mqtt=BROKER,
        card=known,
    )


def told(card: bytes, **changed: Any) -> MqttResponse:
    return MqttResponse(**(msgspec.structs.asdict(BROKER) | changed), card=card)


def test_a_changed_broker_or_key_is_taken_with_a_newer_card() -> None:
    moved = msgspec.structs.replace(BROKER, port=9)
    new = card(6, moved, coordinator_public=bytes(32))
    known = fleet_trust.with_broker(enrolled(card()), told(new, port=9, password="new"))
    assert (known.mqtt.port, known.mqtt.password) == (9, "new")
    assert (known.card, known.coordinator_public) == (new, bytes(32))


def test_addresses_on_the_card_follow_the_one_that_works() -> None:
    before = msgspec.structs.replace(enrolled(card()), addresses=("hub:1", "old:1"))
    known = fleet_trust.with_broker(before, told(card(6, addresses=("new:443/fleet", "hub:1"))))
    assert known.addresses == ("hub:1", "new:443/fleet")
    none_told = fleet_trust.with_broker(before, told(card(6)))
    assert none_told.addresses == before.addresses


@pytest.mark.parametrize("wrong", ["hub", "hub:0", "hub:65536", "user@hub:1", "a b:1", "hub:1/ "])
def test_a_card_with_an_address_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(BadMessage):
        fleet_trust.with_broker(enrolled(card()), told(card(6, addresses=(wrong,))))


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (told(card(6), port=9), "not the one that this fleet's CA signed"),
        (told(card(6), tls=False), "not the one that this fleet's CA signed"),
        (told(card(6), ca_pem=""), "not the one that this fleet's CA signed"),
        (told(card(4, coordinator_public=bytes(32))), "older"),
        (told(card(5, coordinator_public=bytes(32))), "older"),
        (told(card(6, fleet="0" * 16)), "is for fleet"),
        (told(card(6, v=2)), "format 2"),
        (told(card(6)[:-1] + b" }"), "not signed by this fleet's CA"),
        (told(bytes(64)), "not signed by this fleet's CA"),
        (told(b"x" * 20_000), "limit"),
        (told(b"", port=9), "without the signature"),
        (told(b"", host="evil"), "without the signature"),
    ],
)
def test_what_the_ca_did_not_sign_is_refused(response: MqttResponse, words: str) -> None:
    with pytest.raises(BadMessage, match=words):
        fleet_trust.with_broker(enrolled(card()), response)


def test_a_new_login_needs_no_card_and_a_home_without_one_gets_one() -> None:
    assert fleet_trust.with_broker(enrolled(b""), told(b"", password="x")).mqtt.password == "x"
    assert fleet_trust.with_broker(enrolled(b""), told(card())).card == card()
    assert fleet_trust.with_broker(enrolled(card()), told(card())) == enrolled(card())


def test_an_external_broker_keeps_its_host() -> None:
    signed = fleet_card.verify_card(CA, card(broker=BROKER))
    outside = msgspec.structs.replace(
        signed, broker=msgspec.structs.replace(signed.broker, host="broker.example")
    )
    with pytest.raises(BadMessage, match="not the one"):
        fleet_card.checked_broker(outside, BROKER, "hub")
    there = msgspec.structs.replace(BROKER, host="broker.example")
    assert fleet_card.checked_broker(outside, there, "hub") == there


def test_a_card_is_signed_again_only_when_its_content_changes(tmp_path: Path) -> None:
    file = CardFile(tmp_path, CA)
    first = file.current(CA_KEY, PUBLIC, BROKER)
    assert file.current(CA_KEY, PUBLIC, BROKER) == first
    assert CardFile(tmp_path, CA).current(CA_KEY, PUBLIC, BROKER) == first, "also after a restart"
    second = file.current(CA_KEY, bytes(32), BROKER)
    numbers = [fleet_card.verify_card(CA, data).counter for data in (first, second)]
    assert numbers[1] > numbers[0]
    next_term = numbers[1] + 60
    third = CardFile(tmp_path, CA, term=next_term).current(CA_KEY, bytes(32), BROKER)
    assert fleet_card.verify_card(CA, third).counter == next_term, "another replica led in between"
    again = CardFile(tmp_path, CA, term=next_term).current(CA_KEY, bytes(32), BROKER)
    assert again == third
    other = CardFile(tmp_path, OTHER_CA).current(OTHER_KEY, PUBLIC, BROKER)
    assert fleet_card.verify_card(OTHER_CA, other).fleet == certificates.fleet_id(OTHER_CA)
