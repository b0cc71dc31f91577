"""Proofs of the versions that this agent holds, signed by the coordinator.

If the coordinator loses its disk, its agents hold the only copies of the shared weights. The signed
work that named a version as its base proves run, round and digest to anybody who has the
coordinator's public key.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

from protocols.enrollment import identity
from protocols.errors import BadMessage
from protocols.local.atomic_files import write_private
from protocols.local.safe_paths import path_in
from protocols.messages.decoding import decode
from protocols.messages.work import SIGNED_WORK, Work
from protocols.model.weights import file_digest
from protocols.p2p.gossip import Head

SUFFIX = ".work.json"
#: Of the work in a proof.
MAX_PROOF_BYTES = 1024 * 1024


class _Proof(Struct, frozen=True, kw_only=True):
    work: Annotated[bytes, Meta(max_length=MAX_PROOF_BYTES)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


_decoder = msgspec.json.Decoder(_Proof)


class ProvenVersion(NamedTuple):
    """A version in the file `path`, and the signed work that proves it.

    `work.base` is its digest. `payload` and `signature` are for `exchange.SIGNED_WORK.open`.
    """

    path: Path
    work: Work
    payload: bytes
    signature: bytes


def save_proof(folder: Path, work: Work, payload: bytes, signature: bytes) -> None:
    """Stores the proof of the work's base; deletes proofs of versions that are gone."""
    proof = path_in(folder, work.base, SUFFIX)
    if proof.exists():
        return
    # Not synced: after a power cut the next work brings a new proof.
    content = msgspec.json.encode(_Proof(work=payload, signature=signature))
    write_private(proof, content, synced=False)
    names = set(os.listdir(folder))
    for name in names:
        if name.endswith(SUFFIX) and _version_name(name) not in names:
            (folder / name).unlink(missing_ok=True)


def read_proof(proof: bytes, coordinator_public: bytes, fleet: str) -> tuple[Work, bytes, bytes]:
    """Returns the work in a proof, its bytes and their signature. Raises BadMessage.

    Work of older coordinators names no fleet.
    """
    parts = decode(_decoder, proof, "proof")
    verify = partial(identity.verify, coordinator_public)
    work = SIGNED_WORK.open(parts.work, parts.signature, verify)
    if work.fleet not in ("", fleet):
        raise BadMessage(f"the proof is of fleet {work.fleet}, and this is fleet {fleet}")
    return work, parts.work, parts.signature


def list_verified(folder: Path, coordinator_public: bytes, fleet: str) -> list[ProvenVersion]:
    """Returns the versions whose bytes and proof are valid, newest file first."""
    verified = []
    for proof in folder.glob(f"*{SUFFIX}"):
        try:
            path = proof.with_name(_version_name(proof.name))
            parts = read_proof(proof.read_bytes(), coordinator_public, fleet)
            version = ProvenVersion(path, *parts)
            base = version.work.base
            if proof.name == f"{base}{SUFFIX}" and file_digest(path) == base:
                verified.append((path.stat().st_mtime, version))
        except (OSError, BadMessage):
            continue  # damaged: another version, or another peer, may be intact
    return [version for _, version in sorted(verified, key=lambda pair: pair[0], reverse=True)]


class VersionIndex:
    """The newest version of a folder, and the proofs in it. Cheap enough for frequent calls.

    Each proof is read once. The bytes of a version are not verified here; its receiver does that.
    """

    def __init__(self, folder: Path, coordinator_public: bytes, fleet: str) -> None:
        self._folder, self._coordinator_public, self._fleet = folder, coordinator_public, fleet
        self._read: dict[str, Head | None] = {}

    def newest(self) -> Head | None:
        """Returns the newest version with a proof, or None."""
        proofs = {proof.name: proof for proof in self._folder.glob(f"*{SUFFIX}")}
        self._read = {
            name: self._read[name] if name in self._read else self._head(proof)
            for name, proof in proofs.items()
        }
        here = [head for head in self._read.values() if head and self.path(head.digest).exists()]
        return max(here, default=None)

    def path(self, digest: str) -> Path:
        """Returns the path of a version; the file may not exist."""
        return path_in(self._folder, digest, ".safetensors")

    def proof(self, digest: str) -> bytes | None:
        """Returns the proof of a version as sent to other peers, or None."""
        try:
            return path_in(self._folder, digest, SUFFIX).read_bytes()
        except OSError:
            return None

    def _head(self, proof: Path) -> Head | None:
        try:
            work, _, _ = read_proof(proof.read_bytes(), self._coordinator_public, self._fleet)
            head = Head.of(work)
        except (OSError, BadMessage):
            return None
        return head if proof.name == f"{head.digest}{SUFFIX}" else None


def _version_name(proof: str) -> str:
    return proof.removesuffix(SUFFIX) + ".safetensors"
