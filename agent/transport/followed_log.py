"""Follows the coordinator's log of versions, and compares it with what other peers have seen.

Work counts only if its version is in the log that the coordinator signed for this agent. Each new
head must continue the known log. Heads of other peers arrive later and by any path: the
coordinator passes them on, and peers exchange them directly. Two heads that contradict each other
are a proof; the agent then takes no work until its owner acknowledges that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from agent.home import fleet_trust, fork_proofs, settings
from agent.home.credentials import Credentials
from agent.home.log_store import Known, LogStore
from agent.home.settings import Enrollment
from protocols.enrollment import fork_proof, identity
from protocols.enrollment.fork_proof import MAX_CLOCK_SKEW_S, ForkProof
from protocols.errors import (
    BadMessage,
    CommonweightError,
    DiskFull,
    HomeError,
    LogConflict,
    Unwitnessed,
)
from protocols.messages import version_log as wire
from protocols.messages.version_log import LogEntry, LogHead, LogNews, LogPage
from protocols.messages.work import Work
from protocols.p2p import seen_heads
from protocols.p2p.gossip import version_number
from protocols.p2p.seen_heads import SeenHead, VerifiedSeen

log = logging.getLogger("commonweight.log")

#: How often this agent tells the coordinator what it has seen: in a small and in a large fleet.
TELL_EVERY_S, TELL_EVERY_IN_LARGE_FLEET_S, LARGE_FLEET = 2.0, 15.0, 16
#: Versions older than this must have been seen by the owner's witnesses.
WITNESS_LAG_S = 60.0
#: An agent is told of the log's growth within seconds. What a peer has seen for so long, and this
#: agent is not shown, is kept from it.
MAX_BEHIND_S = 300.0
#: After more new entries than this, the log is followed anew.
MAX_GAP = 131_072
#: Statements that wait, and peers whose last one is remembered.
_MAX_WAITING, _MAX_PEERS = 256, 4096
#: Of one kind at once.
_MAX_NOTES = 8
#: Read before the known entries for the version of work.
_MAX_OLDER_PAGES = 8
_NEXT = "commonweight-agent audit show; commonweight-agent audit acknowledge, to go on"


class Witnesses(NamedTuple):
    """Of the peers in `witnesses`, `min_witnesses` must have shown what they see."""

    needed: int = 0
    peers: tuple[str, ...] = ()


class _Ahead(NamedTuple):
    """A peer has seen this head, which ours had not reached `since` a time (monotonic s)."""

    seen: SeenHead
    head: LogHead
    since: float


class FollowedLog:
    """The log as this agent knows it. Call from threads; only marked methods never block.

    `fetch(start)` requests a page of the log from the coordinator. `on_fork(text)` is called once
    for each new proof, `on_note(text)` for what the owner should know.
    """

    def __init__(
        self,
        home: Path,
        enrollment: Enrollment,
        credentials: Credentials,
        fetch: Callable[[int], bytes],
        certificate: Callable[[], bytes],
    ) -> None:
        self._home, self._credentials = home, credentials
        self._fleet, self._public = enrollment.fleet, enrollment.coordinator_public
        self._fetch, self._certificate = fetch, certificate
        self._cas = fleet_trust.trusted_cas(enrollment)
        self.on_fork: Callable[[str], None] = lambda text: None
        self.on_note: Callable[[str], None] = log.warning
        self.witnesses: Callable[[], Witnesses] = Witnesses
        self._lock = threading.RLock()
        self._store = _open_store(home, enrollment.fleet)
        self._waiting: deque[bytes] = deque(maxlen=_MAX_WAITING)
        #: By peer: its last statement, and the time when it was made.
        self._statements: dict[str, tuple[bytes, float]] = {}
        #: By peer: a head that ours has not reached, to compare when it has.
        self._ahead: dict[str, _Ahead] = {}
        self._told_at, self._warned = -1e9, False
        #: A proof could not be stored: no work before a restart.
        self._is_unsaved = False
        #: Ours, for gossip.
        self._seen, self._proof = b"", b""
        self._ignored_before = fork_proofs.acknowledged_at(home)
        self._note_key(enrollment)
        self.refresh()

    def _note_key(self, enrollment: Enrollment) -> None:
        """Keep the card of the coordinator's last key: known heads may be signed with it."""
        if self._store.meta("public") not in (b"", self._public):
            self._store.set_meta("old card", self._store.meta("card"))
        self._store.set_meta("public", self._public)
        self._store.set_meta("card", enrollment.card)

    def close(self) -> None:
        with self._lock:
            self._store.close()

    # --- the owner ---

    @property
    def is_forked(self) -> bool:
        """True while a proof is not acknowledged."""
        return self._is_unsaved or bool(fork_proofs.not_acknowledged(self._home))

    def refresh(self) -> bool:
        """Begin anew if the owner has acknowledged the proofs. True while one is open."""
        if self.is_forked:
            return True
        with self._lock:
            if self._store.meta("forked"):
                self._store.forget()
                self._store.set_meta("fleet", self._fleet.encode())
                self._ahead.clear()
                self._seen = self._proof = b""
                self._ignored_before = fork_proofs.acknowledged_at(self._home)
                log.warning("the owner has acknowledged the proof; the log is followed anew")
        return False

    # --- the coordinator's log ---

    def check_work(self, work: Work, head: bytes, page: bytes) -> None:
        """Raise LogConflict or Unwitnessed unless the log that was shown so far has this version.

        Raises BadMessage, Unreachable.
        """
        with self._lock:
            self.process()
            if self.refresh():
                raise LogConflict(
                    "the coordinator showed two versions, and this machine's owner has the proof",
                    _NEXT,
                )
            if not head:
                self._without_log()
                return
            signed = self._follow(head, wire.decode_page(page))
            self._check_not_behind()
            if work.kind in ("train", "evaluate"):
                self._check_version(work, signed)
                self.check_witnesses()

    def _without_log(self) -> None:
        """Work of an older coordinator, which keeps no log. Raises LogConflict, Unwitnessed."""
        if self._store.newest() is not None or self._statements:
            raise LogConflict(
                "work without the log of versions, which this coordinator showed before",
                "ask the operator whether the coordinator was downgraded: update it again",
            )
        if self.witnesses().needed:
            raise Unwitnessed(
                "the coordinator keeps no log of versions, so no witness can see any "
                f"(min_witnesses {self.witnesses().needed})",
                "update the coordinator, or: commonweight-agent policy set min_witnesses 0",
            )
        if not self._warned:
            self._warned = True
            log.warning(
                "this coordinator is older and keeps no log of versions: nobody notices if it "
                "shows other versions to other peers"
            )

    def _check_not_behind(self) -> None:
        """Raise LogConflict if another peer has long seen what this agent is not shown."""
        known = self._store.newest()
        for peer, (_, head, since) in self._ahead.items():
            if time.monotonic() - since > MAX_BEHIND_S:
                raise LogConflict(
                    f"the peer {peer} has seen {head.size} entries of the coordinator's log"
                    + (" after a restore" if head.epoch > self._epoch else "")
                    + f", and this machine is shown {known.size if known else 0}",
                    "ask the operator why; commonweight-agent audit show",
                )

    def _check_version(self, work: Work, head: LogHead) -> None:
        number = version_number(work)

        def is_there() -> bool:
            return self._store.has_version(work.run, number, work.base, head.size)

        if not is_there() and not self._read_older(is_there):
            raise LogConflict(
                f"version {number} of run {work.run} ({work.base[:12]}) is not in the log of "
                "versions that the coordinator signed",
                "ask the operator what runs at the coordinator's address; other peers may have "
                "got another version",
            )

    def _read_older(self, found: Callable[[], bool]) -> bool:
        """Read entries from before those that are known here, until `found()`. Then true.

        Raises BadMessage, Unreachable.
        """
        for _ in range(_MAX_OLDER_PAGES):
            first = self._store.first_size()
            start = max(0, first - wire.MAX_PAGE_ENTRIES)
            if first == 0:
                break
            page = wire.decode_page(self._fetch(start))
            entries = page.entries[: first - start]
            hashes = wire.chain_all(page.before, page.start, entries)
            if page.start != start or hashes[-1:] != [self._store.hash_at(first)]:
                raise BadMessage("older entries of the log do not lead to the known ones")
            decoded = [wire.decode_entry(entry) for entry in entries]
            self._store.start(start, page.before)
            self._store.append(start, list(zip(entries, decoded, strict=True)), hashes)
            if found():
                return True
        return False

    def news(self, news: LogNews) -> None:
        """Take the newest head and the statements of other peers. Logs what is wrong."""
        with self._lock:
            try:
                if not self.refresh():
                    self._follow(news.head, wire.decode_page(news.page))
            except LogConflict:
                pass  # told by `on_fork`
            except CommonweightError as err:
                log.info("the coordinator's log of versions: %s", err.message)
            self._waiting.extend(news.seen)
            self.process()

    def _follow(self, signed: bytes, page: LogPage) -> LogHead:
        """Accept a head that continues the log. Raises LogConflict, BadMessage, Unreachable."""
        head = self._verified(signed)
        self._check_epoch(head, signed)
        known = self._store.newest()
        if known is None:
            self._begin(head, signed, page)
        elif head.epoch > self._epoch:
            self._restored(head, signed, page, known)
        elif head.epoch < self._epoch:
            raise LogConflict("a log that was replaced by a backup", "commonweight-agent logs")
        elif head.size <= known.size:
            self._compare(head, signed, known)
        elif head.size > known.size + MAX_GAP:
            self.on_note(
                f"the coordinator's log has grown by {head.size - known.size} entries since this "
                "agent saw it; it is followed anew"
            )
            self._store.cut(0)
            self._begin(head, signed, page)
        else:
            entries, before = self._entries_between(known.size, head, page)
            if before != known.hash:
                self._forked(known.head, signed, before, entries)
            self._extend(known.size, known.hash, entries, head, signed)
        if self._store.hash_at(head.size) is not None:
            self._store.add_head(head, signed)
        newest = self._store.newest()
        if newest is not None and newest.head == signed:
            self._seen = b""
        self._compare_waiting()
        return head

    def _verified(self, signed: bytes) -> LogHead:
        head = wire.SIGNED_HEAD.unpack(signed, partial(identity.verify, self._public))
        if head.fleet != self._fleet:
            raise BadMessage(f"a head of fleet {head.fleet}")
        return head

    @property
    def _epoch(self) -> int:
        return int(self._store.number("epoch"))

    def _begin(self, head: LogHead, signed: bytes, page: LogPage) -> None:
        """The first head: its last entries are believed."""
        entries, before = self._entries_between(page.start, head, page)
        self._store.set_meta("epoch", str(head.epoch).encode())
        self._store.start(page.start, before)
        self._extend(page.start, before, entries, head, signed)

    def _entries_between(
        self, start: int, head: LogHead, page: LogPage
    ) -> tuple[list[bytes], bytes]:
        """The entries of a head's log after the first `start`, and the hash before them.

        Raises BadMessage, Unreachable.
        """
        if page.start <= start <= page.start + len(page.entries) and start <= head.size:
            skipped = start - page.start
            hashes = [page.before, *wire.chain_all(page.before, page.start, page.entries)]
            before = hashes[skipped]
            entries = list(page.entries[skipped : head.size - page.start])
        else:
            entries, before = [], wire.START
        while start + len(entries) < head.size:
            at = start + len(entries)
            more = wire.decode_page(self._fetch(at))
            if more.start != at or not more.entries:
                raise BadMessage("the coordinator does not show the whole log of its signed head")
            if at == start:
                before = more.before
            entries += more.entries[: head.size - at]
        last = wire.chain_all(before, start, entries)
        if (last[-1] if last else before) != head.hash:
            raise BadMessage("the entries of the log do not have the hash of its signed head")
        return entries, before

    def _extend(
        self, start: int, before: bytes, entries: list[bytes], head: LogHead, signed: bytes
    ) -> None:
        """Add entries after the first `start`. Raises LogConflict, BadMessage."""
        decoded = [wire.decode_entry(entry) for entry in entries]
        if any(one.kind == "restore" and one.number > head.epoch for one in decoded):
            raise BadMessage("the signed head does not name the last restore of its log")
        last = self._store.last_versions({one.run for one in decoded if one.run})
        if (found := wire.first_repeated(decoded, last)) is not None:
            again = decoded[found]
            earlier = self._store.last_entry_of(again.run, again.number)
            if earlier:
                past = self._store.entries(earlier - 1, start)
                before = self._store.hash_at(earlier - 1) or wire.START
            else:
                past = []
            self._forked(b"", signed, before, [*past, *entries])
        for one in [one for one in decoded if one.kind == "back"][-_MAX_NOTES:]:
            self.on_note(
                f"run {one.run} goes on from version {one.number} ({one.digest[:12]}): the "
                "coordinator took back what came after it"
            )
        hashes = wire.chain_all(before, start, entries)
        self._store.append(start, list(zip(entries, decoded, strict=True)), hashes)

    def _restored(self, head: LogHead, signed: bytes, page: LogPage, known: Known) -> None:
        """Take over a log that goes on from a backup. Raises LogConflict, BadMessage."""
        newer = [one for one in page.restores if one.epoch > self._epoch]
        if not newer or newer[-1].epoch != head.epoch:
            raise BadMessage("the signed head has a new epoch, and its log has no restore")
        kept = min(newer[0].size - 1, known.size)
        anchor = self._store.head_until(kept)
        start = anchor.size if anchor else kept
        expected = anchor.hash if anchor else self._store.hash_at(kept)
        if expected is None:
            text = "the coordinator was restored from a backup that is too old to compare"
            self._store.cut(0)
            self._begin(head, signed, page)
            self.on_note(f"{text}; its log is followed anew")
            return
        entries, before = self._entries_between(start, head, page)
        if before != expected:
            self._forked(anchor.head if anchor else b"", signed, before, entries)
        restore = wire.decode_entry(entries[newer[0].size - 1 - start])
        if restore.kind != "restore" or restore.number != newer[0].epoch:
            raise BadMessage("the log has no restore where the coordinator says")
        lost = self._store.cut(start)
        self._store.set_meta("epoch", str(head.epoch).encode())
        self._extend(start, before, entries, head, signed)
        text = _describe_lost([one for one in lost[kept - start :] if one.kind == "version"])
        self.on_note(f"the coordinator was restored from a backup{text}")

    def _compare(self, head: LogHead, signed: bytes, known: Known) -> bool:
        """Compare a head that has no more entries than ours. Raises LogConflict.

        False if it is too old to compare.
        """
        expected = self._store.hash_at(head.size)
        if expected is not None and expected != head.hash:
            entries = self._store.entries(head.size, known.size)
            self._forked(signed, known.head, expected, entries)
        other = self._store.head_of_ledger(head.ledger)
        if other and self._has_other_ledger(other, head):
            self._forked(signed, other, wire.START, [])
        return expected is not None

    def _has_other_ledger(self, other: bytes, head: LogHead) -> bool:
        """Whether an accepted head contradicts this one about the ledger."""
        ours = wire.SIGNED_HEAD.decode(other[64:])
        same = (ours.epoch, ours.ledger) == (head.epoch, head.ledger)
        return same and ours.ledger_hash != head.ledger_hash

    def _check_epoch(self, head: LogHead, signed: bytes) -> None:
        """Remember the head's epoch. Raise LogConflict if it is shown long after a newer one."""
        if newer := self._store.newer_epoch(head.epoch, head.at - MAX_CLOCK_SKEW_S):
            self._forked(signed, newer, wire.START, [])
        self._store.note_epoch(head, signed)

    def _forked(self, first: bytes, second: bytes, before: bytes, entries: list[bytes]) -> None:
        """Keep the proof and raise LogConflict; BadMessage if the proof would show nothing."""
        joined = settings.read_enrollment(self._home)
        cards = (joined.card, self._store.meta("old card"))
        proof = ForkProof(
            fleet=self._fleet,
            transitions=joined.transitions,
            cards=tuple(dict.fromkeys(filter(None, cards))),
            first=first,
            second=second,
            before=before,
            entries=tuple(entries[: fork_proof.MAX_PROOF_ENTRIES]),
        )
        text = fork_proof.check(self._credentials.ca_pem, proof)
        self._keep(proof, text)
        raise LogConflict(text, _NEXT)

    def _keep(self, proof: ForkProof, text: str) -> None:
        is_new = not self.is_forked
        try:
            path = fork_proofs.save(self._home, proof)
        except OSError as err:
            self._is_unsaved = True
            log.error("the proof cannot be stored: %s", err)
            path = fork_proofs.path_of(self._home, proof)
        self._store.set_meta("forked", b"1")
        encoded = fork_proof.encode(proof)
        self._proof = encoded if len(encoded) <= seen_heads.MAX_GOSSIP_PROOF_BYTES else b""
        if is_new:
            self.on_fork(f"{text}; proof: {path}; {_NEXT}")

    # --- other peers ---

    def offer(self, statement: bytes, proof: bytes = b"") -> None:
        """Take a peer's statement or proof, to look at it in the next `process`. Never blocks."""
        self._waiting.extend(filter(None, (statement, proof)))

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def process(self) -> None:
        """Compare the heads that have arrived. Blocking; logs what is wrong."""
        with self._lock:
            while self._waiting:
                data = self._waiting.popleft()
                try:
                    if data.startswith(b"{"):
                        self._take_proof(data)
                    else:
                        self._take(data)
                except LogConflict:
                    continue  # told by `on_fork`
                except (BadMessage, DiskFull, HomeError) as err:
                    log.debug("a statement of a peer: %s", err.message)

    def _take(self, data: bytes) -> None:
        """Compare one statement. Raises BadMessage, LogConflict."""
        if any(data == known for known, _ in self._statements.values()):
            return
        now = time.time()
        peer = seen_heads.verify(data, self._cas, self._fleet, now)
        name, at = peer.seen.peer, peer.seen.at
        if name == self._credentials.peer or at <= self._statements.get(name, (b"", 0.0))[1]:
            return
        head = self._verified(peer.seen.head)
        if head.at <= self._ignored_before:
            return
        self._statements.pop(name, None)
        self._statements[name] = (data, at)
        while len(self._statements) > _MAX_PEERS:
            del self._statements[next(iter(self._statements))]
        self._compare_seen(peer, head)

    def _compare_seen(self, peer: VerifiedSeen, head: LogHead) -> None:
        signed = peer.seen.head
        self._check_epoch(head, signed)
        known = self._store.newest()
        if known is None or head.epoch != self._epoch or head.size > known.size:
            # The first one stays: a log that always grows faster than ours would never be reached.
            if len(self._ahead) < _MAX_PEERS:
                ahead = _Ahead(peer.seen, head, time.monotonic())
                self._ahead.setdefault(peer.seen.peer, ahead)
            return
        if self._compare(head, signed, known):
            self._store.confirm(peer.seen.peer, head.size, peer.seen.at)

    def _compare_waiting(self) -> None:
        """Compare the heads of peers that ours has reached. Raises LogConflict."""
        known = self._store.newest()
        if known is None:
            return
        for peer, (seen, head, _) in list(self._ahead.items()):
            if head.epoch < self._epoch:  # it was ahead before a restore
                del self._ahead[peer]
            elif head.epoch == self._epoch and head.size <= known.size:
                del self._ahead[peer]
                if self._compare(head, seen.head, known):
                    self._store.confirm(peer, head.size, seen.at)

    def _take_proof(self, data: bytes) -> None:
        """Take over another peer's proof, if it is one and not of before the owner's consent."""
        proof = fork_proof.decode(data)
        text = fork_proof.check(self._credentials.ca_pem, proof)
        newest = max(head.at for head in fork_proof.heads(self._credentials.ca_pem, proof))
        if newest > self._ignored_before:
            self._keep(proof, text)

    def statement(self) -> bytes | None:
        """What to tell the coordinator now: our signed statement, empty before the first head.

        None: nothing is due.
        """
        now = time.monotonic()
        is_large = len(self._statements) > LARGE_FLEET
        if now - self._told_at < (TELL_EVERY_IN_LARGE_FLEET_S if is_large else TELL_EVERY_S):
            return None
        self._told_at = now
        return self.seen()

    def seen(self) -> bytes:
        """Our statement about the newest head; empty before the first."""
        with self._lock:
            newest = self._store.newest()
            if newest is None:
                return b""
            if not self._seen:
                seen = SeenHead(self._credentials.peer, time.time(), newest.head)
                certificate, sign = self._certificate(), self._credentials.sign_key.sign
                self._seen = seen_heads.sign(seen, certificate, sign)
            return self._seen

    def last_seen(self) -> tuple[bytes, bytes]:
        """Our last statement and a small proof, if any, for gossip. Never blocks."""
        return self._seen, self._proof

    # --- witnesses ---

    def missing_witnesses(self) -> str:
        """Why the work must wait for witnesses, as text; empty if it need not."""
        needed, pinned = self.witnesses()
        if not needed:
            return ""
        with self._lock:
            size = self._store.size_before(time.time() - WITNESS_LAG_S)
            confirmed = {one.peer for one in self._store.confirmed() if one.size >= size}
        if (count := len(confirmed.intersection(pinned))) >= needed:
            return ""
        return f"{count} of the {len(pinned)} witnesses have shown the versions of a minute ago"

    def check_witnesses(self) -> None:
        """Raise Unwitnessed if the owner's `min_witnesses` is not met."""
        if missing := self.missing_witnesses():
            raise Unwitnessed(
                f"{missing}; min_witnesses is {self.witnesses().needed}",
                "commonweight-agent policy set min_witnesses N, with a lower N",
            )


def _open_store(home: Path, fleet: str) -> LogStore:
    try:
        return LogStore(home, fleet)
    except HomeError as err:
        log.warning("%s; it is moved to log.db.damaged, and the log is followed anew", err.message)
        path = home / "log.db"
        path.replace(path.with_name("log.db.damaged"))
        return LogStore(home, fleet)


def _describe_lost(lost: list[LogEntry]) -> str:
    if not lost:
        return ""
    by_run: dict[str, list[int]] = {}
    for one in lost:
        by_run.setdefault(one.run, []).append(one.number)
    runs = [f"{min(n)} to {max(n)} of {run}" for run, n in list(by_run.items())[:4]]
    return f", which lacks versions {', '.join(runs)}"
