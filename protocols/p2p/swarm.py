"""How peers download versions from each other: piece digests, plans, tokens. Pure.

A version is split into pieces of `PIECE_BYTES`. An agent that needs it gets a plan from the
coordinator: the SHA-256 of every piece, a few sources near by, and a token that they accept. The
agent checks each piece on arrival, so a source that lies is found at its first wrong piece.
Updates go to the coordinator alone.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Sequence
from typing import Annotated

from msgspec import Meta, Struct, field

from protocols.errors import BadMessage
from protocols.messages.envelope import Count, Digest, Id, PublicKey
from protocols.messages.signing import SignedJson, VerifySignature

PIECE_BYTES = 1 << 20
#: Smaller versions come from the coordinator alone: a plan costs more than it saves.
MIN_SHARED_BYTES = 1 << 20
#: Enough for a download over a slow line; a longer one asks for a new plan.
DOWNLOAD_TOKEN_LIFETIME_S = 1800.0
MAX_SOURCES = 3
#: Of a version: 1 TiB in pieces of `PIECE_BYTES`.
MAX_PIECES = 1 << 20

PLAN_PATH = "/cw/v1/plans/{digest}"
DOWNLOAD_REPORT_PATH = "/cw/v1/plans/{digest}/held"
DOWNLOAD_TOKEN_HEADER = "x-cw-permit"

#: Where a peer serves: an IP address (IPv6 in brackets) and a port, or empty. A host name is
#: refused: other peers would look it up.
PeerAddress = Annotated[
    str,
    Meta(
        max_length=128,
        pattern=r"^((\d{1,3}(\.\d{1,3}){3}|\[[0-9A-Fa-f:.]{2,45}(%[\w.-]{1,32})?\]):\d{1,5})?\Z",
    ),
]

#: The newest format of request signatures that a peer uses and reads (`signed_requests.FORMAT`).
SignatureFormat = Annotated[int, Meta(ge=1, le=1000)]

#: A speed that a peer reports of another: at most 1 TB/s.
BytesPerSecond = Annotated[float, Meta(ge=0, le=1e12)]

_Hosts = Annotated[tuple[Annotated[str, Meta(max_length=64)], ...], Meta(max_length=16)]


class DownloadPlanRequest(Struct, frozen=True, kw_only=True):
    """An agent needs a version, and will serve it to others at `address` (host:port, or empty).

    `networks` are its own (CIDR); with `serves_other_networks` its owner lets it serve others too.
    `faulty` sources failed in this download, and are not named again.
    """

    address: PeerAddress = ""
    networks: _Hosts = ()
    serves_other_networks: bool = field(default=False, name="open")
    faulty: Annotated[tuple[Id, ...], Meta(max_length=256)] = ()


class PieceSource(Struct, frozen=True, kw_only=True):
    """A peer that has the version or is downloading it; `node_public` (PEM) is its expected key."""

    peer: Id
    address: PeerAddress
    node_public: Annotated[bytes, Meta(max_length=1024)]
    signs: SignatureFormat = 1


class DownloadPlan(Struct, frozen=True, kw_only=True):
    """How to download a version. `pieces` is the concatenation of the pieces' SHA-256 digests.

    `use_coordinator`: also fetch pieces from the coordinator that no source is sending.
    """

    digest: Digest
    nbytes: Count
    piece_bytes: Annotated[int, Meta(ge=1, le=16 * PIECE_BYTES)]
    pieces: Annotated[bytes, Meta(max_length=32 * MAX_PIECES)]
    sources: Annotated[tuple[PieceSource, ...], Meta(max_length=MAX_SOURCES)] = field(
        default=(), name="holders"
    )
    token: Annotated[bytes, Meta(max_length=4096)] = field(default=b"", name="permit")
    use_coordinator: bool = field(default=False, name="seed")


class DownloadReport(Struct, frozen=True, kw_only=True):
    """An agent has the version now. `rates`: bytes per second by source.

    `faulty` sources sent wrong bytes, or none in time.
    """

    rates: Annotated[dict[Id, BytesPerSecond], Meta(max_length=64)] = {}
    faulty: Annotated[tuple[Id, ...], Meta(max_length=256)] = ()


class DownloadToken(Struct, frozen=True, kw_only=True):
    """The coordinator lets a peer download one version until `until` (Unix s)."""

    peer: Id
    sign_public: PublicKey
    digest: Digest
    until: float
    signs: SignatureFormat = 1


SIGNED_DOWNLOAD_TOKEN = SignedJson(DownloadToken, "permit", "download token")


def verify_download_token(
    data: bytes, verify: VerifySignature, digest: str, now: float
) -> DownloadToken:
    """The token in `data`, if it is valid for this version now. Raises BadMessage."""
    token = SIGNED_DOWNLOAD_TOKEN.unpack(data, verify)
    if token.digest != digest or now > token.until:
        raise BadMessage("the download token is for another version, or has expired")
    return token


def num_pieces(nbytes: int, piece_bytes: int = PIECE_BYTES) -> int:
    """The number of pieces in a version of `nbytes`."""
    return -(-nbytes // piece_bytes)


def max_plan_bytes(nbytes: int) -> int:
    """The size of a plan for a version of `nbytes` as JSON at most: 32 bytes a piece, as base64."""
    return 64 * 1024 + 44 * num_pieces(nbytes)


def piece_digests(pieces: Iterable[bytes]) -> bytes:
    """The value of `DownloadPlan.pieces`, from a version's pieces in order."""
    return b"".join(hashlib.sha256(piece).digest() for piece in pieces)


def check_plan(plan: DownloadPlan, digest: str, nbytes: int) -> None:
    """Raise BadMessage unless the plan is for this version and its numbers are consistent."""
    if plan.digest != digest or plan.nbytes != nbytes:
        raise BadMessage("the plan is for another version")
    if len(plan.pieces) != 32 * num_pieces(nbytes, plan.piece_bytes):
        raise BadMessage("the plan has a wrong number of piece digests")


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
