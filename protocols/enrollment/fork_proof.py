"""The portable proof that a coordinator showed two versions, checked with the CA alone. Pure.

A proof holds what the coordinator signed and what links it. It shows one of these:

- two heads of one epoch that no log can have: the second log has another hash where the first ends;
- two heads with one number and two hashes of the ledger's last entry;
- a head of an epoch that was signed long after a head of a newer epoch: the log that was replaced
  by a backup is still shown;
- a log that was restored from a backup and differs before the place of the restore;
- one log with two versions of one number in one run, without a note that the first was taken back.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from protocols.enrollment import ca_chain, certificates, fleet_card, identity
from protocols.enrollment.fleet_card import MAX_CARD_BYTES
from protocols.enrollment.joining import Chain
from protocols.errors import BadMessage
from protocols.messages import decoding
from protocols.messages.envelope import Id
from protocols.messages.version_log import (
    MAX_ENTRY_BYTES,
    MAX_HEAD_BYTES,
    SIGNED_HEAD,
    START,
    Hash,
    LogHead,
    chain_all,
    decode_entry,
    first_repeated,
)

MAX_PROOF_BYTES, MAX_PROOF_ENTRIES = 16 << 20, 65_536
#: How far the clocks of a coordinator and of its restored successor may differ.
MAX_CLOCK_SKEW_S = 600.0
_Head = Annotated[bytes, Meta(max_length=MAX_HEAD_BYTES)]


class ForkProof(Struct, frozen=True, kw_only=True):
    """`second` is a head, and `entries` those before it, after a log whose hash is `before`.

    `first`: the head that contradicts it; empty if the entries do. `cards`: the fleet cards with
    the keys that signed the heads. `transitions`: of the fleet's CA (`ca_chain`).
    """

    fleet: Id
    transitions: Chain = ()
    cards: Annotated[
        tuple[Annotated[bytes, Meta(max_length=MAX_CARD_BYTES)], ...], Meta(max_length=4)
    ]
    first: _Head = b""
    second: _Head
    before: Hash = START
    entries: Annotated[
        tuple[Annotated[bytes, Meta(max_length=MAX_ENTRY_BYTES)], ...],
        Meta(max_length=MAX_PROOF_ENTRIES),
    ] = ()

    @property
    def id(self) -> str:
        """Names the proof: 16 hexadecimal digits."""
        return hashlib.sha256(self.first + b"\n" + self.second).hexdigest()[:16]


class SeenLog(Struct, frozen=True, kw_only=True):
    """Signed heads that a peer has seen, for an audit: the other fields are as in `ForkProof`."""

    fleet: Id
    transitions: Chain = ()
    peer: Id
    cards: Annotated[
        tuple[Annotated[bytes, Meta(max_length=MAX_CARD_BYTES)], ...], Meta(max_length=4)
    ]
    heads: Annotated[tuple[_Head, ...], Meta(max_length=65_536)]


encode = msgspec.json.Encoder().encode
_seen = msgspec.json.Decoder(SeenLog)
_decoder = msgspec.json.Decoder(ForkProof)


def open_seen(ca_pem: bytes, data: bytes) -> tuple[str, list[tuple[bytes, LogHead]]]:
    """The peer of a file of seen heads, and the heads with their signed bytes. Raises BadMessage
    unless the coordinator of this CA's fleet signed all of them."""
    seen = decoding.decode(_seen, data, "file of seen heads")
    return seen.peer, _signed_heads(ca_pem, seen, seen.heads)


def decode(data: bytes) -> ForkProof:
    """The proof, not verified. Raises BadMessage."""
    if len(data) > MAX_PROOF_BYTES:
        raise BadMessage(f"a proof of {len(data)} bytes; the limit is {MAX_PROOF_BYTES}")
    return decoding.decode(_decoder, data, "proof")


