"""The owner's audit log: one JSON line for each answer that leaves this machine.

Statistics are logged in full. Weights, which the owner can compute again, are logged by size and
digest. docs/what-leaves.md lists what else leaves (state, telemetry, log lines on request).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from agent.home import secure_audit
from agent.home.secure_audit import SecureKind
from protocols.local.atomic_files import fsync_folder, write_all
from protocols.local.disk_space import file_bytes
from protocols.messages import app_work
from protocols.messages.app_work import AppAnswer, AppWork, Arrays, Values
from protocols.messages.comparisons import Comparison
from protocols.messages.envelope import Metrics
from protocols.messages.jobs import Answer, Scatter, SecureAnalyze, Unit
from protocols.messages.work import UpdateClaim

FILE = "left.jsonl"
MAX_BYTES = 4 << 20
#: The logged part of an app's answer; the rest is in the log by its digest.
MAX_APP_TOLD_CHARS = 4096

#: What happened to an offered task: entries of `offer_log`.
OfferKind = Literal[
    "task offered",
    "task withdrawn",
    "task approved",
    "task kept",
    "task refused",
    "task removed",
]
EntryKind = Literal[
    "description",
    "first weights",
    "weights",
    "evaluation",
    "answer",
    "comparison",
    "held version",
    "version",
    "refused",
    SecureKind,
    OfferKind,
]
_KINDS: dict[str, EntryKind] = {
    "describe": "description",
    "init": "first weights",
    "train": "weights",
    "evaluate": "evaluation",
    "holdings": "held version",
    "recall": "version",
}


#: Kinds of entries with which nothing left.
NOTHING_LEFT = frozenset(("refused", *get_args(OfferKind)))


class AuditEntry(Struct, frozen=True, kw_only=True):
    """One answer. `told` is what it says as JSON. `digest` and `nbytes` describe the bytes sent.

    `tallies` are the counts of an evaluation that are summed over peers.
    """

    at: float
    run: str
    task: str
    round: int
    what: EntryKind
    digest: str = ""
    nbytes: int = 0
    codec: str = ""
    num_examples: int = 0
    num_held_out: int = 0
    metrics: Metrics = {}
    tallies: dict[str, list[float]] = {}
    told: str = ""


def write_update(home: Path, claim: UpdateClaim, task: str, description: bytes) -> None:
    """Log an answer of a run and fsync. Call this before any part of the answer is sent.

    Raises OSError: an answer that cannot be logged must not be sent.
    """
    secure = secure_audit.read(claim, description)
    what: EntryKind | None = secure.what if secure else _KINDS.get(claim.kind)
    if what is None:
        return
    entry = AuditEntry(
        at=time.time(),
        run=claim.run,
        task=task,
        round=claim.round,
        what=what,
        digest=secure.digest if secure else claim.digest,
        nbytes=secure.nbytes if secure else claim.nbytes,
        codec=claim.codec if what in ("weights", "masked update") else "",
        num_examples=claim.num_examples,
        num_held_out=claim.num_held_out,
        metrics=claim.metrics,
        tallies={name: list(counts) for name, counts in claim.tallies.items()},
        told=secure.told if secure else description.decode(),
    )
    _append(home, entry)


def write_answer(home: Path, unit: Unit, answer: Answer, body: bytes) -> None:
    """Log the answer to a unit of a job; in full if it is about this machine's own rows.

    Raises OSError, as `write_update` does.
    """
    told = "" if isinstance(unit.question, Scatter) else body.decode(errors="replace")
    if isinstance(unit.question, SecureAnalyze) and unit.question.step != "shape":
        # Keys, shares and masked numbers are random to all others.
        told = msgspec.json.encode(
            {"step": unit.question.step, "secure question": unit.question.session}
        ).decode()
    entry = AuditEntry(
        at=time.time(),
        run=unit.job,
        task=unit.task,
        round=unit.unit,
        what="answer",
        digest=answer.digest,
        nbytes=answer.nbytes,
        num_examples=answer.rows,
        told=told,
    )
    _append(home, entry)


def write_comparison(home: Path, told: Comparison, task: str, round_: int) -> None:
    """Log, in full, what leaves about an ended run. Raises OSError, as `write_update` does."""
    entry = AuditEntry(
        at=time.time(),
        run=told.run,
        task=task,
        round=round_,
        what="comparison",
        num_held_out=told.rows,
        metrics={f"{model} {told.metric}": one.value for model, one in told.models.items()},
        told=msgspec.json.encode(told).decode(),
    )
    _append(home, entry)


def write_app_answer(home: Path, work: AppWork, answer: AppAnswer) -> None:
    """Log the answer of a Flower app, once: its configs and metrics, and its arrays by digest.

    Raises OSError, as `write_update` does, and BadMessage.
    """
    if _last_told.has(home, answer.nonce):  # a coordinator can request it again and again
        return
    told = app_work.decode_records(answer.told)
    entry = AuditEntry(
        at=time.time(),
        run=work.run,
        task=f"flower:{work.app}",
        round=work.round,
        what="answer",
        digest=answer.digest,
        nbytes=answer.nbytes,
        metrics=app_work.metrics_of(told)[1],
        told=_app_told(told, answer.told),
    )
    _append(home, entry, answer.nonce)


def _app_told(told: Sequence[Arrays | Values], sent: bytes) -> str:
    """An app's answer as JSON; if that is long, its digest and beginning."""
    text = msgspec.json.encode(told).decode()
    if len(text) <= MAX_APP_TOLD_CHARS:
        return text
    # The file of the arrays has their names as well.
    text = msgspec.json.encode(sorted(told, key=lambda record: isinstance(record, Arrays))).decode()
    short = {"sha256": hashlib.sha256(sent).hexdigest(), "bytes": len(sent)}
    return msgspec.json.encode(short | {"begins": text[:MAX_APP_TOLD_CHARS]}).decode()


