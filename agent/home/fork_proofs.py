"""Proofs that the coordinator showed two versions, as files in the agent's home.

While one is not acknowledged by the owner, the agent takes no work.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from protocols.enrollment import fork_proof
from protocols.enrollment.fork_proof import ForkProof
from protocols.local.atomic_files import write_private
from protocols.local.safe_paths import path_in

FOLDER = "proofs"
_OPEN, _ACKNOWLEDGED = ".proof.json", ".acknowledged.json"
#: A coordinator must not be able to fill the disk with proofs.
MAX_PROOFS = 64


def save(home: Path, proof: ForkProof) -> Path:
    """Store a proof; the path of its file. Raises OSError."""
    path = path_of(home, proof)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if not path.exists():
        for old in all_files(home)[: -MAX_PROOFS + 1]:
            old.unlink()
        write_private(path, fork_proof.encode(proof))
    return path


def path_of(home: Path, proof: ForkProof) -> Path:
    """Where a proof is stored."""
    return path_in(home / FOLDER, proof.id, _OPEN)


def not_acknowledged(home: Path) -> list[Path]:
    """The files of proofs that the owner has not acknowledged."""
    try:
        names = os.listdir(os.path.join(home, FOLDER))  # called for each work: no glob, no new Path
    except FileNotFoundError:
        return []
    return sorted(home / FOLDER / name for name in names if name.endswith(_OPEN))


def all_files(home: Path) -> list[Path]:
    """All proofs, oldest first."""
    return sorted((home / FOLDER).glob("*.json"), key=lambda path: path.stat().st_mtime)


def acknowledge(home: Path) -> list[Path]:
    """Mark all proofs as acknowledged now; their new paths. Raises OSError."""
    done = []
    for path in not_acknowledged(home):
        new = path.with_name(path.name.removesuffix(_OPEN) + _ACKNOWLEDGED)
        path.replace(new)
        new.touch()
        done.append(new)
    return done


def acknowledged_at(home: Path) -> float:
    """When the owner acknowledged a proof last (Unix s); 0 for never."""
    times = [path.stat().st_mtime for path in (home / FOLDER).glob(f"*{_ACKNOWLEDGED}")]
    return min(max(times, default=0.0), time.time())
