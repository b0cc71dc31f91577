"""What is said when a machine joins, asks how it stands, and leaves. Pure."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from protocols.messages.envelope import Name
from protocols.messages.mqtt import MqttAddress

JOIN_PATH = "/cw/v1/join"
OPERATOR_JOIN_PATH = "/cw/v1/operators/join"
CA_PATH = "/cw/v1/ca"
ENROLLMENT_STATUS_PATH = "/cw/v1/standing"
RENEW_PATH = "/cw/v1/renew"
LEAVE_PATH = "/cw/v1/leave"
MQTT_PATH = "/cw/v1/mqtt"


class JoinRequest(Struct, frozen=True, kw_only=True):
    """What an agent sends: its ticket's id and secret, and the public halves of its two keys.

    `proof` is its Ed25519 signature over `claimed`: nobody joins with, or asks again in the name
    of, a key that he has only seen.
    """

    ticket: Name
    secret: Annotated[bytes, Meta(min_length=16, max_length=16)]
    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[\w.:@ -]+\Z")]
    labels: Annotated[dict[Name, Name], Meta(max_length=16)] = {}
    sign_public: Annotated[bytes, Meta(min_length=32, max_length=32)]
    node_public: Annotated[bytes, Meta(max_length=1024)]
    proof: Annotated[bytes, Meta(min_length=64, max_length=64)]
    version: Name


def join_proof(ticket: str, secret: bytes, node_public: bytes) -> bytes:
    """What a joining machine signs with the key that it joins with."""
    return b"\n".join((b"commonweight join 1", ticket.encode(), secret.hex().encode(), node_public))


class OperatorJoinRequest(Struct, frozen=True, kw_only=True):
    """What a monitor elsewhere sends: its ticket, and the public half of its key, proved."""

    ticket: Name
    secret: Annotated[bytes, Meta(min_length=16, max_length=16)]
    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[\w.:@ -]+\Z")]
    sign_public: Annotated[bytes, Meta(min_length=32, max_length=32)]
    proof: Annotated[bytes, Meta(min_length=64, max_length=64)]
    version: Name


def operator_join_proof(ticket: str, secret: bytes, sign_public: bytes) -> bytes:
    """What a joining monitor signs with the key that it joins with."""
    parts = (b"commonweight operator 1", ticket.encode(), secret.hex().encode(), sign_public)
    return b"\n".join(parts)


class OperatorJoinResponse(Struct, frozen=True, kw_only=True):
    """Who the monitor is to the fleet from now on, and what it may."""

    operator: str
    role: Literal["observer", "operator"]
    fleet: str


class JoinResponse(Struct, frozen=True, kw_only=True):
    """What a machine needs to work for the fleet."""

    peer: str
    name: str
    fleet: str
    certificate: bytes
    coordinator_public: bytes
    mqtt: MqttAddress
    awaiting: bool


class EnrollmentStatus(Struct, frozen=True, kw_only=True):
    """How a machine stands with the coordinator, and the coordinator's own version."""

    peer: str
    name: str
    enrollment: Literal["awaiting", "enrolled"] = field(name="standing")
    version: str
