"""The versions that this agent holds, each with the coordinator's word that it is one.

Should the coordinator lose its disk, what its agents hold is all that is left of the shared
weights. The signed work that named a version as its base proves run, round and digest, years later
and to anybody who has the coordinator's public key.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

from protocols.enrollment import identity
from protocols.errors import BadMessage
from protocols.messages.work import SIGNED_WORK, Work
from protocols.model.weights import file_digest
from protocols.p2p.gossip import Head

SUFFIX = ".work.json"


class _Proof(Struct, frozen=True, kw_only=True):
    work: bytes
    signature: bytes


class ProvenVersion(NamedTuple):
    """A version in the file `path`, and the work that the coordinator signed for it.

    `work.base` is its digest. `payload` and `signature` are for `exchange.SIGNED_WORK.open`.
    """

    path: Path
    work: Work
    payload: bytes
    signature: bytes


def save_proof(folder: Path, work: Work, payload: bytes, signature: bytes) -> None:
    """Keep what proves the version that this work is on; drop the proofs of versions that went."""
    proof = folder / f"{work.base}{SUFFIX}"
    if proof.exists():
        return
    # No sync: a power cut may cost the proof of the newest version, and the next work brings one.
    written = proof.with_suffix(".tmp")
    written.write_bytes(msgspec.json.encode(_Proof(work=payload, signature=signature)))
    written.replace(proof)
    for other in folder.glob(f"*{SUFFIX}"):
        if not _version(other).exists():
            other.unlink(missing_ok=True)


def read_proof(proof: bytes, coordinator_public: bytes) -> tuple[Work, bytes, bytes]:
    """The work in a proof's file, and its bytes with their signature. Raises BadMessage."""
    try:
        told = msgspec.json.decode(proof, type=_Proof)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadMessage(f"not a proof: {err}") from err
    work = SIGNED_WORK.open(
        told.work,
        told.signature,
        partial(identity.verify, coordinator_public),
    )
    return work, told.work, told.signature


def list_verified(folder: Path, coordinator_public: bytes) -> list[ProvenVersion]:
    """Versions whose bytes and proof are both good, the one that came last first."""
    found = []
    for proof in folder.glob(f"*{SUFFIX}"):
        try:
            path = _version(proof)
            kept = ProvenVersion(path, *read_proof(proof.read_bytes(), coordinator_public))
            if proof.name == f"{kept.work.base}{SUFFIX}" and file_digest(path) == kept.work.base:
                found.append((path.stat().st_mtime, kept))
        except (OSError, BadMessage):
            continue  # damaged: the other version, or another peer, may do better
    return [kept for _, kept in sorted(found, key=lambda pair: pair[0], reverse=True)]


class VersionIndex:
    """The newest version of a folder, and the proofs in it; cheap enough to ask all the time.

    What a proof says is looked at once, and the version's bytes not at all: who fetches them does.
    """

    def __init__(self, folder: Path, coordinator_public: bytes) -> None:
        self._folder, self._coordinator_public = folder, coordinator_public
        self._read: dict[str, Head | None] = {}

    def newest(self) -> Head | None:
        """None while no version here is proven."""
        proofs = {proof.name: proof for proof in self._folder.glob(f"*{SUFFIX}")}
        self._read = {
            name: self._read[name] if name in self._read else self._head(proof)
            for name, proof in proofs.items()
        }
        here = [head for head in self._read.values() if head and self.path(head.digest).exists()]
        return max(here, default=None)

    def path(self, digest: str) -> Path:
        """Where the version of this digest lies, or would."""
        return self._folder / f"{digest}.safetensors"

    def proof(self, digest: str) -> bytes | None:
        """The proof of a version, as it travels to other peers."""
        try:
            return (self._folder / f"{digest}{SUFFIX}").read_bytes()
        except OSError:
            return None

    def _head(self, proof: Path) -> Head | None:
        try:
            work, _, _ = read_proof(proof.read_bytes(), self._coordinator_public)
            head = Head.of(work)
        except (OSError, BadMessage):
            return None
        return head if proof.name == f"{head.digest}{SUFFIX}" else None


def _version(proof: Path) -> Path:
    return proof.with_name(proof.name.removesuffix(SUFFIX) + ".safetensors")
