"""What the log of versions keeps in memory is always what its file has."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import msgspec
import pytest

from agent.home import log_store
from agent.home.log_store import LogStore
from protocols.errors import DiskFull
from protocols.messages.version_log import EntryKind, LogEntry, LogHead

FLEET, RUNS = "f" * 16, ("r-1", "r-2", "r-3")


class Log:
    """Entries and heads for a store, and what another reader of its file finds."""

    def __init__(self, home: Path, seed: int = 0) -> None:
        self.home, self.random = home, Random(seed)
        self.store = LogStore(home, FLEET)
        self.hashes = {0: b"\0" * 32}
        self.size = self.ledger = 0

    def entry(self) -> LogEntry:
        kinds: tuple[EntryKind, ...] = ("version", "version", "version", "run", "back", "restore")
        kind = self.random.choice(kinds)
        run = "" if kind == "restore" else self.random.choice(RUNS)
        number = self.random.randrange(4)
        digest = hashlib.sha256(b"%d" % self.random.randrange(3)).hexdigest()
        return LogEntry(kind, time.time(), run, number, digest)

    def grow(self, count: int) -> None:
        entries = [self.entry() for _ in range(count)]
        for size in range(self.size + 1, self.size + count + 1):
            self.hashes[size] = self.random.randbytes(32)
        hashes = [self.hashes[self.size + 1 + one] for one in range(count)]
        pairs = [(msgspec.json.encode(one), one) for one in entries]
        self.store.append(self.size, pairs, hashes)
        self.size += count

    def head(self, size: int) -> None:
        self.ledger += self.random.randrange(2)
        head = LogHead(
            fleet=FLEET,
            epoch=0,
            size=size,
            hash=self.hashes[size],
            ledger=self.ledger,
            ledger_hash=b"\0" * 32,
            at=time.time(),
        )
        if self.store.hash_at(size) is not None:
            self.store.add_head(head, self.random.randbytes(64))

    def cut(self, size: int) -> None:
        self.store.cut(size)
        self.size = size

    def check(self) -> None:
        other = LogStore(self.home, FLEET)
        digests = [hashlib.sha256(b"%d" % one).hexdigest() for one in range(3)]
        assert self.store.newest() == other.newest()
        assert self.store.last_versions(set(RUNS)) == other.last_versions(set(RUNS))
        for size in range(self.size + 2):
            assert self.store.hash_at(size) == other.hash_at(size)
        for until in (self.size, self.size - 1, self.size - 3):
            for run in RUNS:
                for asked in ((run, n, digest) for n in range(4) for digest in digests):
                    ours, theirs = (one.has_version(*asked, until) for one in (self.store, other))
                    assert ours == theirs, (asked, until)
        other.close()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path)
    yield made
    made.store.close()


@pytest.mark.parametrize("seed", range(4))
def test_the_memory_follows_the_file(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_store, "MAX_ENTRIES", 12)
    monkeypatch.setattr(log_store, "_PRUNE_EVERY", 8)
    log = Log(tmp_path, seed)
    for _ in range(60):
        match log.random.randrange(8):
            case 0 | 1 | 2:
                log.grow(log.random.randrange(1, 4))
            case 3 | 4:
                log.head(log.size)
            case 5:
                log.head(log.random.randrange(log.size + 1))
            case 6 if log.size > 3:
                log.cut(log.size - log.random.randrange(1, 3))
            case 7 if log.random.random() < 0.3:
                log.store.forget()
                log.store.set_meta("fleet", FLEET.encode())
                log.store.start(log.size, log.hashes[log.size])
        log.check()
    log.store.close()


def test_older_entries_are_not_the_end(log: Log) -> None:
    log.size, log.hashes[20] = 20, b"s" * 32
    log.store.start(20, log.hashes[20])
    log.grow(2)
    older = [(msgspec.json.encode(one), one) for one in (log.entry() for _ in range(3))]
    log.store.start(17, b"o" * 32)
    log.store.append(17, older, [b"1" * 32, b"2" * 32, log.hashes[20]], at_end=False)
    log.check()


def test_a_full_disk_leaves_nothing_in_memory_that_the_file_lacks(log: Log) -> None:
    log.grow(3)
    log.head(3)
    (pages,) = log.store._db.execute("PRAGMA page_count").fetchone()
    log.store._db.execute(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        for _ in range(1000):
            with log.store.transaction():
                log.grow(20)
                log.head(log.size)

    with pytest.raises(DiskFull):
        fill()
    with suppress(DiskFull):
        log.check()
    log.store._db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    log.check()
    log.grow(2)
    log.head(log.size)
    log.check()
