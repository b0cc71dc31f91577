"""How peers exchange state while the coordinator is away: access tokens, neighbors, gossip. Pure.

While the coordinator is there, it gives each peer an access token and names some neighbors. While
it is away, peers exchange gossip entries: the state of a peer, the version it holds, and where it
serves. Any peer may forward an entry, because the peer it is about has signed it and its
certificate is signed by the fleet's CA. Only the coordinator's signature proves that a version is
genuine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct, field

from protocols.enrollment import identity
from protocols.enrollment.ca_chain import CaTrust
from protocols.enrollment.certificates import NodeCertificate
from protocols.errors import BadMessage
from protocols.messages.decoding import decode
from protocols.messages.envelope import (
    Count,
    Digest,
    Id,
    Name,
    Presence,
    PublicKey,
    Sign,
)
from protocols.messages.signing import SignedJson, VerifySignature
from protocols.messages.version_log import MAX_SEEN_BYTES
from protocols.messages.work import Work
from protocols.p2p.seen_heads import MAX_GOSSIP_PROOF_BYTES
from protocols.p2p.swarm import PeerAddress, SignatureFormat

NEIGHBORS_PATH = "/cw/v1/neighbours"
GOSSIP_PATH = "/cw/v1/words"
PROOF_PATH = "/cw/v1/proofs/{digest}"
ACCESS_TOKEN_HEADER = "x-cw-pass"

#: Long enough for an absence of the coordinator, which renews tokens all the time otherwise.
ACCESS_TOKEN_LIFETIME_S = 7 * 86400.0
MAX_NEIGHBORS = 16
#: Of a `NeighborsResponse`: the neighbors, and the ids of removed peers.
MAX_NEIGHBORS_BYTES = 1 << 20
#: Entries that a store keeps and a batch holds, and the size of each.
MAX_ENTRIES, MAX_ENTRY_BYTES = 256, 8 * 1024
MAX_BATCH_BYTES = 1 << 20
#: At most this much MessagePack adds to an entry, and to the whole batch.
_FRAME_BYTES = 16
#: An entry may be dated this far ahead.
_MAX_CLOCK_SKEW_S = 600.0


class Head(Struct, frozen=True, kw_only=True, order=True):
    """The newest version that a peer holds, of the run that began at `since` (Unix s).

    Heads sort by age: a version of a later run is newer.
    """

    since: float
    run: Id
    version: Count
    digest: Digest

    @classmethod
    def of(cls, work: Work) -> Head:
        """The version that this signed work proves."""
        return cls(since=work.since, run=work.run, version=version_number(work), digest=work.base)


def version_number(work: Work) -> int:
    """The version that work starts from: 4 to train in round 5, and 5 to evaluate round 5."""
    return max(0, work.round - (work.kind == "train"))


class GossipEntry(Struct, frozen=True, kw_only=True):
    """The state of a peer `at` a time by its own clock (Unix s); `address` if it serves others.

    `seen`: its statement about the coordinator's log of versions (`seen_heads`). `proof`: that the
    coordinator showed two versions (`fork_proof`).
    """

    peer: Id
    at: Annotated[float, Meta(ge=0, le=2**40)]
    presence: Presence
    head: Head | None = None
    address: PeerAddress = ""
    signs: SignatureFormat = 1
    seen: Annotated[bytes, Meta(max_length=MAX_SEEN_BYTES)] = b""
    proof: Annotated[bytes, Meta(max_length=MAX_GOSSIP_PROOF_BYTES)] = b""


class _SignedEntry(Struct, frozen=True, kw_only=True):
    certificate: Annotated[bytes, Meta(max_length=4096)]
    entry: Annotated[bytes, Meta(max_length=MAX_ENTRY_BYTES)] = field(name="word")
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


_signed_entry = msgspec.msgpack.Decoder(_SignedEntry)


class VerifiedEntry(NamedTuple):
    """An entry, the certificate of the peer that signed it, and its signed bytes to forward."""

    entry: GossipEntry
    sender: NodeCertificate
    signed: bytes


class GossipBatch(Struct, frozen=True, kw_only=True):
    """Entries that travel together, each as made by `sign_entry`."""

    entries: Annotated[
        tuple[Annotated[bytes, Meta(max_length=2 * MAX_ENTRY_BYTES)], ...],
        Meta(max_length=MAX_ENTRIES),
    ] = field(default=(), name="words")


class Neighbor(Struct, frozen=True, kw_only=True):
    """A peer to exchange gossip with, at host:port; `node_public` (PEM) is the key to expect."""

    peer: Id
    name: Name
    address: PeerAddress
    node_public: Annotated[bytes, Meta(max_length=1024)]
    signs: SignatureFormat = 1


class NeighborsResponse(Struct, frozen=True, kw_only=True):
    """What an agent needs while the coordinator is away.

    Access tokens of peers in `removed` are no longer valid.
    """

    access_token: Annotated[bytes, Meta(max_length=4096)] = field(name="pass_")
    neighbors: Annotated[tuple[Neighbor, ...], Meta(max_length=4096)] = field(
        default=(), name="near"
    )
    removed: Annotated[tuple[Id, ...], Meta(max_length=4096)] = ()


class AccessToken(Struct, frozen=True, kw_only=True):
    """The coordinator lets the holder of this key ask peers, until `until` (Unix s).

    `gossip_only`: a monitor may read gossip, and gets no version.
    """

    holder: Id
    sign_public: PublicKey
    until: float
    gossip_only: bool = field(default=False, name="words_only")
    signs: SignatureFormat = 1


SIGNED_ACCESS_TOKEN = SignedJson(AccessToken, "pass", "access token")
_SIGNED_JSON_ENTRY = SignedJson(GossipEntry, "word", "gossip entry")


def verify_access_token(data: bytes, verify: VerifySignature, now: float) -> AccessToken:
    """The token in `data`, if it is valid now. Raises BadMessage."""
    token = SIGNED_ACCESS_TOKEN.unpack(data, verify)
    if now > token.until:
        raise BadMessage("the access token has expired")
    return token


def sign_entry(entry: GossipEntry, certificate: bytes, sign: Sign) -> bytes:
    """The entry as it travels. `certificate` and `sign` belong to the peer that it is about."""
    body, signature = _SIGNED_JSON_ENTRY.seal(entry, sign)
    return msgspec.msgpack.encode(
        _SignedEntry(certificate=certificate, entry=body, signature=signature)
    )


def verify_entry(signed: bytes, cas: CaTrust, fleet: str, now: float) -> VerifiedEntry:
    """The entry in `signed`, if an enrolled peer of this fleet signed it. Raises BadMessage."""
    parts = decode(_signed_entry, signed, "gossip entry")
    entry = _SIGNED_JSON_ENTRY.decode(parts.entry)
    sender = cas.verify_certificate(parts.certificate, now)
    own_id = identity.peer_id(sender.sign_public)
    if (sender.fleet, sender.peer, own_id) != (fleet, entry.peer, entry.peer) or (
        sender.not_after < now
    ):
        raise BadMessage("the certificate of the entry is of another fleet or peer, or has expired")
    message = _SIGNED_JSON_ENTRY.signed_bytes(parts.entry)
    if not identity.verify(sender.sign_public, parts.signature, message):
        raise BadMessage(f"the gossip entry is not signed by {entry.peer}")
    if entry.at > now + _MAX_CLOCK_SKEW_S:
        raise BadMessage("the time of the gossip entry lies in the future")
    return VerifiedEntry(entry, sender, signed)


class GossipStore:
    """The newest entry of each peer, at most `MAX_ENTRIES`."""

    def __init__(self, cas: CaTrust, fleet: str) -> None:
        self._cas, self._fleet = cas, fleet
        self._newest: dict[str, VerifiedEntry] = {}

    def add(
        self, signed: Iterable[bytes], now: float, excluded: Iterable[str] = ()
    ) -> list[VerifiedEntry]:
        """Store the entries that are valid and newer, except those about `excluded` peers.

        Returns those that were stored.
        """
        added, excluded = [], set(excluded)
        known = {stored.signed for stored in self._newest.values()}
        for data in signed:
            if data in known:
                continue
            try:
                new = verify_entry(data, self._cas, self._fleet, now)
            except BadMessage:
                continue  # the peer that forwarded it may not have checked it
            peer = new.entry.peer
            old = self._newest.get(peer)
            if peer not in excluded and (old is None or old.entry.at < new.entry.at):
                self._newest[peer] = new
                added.append(new)
        while len(self._newest) > MAX_ENTRIES:
            del self._newest[min(self._newest, key=lambda peer: self._newest[peer].entry.at)]
        return added

    def newest_first(self) -> list[VerifiedEntry]:
        """The newest entry of every peer, sorted by time."""
        return sorted(self._newest.values(), key=lambda stored: -stored.entry.at)

    def batch(self, own: bytes) -> GossipBatch:
        """What to send to others: one's `own` entry, and the newest others that fit."""
        entries, room = [own], MAX_BATCH_BYTES - len(own) - _FRAME_BYTES
        for stored in self.newest_first()[: MAX_ENTRIES - 1]:
            room -= len(stored.signed) + _FRAME_BYTES
            if room < 0:
                break
            entries.append(stored.signed)
        return GossipBatch(entries=tuple(entries))

    def remove(self, peers: Iterable[str]) -> None:
        """Drop the entries of peers that were removed from the fleet."""
        for peer in peers:
            self._newest.pop(peer, None)