class _LastTold:
    """Which statistics are in the files in full. A coordinator can request the same ones again and
    again; in full each time, they would push out the entries of all other answers."""

    def __init__(self) -> None:
        self._written_bytes = 0
        #: By home and digest, or another key, in the order of writing: the bytes written before.
        self._told: OrderedDict[tuple[Path, str], int] = OrderedDict()

    def has(self, home: Path, key: str) -> bool:
        """True if an entry with this key was written lately."""
        while self._told and self._written_bytes - next(iter(self._told.values())) > MAX_BYTES // 2:
            self._told.popitem(last=False)
        return (home, key) in self._told

    def wrote(self, home: Path, key: str, nbytes: int) -> None:
        """An entry was written; with a key, it is remembered."""
        if key:
            self._told[home, key] = self._written_bytes
        self._written_bytes += nbytes


_AS_BEFORE = "as in an earlier entry with this digest"
_last_told = _LastTold()


def _append(home: Path, entry: AuditEntry, key: str = "") -> None:
    """Append one entry and fsync it, so that a power cut after the sending cannot lose it.

    Its content is not written again soon. `key` identifies the content if the digest does not.
    """
    key = key or (entry.digest if entry.told else "")
    if key and _last_told.has(home, key):
        entry, key = replace(entry, told=_AS_BEFORE), ""
    nbytes = append_entry(home / FILE, entry, MAX_BYTES)
    _last_told.wrote(home, key, nbytes)


def append_entry(path: Path, entry: AuditEntry, max_bytes: int) -> int:
    """Append an entry to a file of the ledger, and fsync; its bytes. Raises OSError.

    A file of more than `max_bytes` is rotated; the one that was rotated before is deleted.
    """
    nbytes = file_bytes(path)
    if nbytes > max_bytes:
        path.replace(_rotated_file(path))
        nbytes = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab", buffering=0) as file:
        # The first newline ends a line that a power cut may have left incomplete.
        line = b"\n" + msgspec.json.encode(entry) + b"\n"
        write_all(file, memoryview(line))
        os.fsync(descriptor)
    if not nbytes:  # the file is new
        fsync_folder(path.parent)
    return len(line)


def read(home: Path) -> list[AuditEntry]:
    """All entries of answers that left, oldest first."""
    return read_entries(home / FILE)


def read_entries(path: Path) -> list[AuditEntry]:
    """All entries of a file of the ledger, oldest first. Incomplete lines are skipped."""
    entries = []
    for file in (_rotated_file(path), path):
        for line in file.read_bytes().splitlines() if file.exists() else []:
            try:
                entries.append(msgspec.json.decode(line, type=AuditEntry))
            except msgspec.DecodeError:
                continue
    return entries


def format_entry(entry: AuditEntry) -> str:
    """One line for a person."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at))
    if entry.what == "refused":
        return f"{at}  {entry.run}  refused: {entry.told}"
    if entry.what in NOTHING_LEFT:
        about = f": {entry.told}" if entry.told else ""
        return f"{at}  {entry.what}  {entry.task} sha256 {entry.digest[:12]}{about}"
    parts = [f"{at}  {entry.run}  round {entry.round}  {entry.what}"]
    if entry.nbytes:
        codec = f" as {entry.codec}" if entry.codec else ""
        parts.append(f"{entry.nbytes:,} bytes {entry.digest[:12]}{codec}")
    if entry.num_examples:
        parts.append(f"{entry.num_examples} examples")
    if entry.num_held_out:
        parts.append(f"{entry.num_held_out} held out")
    parts += [f"{key} {value:.4g}" for key, value in entry.metrics.items() if value is not None]
    parts += [f"{len(counts)} sums of {name}" for name, counts in entry.tallies.items()]
    return ", ".join(parts)


def _rotated_file(path: Path) -> Path:
    return path.with_name(f"1.{path.name}")
