"""The log of versions that agents follow: derived from the ledger, which is the only record.

The ledger's events about runs and restores become entries of the log (`messages.version_log`). The
same ledger gives the same log, so a crash or a restart changes nothing in it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from array import array
from collections import deque
from typing import NamedTuple

import msgspec
from msgspec import Struct

from coordinator.storage import run_events
from coordinator.storage.ledger import Entry, Ledger
from protocols.messages import version_log as wire
from protocols.messages.envelope import MaybeId, Sign
from protocols.messages.version_log import LogEntry, LogHead, LogPage, Restore

_FLEET = "fleet"
#: How often a hash is remembered, in entries of the log, and how many rows of the ledger are read
#: at once.
_MARK_EVERY, _ROWS = 256, 1024
_MAX_RESTORES = 64
_MADE = ("RunStarted", "WeightsInitialised", "VersionCommitted", "VersionLost", "VersionRecalled")
_TAGS = tuple(f'{{"type":"{name}"'.encode() for name in (*_MADE, "Restored"))


class _Restored(Struct, frozen=True):
    epoch: int


class _Mark(NamedTuple):
    """The log has `size` entries, and its chain ends with `hash`."""

    size: int
    hash: bytes


class SignedTail(NamedTuple):
    """A signed head, and the last entries before it as an encoded page."""

    head: bytes = b""
    page: bytes = b""


class VersionLog:
    """The log of one ledger. `sign` signs as the coordinator. Thread-safe."""

    def __init__(self, ledger: Ledger, fleet: str, sign: Sign) -> None:
        self._ledger, self._fleet, self._sign = ledger, fleet, sign
        self._lock = threading.Lock()
        self._end = _Mark(0, wire.START)
        self._marks = [self._end]
        #: By entry of the log: the number of the ledger's entry that it comes from. Between two of
        #: them a large fleet has thousands of others, and any peer may ask for a page.
        self._seqs = array("Q")
        self._backs: dict[int, bytes] = {}
        #: The last entries, each with the hash before it.
        self._tail: deque[tuple[bytes, bytes]] = deque(maxlen=wire.TAIL_ENTRIES)
        self._restores: deque[Restore] = deque(maxlen=_MAX_RESTORES)
        self._ledger_head = (0, wire.START)
        self._sync()

    @property
    def epoch(self) -> int:
        """That of the last restore; 0 without one."""
        return self._restores[-1].epoch if self._restores else 0

    def head(self) -> SignedTail:
        """The newest head, signed now, and the entries before it."""
        with self._lock:
            self._sync()
            seq, ledger_hash = self._ledger_head
            head = LogHead(
                fleet=self._fleet,
                epoch=self.epoch,
                size=self._end.size,
                hash=self._end.hash,
                ledger=seq,
                ledger_hash=ledger_hash,
                at=time.time(),
                term=self._ledger.term,
            )
            page = LogPage(
                start=self._end.size - len(self._tail),
                before=self._tail[0][1] if self._tail else wire.START,
                entries=tuple(entry for entry, _ in self._tail),
                restores=tuple(self._restores),
            )
        return SignedTail(wire.SIGNED_HEAD.pack(head, self._sign), wire.encode(page))

    def page(self, start: int) -> bytes:
        """The page of entries after the first `start`, encoded; an empty one past the end."""
        with self._lock:
            self._sync()
            start = min(start, self._end.size)
            mark = self._marks[start // _MARK_EVERY]
            seqs = self._seqs[mark.size : start + wire.MAX_PAGE_ENTRIES]
            restores = tuple(self._restores)
        read = [self._backs.get(seq) or self._read(seq) for seq in seqs]
        skipped, found = read[: start - mark.size], read[start - mark.size :]
        before = [mark.hash, *wire.chain_all(mark.hash, mark.size, skipped)][-1]
        page = LogPage(start=start, before=before, entries=tuple(found), restores=restores)
        return wire.encode(page)

    def _sync(self) -> None:
        """Read the new entries of the ledger."""
        after = self._ledger_head[0]
        while rows := self._ledger.entries_after(after, _ROWS):
            for row in rows:
                if (entry := self._derive(row)) is not None:
                    self._append(row.seq, entry)
            after = rows[-1].seq
            self._ledger_head = (after, rows[-1].hash)
            if len(rows) < _ROWS:
                break

    def _append(self, seq: int, entry: LogEntry) -> None:
        data, size = wire.encode(entry), self._end.size + 1
        self._tail.append((data, self._end.hash))
        self._end = _Mark(size, wire.chain(self._end.hash, size, data))
        self._seqs.append(seq)
        if entry.kind == "back":  # which takes all earlier events of its run to derive
            self._backs[seq] = data
        if size % _MARK_EVERY == 0:
            self._marks.append(self._end)
        if entry.kind == "restore":
            self._restores.append(Restore(size, entry.number))

    def _read(self, seq: int) -> bytes:
        """The log's entry that comes from the ledger's entry `seq`."""
        row = self._ledger.entry(seq)
        entry = self._derive(row) if row else None
        assert entry is not None, "the ledger keeps its entries"
        return wire.encode(entry)

    def _derive(self, row: Entry) -> LogEntry | None:
        """The log's entry for an entry of the ledger, if it is about versions."""
        if not row.body.startswith(_TAGS):
            return None
        if row.subject == _FLEET:
            epoch = msgspec.json.decode(row.body, type=_Restored).epoch
            return LogEntry("restore", row.at, number=epoch)
        if not _is_id(row.subject):  # a run of an older version, which no work can name
            return None
        run = row.subject
        match run_events.decode(row.body):
            case run_events.RunStarted():
                return LogEntry("run", row.at, run, 0, hashlib.sha256(row.body).hexdigest())
            case run_events.WeightsInitialised(digest=digest):
                return self._first_weights(row, digest)
            case run_events.VersionCommitted(round=number, digest=digest):
                return LogEntry("version", row.at, run, number, digest)
            case run_events.VersionLost(to=digest):
                return LogEntry("back", row.at, run, self._number_of(row, digest), digest)
            case run_events.VersionRecalled(version=version):
                return LogEntry("back", row.at, run, version.round, version.digest)
            case _:
                return None

    def _past(self, row: Entry) -> list[run_events.RunEvent]:
        """The events of a run before this one."""
        past = self._ledger.entries(row.subject, before=row.seq)
        return [run_events.decode(entry.body) for entry in past]

    def _first_weights(self, row: Entry, digest: str) -> LogEntry | None:
        """Two peers may have made first weights: a model starts from the last before its rounds."""
        past = self._past(row)
        begun = [n for n, one in enumerate(past) if isinstance(one, run_events.ModelBegun)]
        past = past[begun[-1] :] if begun else past
        if any(isinstance(event, run_events.RoundOpened) for event in past):
            return None
        is_first = not any(isinstance(event, run_events.WeightsInitialised) for event in past)
        kind: wire.EntryKind = "version" if is_first else "back"
        return LogEntry(kind, row.at, row.subject, _first_number(past), digest)

    def _number_of(self, row: Entry, digest: str) -> int:
        """The number of an earlier version of a run."""
        past = self._past(row)
        for event in reversed(past):
            match event:
                case run_events.VersionCommitted(round=number, digest=made) if made == digest:
                    return number
                case run_events.VersionRecalled(version=version) if version.digest == digest:
                    return version.round
                case run_events.ModelBegun(round=number):  # the first weights of this model
                    return number
                case _:
                    continue
        return _first_number(past)


def _first_number(past: list[run_events.RunEvent]) -> int:
    """The number of a run's first weights, or of those of a further model. A run that only
    evaluates opens no round."""
    first = past[0] if past else None
    if isinstance(first, run_events.ModelBegun):
        return first.round
    if not isinstance(first, run_events.RunStarted):
        return 0
    return first.spec.first_round - (0 if first.spec.only == "evaluate" else 1)


def _is_id(text: str) -> bool:
    try:
        msgspec.convert(text, MaybeId)
    except msgspec.ValidationError:
        return False
    return bool(text)
