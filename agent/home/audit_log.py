"""What has left this machine in its work, for its owner: a line of JSON for each answer.

Statistics stand in it word for word; of weights, which the owner can make again, size and digest.
docs/what-leaves.md says what leaves besides (state, telemetry, the log's last lines on request).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from protocols.local.atomic_files import fsync_folder
from protocols.messages.envelope import Metrics
from protocols.messages.jobs import Answer, Scatter, Unit
from protocols.messages.work import UpdateClaim

FILE = "left.jsonl"
MAX_BYTES = 4 << 20

EntryKind = Literal["description", "first weights", "weights", "evaluation", "answer"]
_KINDS: dict[str, EntryKind] = {
    "describe": "description",
    "init": "first weights",
    "train": "weights",
    "evaluate": "evaluation",
}


class AuditEntry(Struct, frozen=True, kw_only=True):
    """One answer. `told` is a description as JSON; `digest` and `nbytes` are those of the bytes;
    `tallies`, what an evaluation adds up over peers."""

    at: float
    run: str
    task: str
    round: int
    what: EntryKind
    digest: str = ""
    nbytes: int = 0
    codec: str = ""
    num_examples: int = 0
    metrics: Metrics = {}
    tallies: dict[str, list[float]] = {}
    told: str = ""


def write_update(home: Path, claim: UpdateClaim, task: str, description: bytes) -> None:
    """Add an answer to the ledger, fsynced; call it before any part of the answer is sent.

    Raises OSError: an answer that cannot be noted must not be sent.
    """
    what = _KINDS.get(claim.kind)
    if what is None:
        return
    entry = AuditEntry(
        at=time.time(),
        run=claim.run,
        task=task,
        round=claim.round,
        what=what,
        digest=claim.digest,
        nbytes=claim.nbytes,
        codec=claim.codec if what == "weights" else "",
        num_examples=claim.num_examples,
        metrics=claim.metrics,
        tallies={name: list(counts) for name, counts in claim.tallies.items()},
        told=description.decode(),
    )
    _append(home, entry)


def write_answer(home: Path, unit: Unit, answer: Answer, body: bytes) -> None:
    """Add the answer to a unit of a job, word for word if it is over rows of this machine's own.

    Raises OSError, as `write` does.
    """
    spread = isinstance(unit.question, Scatter)
    entry = AuditEntry(
        at=time.time(),
        run=unit.job,
        task=unit.task,
        round=unit.unit,
        what="answer",
        digest=answer.digest,
        nbytes=answer.nbytes,
        num_examples=answer.rows,
        told="" if spread else body.decode(errors="replace"),
    )
    _append(home, entry)


def _append(home: Path, entry: AuditEntry) -> None:
    """Append one entry and fsync it, so that a power cut after the sending cannot lose it."""
    path = home / FILE
    if path.exists() and path.stat().st_size > MAX_BYTES:
        path.replace(_rotated_file(home))
    is_new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as file:
        # A line of its own, also after one that a power cut has left without its end.
        file.write(b"\n" + msgspec.json.encode(entry) + b"\n")
        file.flush()
        os.fsync(descriptor)
    if is_new:
        fsync_folder(home)


def read(home: Path) -> list[AuditEntry]:
    """All that is noted, oldest first; a line that is cut off is passed over."""
    found = []
    for path in (_rotated_file(home), home / FILE):
        lines = path.read_bytes().splitlines() if path.exists() else []
        for line in lines:
            try:
                found.append(msgspec.json.decode(line, type=AuditEntry))
            except msgspec.DecodeError:
                continue
    return found


def format_entry(entry: AuditEntry) -> str:
    """One line for a person."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at))
    said = f"{at}  {entry.run}  round {entry.round}  {entry.what}"
    if entry.nbytes:
        said += f", {entry.nbytes:,} bytes {entry.digest[:12]}"
    if entry.codec:
        said += f" as {entry.codec}"
    if entry.num_examples:
        said += f", {entry.num_examples} examples"
    numbers = {name: value for name, value in entry.metrics.items() if value is not None}
    said += "".join(f", {name} {value:.4g}" for name, value in numbers.items())
    return said + "".join(f", {len(n)} sums of {name}" for name, n in entry.tallies.items())


def _rotated_file(home: Path) -> Path:
    return home / f"1.{FILE}"