def heads(ca_pem: bytes, proof: ForkProof) -> list[LogHead]:
    """The signed heads of a proof. Raises BadMessage unless this CA's coordinator signed them."""
    signed = tuple(filter(None, (proof.first, proof.second)))
    return [head for _, head in _signed_heads(ca_pem, proof, signed)]


def _signed_heads(
    ca_pem: bytes, file: ForkProof | SeenLog, signed: tuple[bytes, ...]
) -> list[tuple[bytes, LogHead]]:
    fleet, cas = _trusted(ca_pem, file.transitions)
    if file.fleet != fleet:
        raise BadMessage(f"the file is about fleet {file.fleet}, not about this CA's, {fleet}")
    keys = [_key_of(card, cas, fleet) for card in file.cards]

    def is_signed(signature: bytes, text: bytes) -> bool:
        return any(identity.verify(key, signature, text) for key in keys)

    found = [(one, SIGNED_HEAD.unpack(one, is_signed)) for one in signed]
    if not found or any(head.fleet != fleet for _, head in found):
        raise BadMessage("the file has no head, or one of another fleet")
    return found


def _trusted(ca_pem: bytes, transitions: Chain) -> tuple[str, list[bytes]]:
    """The fleet of a CA, and the CAs that are trusted with it: itself and later ones."""
    if not transitions:
        return certificates.fleet_id(ca_pem), [ca_pem]
    steps = ca_chain.read_chain(transitions)
    cas = [steps[0].old_ca, *(step.new_ca for step in steps)]
    if ca_pem not in cas:
        raise BadMessage("the file is about a fleet of another CA")
    return steps[0].fleet, cas[cas.index(ca_pem) :]


def _key_of(card: bytes, cas: list[bytes], fleet: str) -> bytes:
    """The coordinator's key on a card that one of these CAs has signed. Raises BadMessage."""
    for ca_pem in cas[1:]:
        with contextlib.suppress(BadMessage):
            return fleet_card.verify_card(ca_pem, card, fleet=fleet).coordinator_public
    return fleet_card.verify_card(cas[0], card, fleet=fleet).coordinator_public


def check(ca_pem: bytes, proof: ForkProof) -> str:
    """What the proof shows, as a sentence. Raises BadMessage if it shows nothing."""
    found = heads(ca_pem, proof)
    second, name = found[-1], f"the coordinator of fleet {proof.fleet}"
    start = second.size - len(proof.entries)
    hashes = [proof.before, *chain_all(proof.before, start, proof.entries)] if start >= 0 else []
    is_linked = bool(hashes) and hashes[-1] == second.hash
    if not proof.first:
        repeated = first_repeated([decode_entry(one) for one in proof.entries])
        if not is_linked or repeated is None:
            raise BadMessage("the entries of the proof are not of one log, or contradict nothing")
        entry = decode_entry(proof.entries[repeated])
        return f"{name} logged two versions {entry.number} of run {entry.run}"
    first = found[0]
    differs = is_linked and start == first.size and proof.before != first.hash
    times = f"signed at {_date(first.at)} and at {_date(second.at)}"
    if first.epoch < second.epoch and first.at > second.at + MAX_CLOCK_SKEW_S:
        return f"{name} shows its old log beside the one that was restored: {times}"
    if first.epoch < second.epoch and differs and _is_restored(proof, first.epoch):
        return f"{name} changed entries from before the backup that it restored: {times}"
    if first.epoch != second.epoch:
        raise BadMessage("the two heads are of different epochs, and the older came first")
    if differs:
        return f"{name} has two logs that differ in the first {first.size} entries: {times}"
    if first.ledger == second.ledger and first.ledger_hash != second.ledger_hash:
        return f"{name} has two ledgers with different entries {first.ledger}: {times}"
    raise BadMessage("the two heads can be of one log")


def _is_restored(proof: ForkProof, epoch: int) -> bool:
    """Whether all newer epochs than this one begin in the entries of the proof."""
    entries = [decode_entry(one) for one in proof.entries]
    return any(one.kind == "restore" and one.number > epoch for one in entries)


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at)) + " UTC"
