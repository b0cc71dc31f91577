"""A peer's signed statement that it has seen a head of the coordinator's log of versions. Pure.

It travels with the peer's certificate, so that any peer that has the CA can check it, whoever
passes it on. The coordinator keeps statements as countersignatures of its ledger.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

from protocols.enrollment import identity
from protocols.enrollment.ca_chain import CaTrust
from protocols.enrollment.certificates import NodeCertificate
from protocols.errors import BadMessage
from protocols.messages import decoding
from protocols.messages.envelope import Id, Sign
from protocols.messages.signing import SIGNATURE_BYTES, SignedJson
from protocols.messages.version_log import MAX_HEAD_BYTES, Time

#: Of a proof that travels by gossip or MQTT.
MAX_GOSSIP_PROOF_BYTES = 2560
MAX_CLOCK_SKEW_S = 600.0


class SeenHead(Struct, frozen=True, array_like=True):
    """`peer` has seen this signed `head`, `at` a time by its own clock (Unix s)."""

    peer: Id
    at: Time
    head: Annotated[bytes, Meta(max_length=MAX_HEAD_BYTES)]


class _Certified(Struct, frozen=True, array_like=True):
    certificate: Annotated[bytes, Meta(max_length=4096)]
    statement: Annotated[bytes, Meta(max_length=1024)]


class VerifiedSeen(NamedTuple):
    """A statement, the certificate of the peer that made it, and its bytes to pass on."""

    seen: SeenHead
    sender: NodeCertificate
    data: bytes


SIGNED_SEEN = SignedJson(SeenHead, "seen head", "statement about a head", "the peer that it names")
_decoder = msgspec.msgpack.Decoder(_Certified)


def sign(seen: SeenHead, certificate: bytes, signer: Sign) -> bytes:
    """The statement as it travels. `certificate` and `signer` are the peer's own."""
    statement = SIGNED_SEEN.pack(seen, signer)
    return msgspec.msgpack.encode(_Certified(certificate, statement))


def verify(data: bytes, cas: CaTrust, fleet: str, now: float) -> VerifiedSeen:
    """The statement in `data`, if an enrolled peer of this fleet made it. Raises BadMessage."""
    parts = _decode(data)
    sender = cas.verify_certificate(parts.certificate, now)
    if sender.fleet != fleet or sender.not_after < now:
        raise BadMessage("the certificate of the statement is of another fleet, or has expired")
    # The CA's own word is not enough: an owner pins a peer by the id of its key.
    if identity.peer_id(sender.sign_public) != sender.peer:
        raise BadMessage("the certificate of the statement names a peer of another key")
    seen = read(data, sender.peer, sender.sign_public)
    if seen.at > now + MAX_CLOCK_SKEW_S:
        raise BadMessage("the statement is of the future")
    return VerifiedSeen(seen, sender, data)


def peek(data: bytes) -> SeenHead:
    """The statement in `data`, without a check of its signature. Raises BadMessage."""
    return SIGNED_SEEN.decode(_decode(data).statement[SIGNATURE_BYTES:])


def read(data: bytes, peer: str, public: bytes) -> SeenHead:
    """The statement in `data`, if the key of this peer signed it. Raises BadMessage."""
    seen = SIGNED_SEEN.unpack(_decode(data).statement, partial(identity.verify, public))
    if seen.peer != peer:
        raise BadMessage("the statement is of another peer")
    return seen


def _decode(data: bytes) -> _Certified:
    return decoding.decode(_decoder, data, "statement")
