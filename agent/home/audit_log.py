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

from protocols.local.atomic_files import sync_folder
from protocols.messages.envelope import Metrics
from protocols.messages.jobs import Answer, Scatter, Unit
from protocols.messages.work import UpdateClaim

FILE = "left.jsonl"
MOST_BYTES = 4 << 20

What = Literal["description", "first weights", "weights", "evaluation", "answer"]
_WHAT: dict[str, What] = {
    "describe": "description",
    "init": "first weights",
    "train": "weights",
    "evaluate": "evaluation",
}


class Departure(Struct, frozen=True, kw_only=True):
    """One answer. `told` is a description as JSON; `digest` and `nbytes` are those of the bytes;
    `tallies`, what an evaluation adds up over peers."""

    at: float
    run: str
    task: str
    round: int
    what: What
    digest: str = ""
    nbytes: int = 0
    codec: str = ""
    num_examples: int = 0
    metrics: Metrics = {}
    tallies: dict[str, list[float]] = {}
    told: str = ""


def write(home: Path, claim: UpdateClaim, task: str, told: bytes) -> None:
    """Add an answer to the ledger, fsynced; call it before any part of the answer is sent.

    Raises OSError: an answer that cannot be noted must not be sent.
    """
    what = _WHAT.get(claim.kind)
    if what is None:
        return
    departure = Departure(
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
        told=told.decode(),
    )
    _add(home, departure)


def write_answer(home: Path, unit: Unit, answer: Answer, body: bytes) -> None:
    """Add the answer to a unit of a job, word for word if it is over rows of this machine's own.

    Raises OSError, as `write` does.
    """
    spread = isinstance(unit.question, Scatter)
    departure = Departure(
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
    _add(home, departure)


def _add(home: Path, departure: Departure) -> None:
    """Append one entry and fsync it, so that a power cut after the sending cannot lose it."""
    path = home / FILE
    if path.exists() and path.stat().st_size > MOST_BYTES:
        path.replace(_older(home))
    is_new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as file:
        # A line of its own, also after one that a power cut has left without its end.
        file.write(b"\n" + msgspec.json.encode(departure) + b"\n")
        file.flush()
        os.fsync(descriptor)
    if is_new:
        sync_folder(home)


def read(home: Path) -> list[Departure]:
    """All that is noted, oldest first; a line that is cut off is passed over."""
    found = []
    for path in (_older(home), home / FILE):
        lines = path.read_bytes().splitlines() if path.exists() else []
        for line in lines:
            try:
                found.append(msgspec.json.decode(line, type=Departure))
            except msgspec.DecodeError:
                continue
    return found


def in_words(departure: Departure) -> str:
    """One line for a person."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(departure.at))
    said = f"{at}  {departure.run}  round {departure.round}  {departure.what}"
    if departure.nbytes:
        said += f", {departure.nbytes:,} bytes {departure.digest[:12]}"
    if departure.codec:
        said += f" as {departure.codec}"
    if departure.num_examples:
        said += f", {departure.num_examples} examples"
    numbers = {name: value for name, value in departure.metrics.items() if value is not None}
    said += "".join(f", {name} {value:.4g}" for name, value in numbers.items())
    return said + "".join(f", {len(n)} sums of {name}" for name, n in departure.tallies.items())


def _older(home: Path) -> Path:
    return home / f"1.{FILE}"
