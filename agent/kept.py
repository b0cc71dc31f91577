"""The versions that this agent holds, each with the coordinator's word that it is one.

Should the coordinator lose its disk, what its agents hold is all that is left of the shared
weights. The signed work that named a version as its base proves run, round and digest, years later
and to anybody who has the coordinator's public key.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

from protocols import identity, messages
from protocols.errors import BadMessage
from protocols.messages import Work
from protocols.weights import file_digest

SUFFIX = ".work.json"


class _Proof(Struct, frozen=True, kw_only=True):
    work: bytes
    signature: bytes


class Kept(NamedTuple):
    """A version in the file `path`, and the work that the coordinator signed for it.

    `work.base` is its digest. `payload` and `signature` are for `messages.read_work`.
    """

    path: Path
    work: Work
    payload: bytes
    signature: bytes


def prove(folder: Path, work: Work, payload: bytes, signature: bytes) -> None:
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


def held(folder: Path, coordinator_public: bytes) -> list[Kept]:
    """Versions whose bytes and proof are both good, the one that came last first."""
    found = []
    for proof in folder.glob(f"*{SUFFIX}"):
        try:
            told = msgspec.json.decode(proof.read_bytes(), type=_Proof)
            work = messages.read_work(
                told.work,
                told.signature,
                lambda signature, signed: identity.verify(coordinator_public, signature, signed),
            )
            path = _version(proof)
            if proof.name == f"{work.base}{SUFFIX}" and file_digest(path) == work.base:
                found.append((path.stat().st_mtime, Kept(path, work, told.work, told.signature)))
        except (OSError, msgspec.DecodeError, BadMessage):
            continue  # damaged: the other version, or another peer, may do better
    return [kept for _, kept in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _version(proof: Path) -> Path:
    return proof.with_name(proof.name.removesuffix(SUFFIX) + ".safetensors")
