"""How peers hand each other versions: piece lists, plans, permits. Pure.

A version is cut into pieces of `PIECE_BYTES`. The coordinator tells whoever needs one the SHA-256
of every piece, a few holders near by, and a permit that they let in. So a piece is checked when it
comes, whoever sends it, and a holder that lies is known by its first wrong piece. What peers are
to each other ends there: updates go to the coordinator alone.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

from msgspec import Meta, Struct

from protocols.errors import BadMessage
from protocols.messages.envelope import Count, Digest, Name
from protocols.messages.signing import SignedJson

PIECE_BYTES = 1 << 20
#: Smaller versions come from the coordinator alone: asking costs more than it spares.
WORTH_SHARING_BYTES = 1 << 20
#: A permit is good for so long: a download over a slow line ends within it, or asks again.
PERMIT_S = 1800.0
MOST_HOLDERS = 3

PLAN_PATH = "/cw/v1/plans/{digest}"
HELD_PATH = "/cw/v1/plans/{digest}/held"
PERMIT = "x-cw-permit"

#: Where a peer serves: an IP address (IPv6 in brackets) and a port, or empty. What else a peer
#: could write there would be looked up, or break who connects.
Serving = Annotated[
    str,
    Meta(
        max_length=128,
        pattern=r"^((\d{1,3}(\.\d{1,3}){3}|\[[0-9A-Fa-f:.]{2,45}(%[\w.-]{1,32})?\]):\d{1,5})?\Z",
    ),
]

_Hosts = Annotated[tuple[Annotated[str, Meta(max_length=64)], ...], Meta(max_length=16)]


class PlanAsked(Struct, frozen=True, kw_only=True):
    """An agent needs a version, and will serve it to others at `address` (host:port, or empty).

    `networks` are those that it is in (CIDR). `open`: its owner lets it serve other networks too.
    `faulty` are holders that failed it in this download: it is not given them again.
    """

    address: Serving = ""
    networks: _Hosts = ()
    open: bool = False
    faulty: Annotated[tuple[Name, ...], Meta(max_length=256)] = ()


class Holder(Struct, frozen=True, kw_only=True):
    """A peer that has the version, or is fetching it; `node_public` (PEM) is the key to expect."""

    peer: Name
    address: Serving
    node_public: Annotated[bytes, Meta(max_length=1024)]


class Plan(Struct, frozen=True, kw_only=True):
    """How to get a version: `pieces` are SHA-256 digests, one after the other.

    `seed`: take from the coordinator also what no holder is sending.
    """

    digest: Digest
    nbytes: Count
    piece_bytes: Annotated[int, Meta(ge=1)]
    pieces: bytes
    holders: Annotated[tuple[Holder, ...], Meta(max_length=MOST_HOLDERS)] = ()
    permit: bytes = b""
    seed: bool = False


class Held(Struct, frozen=True, kw_only=True):
    """An agent has the version now. By holder: the bytes that came from it, and its bytes a second.

    `faulty`: who sent wrong bytes, or none in time.
    """

    rates: Annotated[dict[Name, float], Meta(max_length=64)] = {}
    faulty: Annotated[tuple[Name, ...], Meta(max_length=256)] = ()


class Permit(Struct, frozen=True, kw_only=True):
    """The coordinator's word that a peer may fetch one version until `until` (Unix s)."""

    peer: Name
    sign_public: Annotated[bytes, Meta(min_length=32, max_length=32)]
    digest: Digest
    until: float


SIGNED_PERMIT = SignedJson(Permit, "permit", "permit")


def read_permit(
    data: bytes, verify: Callable[[bytes, bytes], bool], digest: str, now: float
) -> Permit:
    """The permit in `data`, if it is good for this version now. Raises BadMessage."""
    permit = SIGNED_PERMIT.unpack(data, verify)
    if permit.digest != digest or now > permit.until:
        raise BadMessage("the permit is for another version, or has ended")
    return permit


def count(nbytes: int, piece_bytes: int = PIECE_BYTES) -> int:
    """How many pieces so many bytes have."""
    return -(-nbytes // piece_bytes)


def piece_list(pieces: Iterable[bytes]) -> bytes:
    """What stands in `Plan.pieces`, for a version's pieces in order."""
    return b"".join(hashlib.sha256(piece).digest() for piece in pieces)


def check_plan(plan: Plan, digest: str, nbytes: int) -> None:
    """Raise BadMessage unless the plan is for this version and its numbers fit each other."""
    if plan.digest != digest or plan.nbytes != nbytes:
        raise BadMessage("the plan is for another version")
    if len(plan.pieces) != 32 * count(nbytes, plan.piece_bytes):
        raise BadMessage("the plan's list of pieces has a wrong length")


def host_of(address: str) -> str:
    """The host in host:port, without the brackets of IPv6."""
    return address.rpartition(":")[0].strip("[]")


def address_of(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def in_networks(host: str, networks: Sequence[str]) -> bool:
    """True if the host, an IP address, lies in one of these networks (CIDR)."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    for network in networks:
        try:
            if address in ipaddress.ip_network(network, strict=False):
                return True
        except ValueError:
            continue
    return False
