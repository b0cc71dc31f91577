"""The result of joining a fleet, and the file in the agent's home that stores it."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from protocols.enrollment import ca_chain, fleet_card
from protocols.errors import BadMessage, HomeError, NotEnrolled
from protocols.local.atomic_files import write_private
from protocols.messages.mqtt import MqttAddress

ENROLLMENT_FILE = "enrolled.json"


class Enrollment(Struct, frozen=True, kw_only=True):
    """The result of joining a fleet. `mqtt` has the fleet's login, so the file has mode 0600.

    `card`: the newest fleet card; homes of older versions get theirs at the next session.
    `transitions`: from the CA that gave the fleet its id to `ca_pem`.
    """

    peer: str
    name: str
    fleet: str
    addresses: tuple[str, ...]
    ca_pem: str
    certificate: bytes
    coordinator_public: bytes
    mqtt: MqttAddress
    card: bytes = b""
    transitions: tuple[bytes, ...] = ()


def read_enrollment(home: Path) -> Enrollment:
    """The enrollment of this home. Raises NotEnrolled, HomeError."""
    try:
        enrollment = msgspec.json.decode((home / ENROLLMENT_FILE).read_bytes(), type=Enrollment)
    except FileNotFoundError as err:
        raise NotEnrolled(
            "this machine has not joined a fleet",
            "commonweight-agent join TICKET (the ticket comes from commonweight ticket create)",
        ) from err
    except (OSError, msgspec.DecodeError) as err:
        raise HomeError(
            f"{home / ENROLLMENT_FILE} is damaged: {err}", "join again: --replace"
        ) from err
    try:
        _check_trust(enrollment)
    except BadMessage as err:
        raise HomeError(
            f"{home / ENROLLMENT_FILE} trusts more than this fleet's CA: {err}",
            "ask the operator for a new ticket, and join again: --replace",
        ) from err
    return enrollment


def _check_trust(enrollment: Enrollment) -> None:
    """Raise BadMessage unless there is one CA, and the fleet and the card are of this CA."""
    ca_pem = enrollment.ca_pem.encode()
    if ca_chain.fleet_of(ca_pem, enrollment.transitions) != enrollment.fleet:
        raise BadMessage(f"its CA is not that of fleet {enrollment.fleet}")
    if enrollment.card:
        card = fleet_card.verify_card(ca_pem, enrollment.card, fleet=enrollment.fleet)
        if card.coordinator_public != enrollment.coordinator_public:
            raise BadMessage("the coordinator's signing key is not on the fleet card")


def write_enrollment(home: Path, enrollment: Enrollment) -> None:
    """Replace the enrollment of this home."""
    write_private(home / ENROLLMENT_FILE, msgspec.json.encode(enrollment))
