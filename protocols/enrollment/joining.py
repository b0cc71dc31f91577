"""Requests and responses to join a fleet, and to ask for the enrollment status. Pure."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, convert, field

from protocols.messages.envelope import Id, Labels, Name, PublicKey
from protocols.messages.mqtt import MqttAddress

JOIN_PATH = "/cw/v1/join"
OPERATOR_JOIN_PATH = "/cw/v1/operators/join"
CA_PATH = "/cw/v1/ca"
CA_CHAIN_PATH = "/cw/v1/ca/transitions"
ENROLLMENT_STATUS_PATH = "/cw/v1/standing"
RENEW_PATH = "/cw/v1/renew"
LEAVE_PATH = "/cw/v1/leave"
MQTT_PATH = "/cw/v1/mqtt"

#: A fleet card (`enrollment.fleet_card`).
Card = Annotated[bytes, Meta(max_length=16 * 1024)]
MAX_TRANSITIONS, MAX_TRANSITION_BYTES = 32, 4 * 1024
#: The transitions of a fleet's CA (`enrollment.ca_chain`), oldest first.
Chain = Annotated[
    tuple[Annotated[bytes, Meta(max_length=MAX_TRANSITION_BYTES)], ...],
    Meta(max_length=MAX_TRANSITIONS),
]


class _TicketRequest(Struct, frozen=True, kw_only=True):
    ticket: Id
    secret: Annotated[bytes, Meta(min_length=16, max_length=16)]
    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[\w.:@ -]+\Z")]
    sign_public: PublicKey
    proof: Annotated[bytes, Meta(min_length=64, max_length=64)]
    version: Name
    follows_ca: bool = False


class JoinRequest(_TicketRequest, frozen=True, kw_only=True):
    """An agent's request: the ticket's id and secret, and its two public keys.

    `proof` is its Ed25519 signature over `join_proof`. It shows that the sender has the private
    key, and did not just copy the public one. `follows_ca`: it reads transitions of the CA.
    """

    labels: Labels = {}
    node_public: Annotated[bytes, Meta(max_length=1024)]


def join_proof(ticket: str, secret: bytes, node_public: bytes) -> bytes:
    """The bytes that a joining machine signs with its new key."""
    return b"\n".join((b"commonweight join 1", ticket.encode(), secret.hex().encode(), node_public))


class OperatorJoinRequest(_TicketRequest, frozen=True, kw_only=True):
    """The request of a monitor on another machine: its ticket, its public key and a proof."""


def operator_join_proof(ticket: str, secret: bytes, sign_public: bytes) -> bytes:
    """The bytes that a joining monitor signs with its new key."""
    parts = (b"commonweight operator 1", ticket.encode(), secret.hex().encode(), sign_public)
    return b"\n".join(parts)


class OperatorJoinResponse(Struct, frozen=True, kw_only=True):
    """The id and role of a monitor that has joined; fleet card and transitions as for an agent."""

    operator: Id
    role: Literal["observer", "operator"]
    fleet: Id
    card: Card = b""
    transitions: Chain = ()


class JoinResponse(Struct, frozen=True, kw_only=True):
    """What a machine needs to work in the fleet. `awaiting`: the operator has to approve it.

    `card`: the fleet card (`enrollment.fleet_card`); older coordinators send none. `transitions`:
    from the CA that gave the fleet its id to the present one.
    """

    peer: Id
    name: Name
    fleet: Id
    certificate: Annotated[bytes, Meta(max_length=4096)]
    coordinator_public: PublicKey
    mqtt: MqttAddress
    awaiting: bool
    card: Card = b""
    transitions: Chain = ()


class MqttResponse(MqttAddress, frozen=True, kw_only=True):
    """The broker's address and login, and the fleet card; older coordinators send no card."""

    card: Card = b""

    @property
    def address(self) -> MqttAddress:
        """The address without the card."""
        return convert(self, MqttAddress, from_attributes=True)


class EnrollmentStatus(Struct, frozen=True, kw_only=True):
    """The enrollment status of a machine, and the version of the coordinator."""

    peer: Id
    name: Name
    enrollment: Literal["awaiting", "enrolled"] = field(name="standing")
    version: Name
