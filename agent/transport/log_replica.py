"""A verified replica of the log of versions that the coordinator signs.

Each new head must continue the known log. Two heads that contradict each other are a proof, which
is stored in the agent's home. Blocking; `FollowedLog` holds its lock around each call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from agent.home import enrollment_file, fork_proofs
from agent.home.enrollment_file import Enrollment
from agent.home.log_file import Known
from agent.home.log_store import LogStore
from protocols.enrollment import fork_proof, identity
from protocols.enrollment.fork_proof import MAX_CLOCK_SKEW_S, ForkProof
from protocols.errors import BadMessage, FormerLeader, HomeError, LogConflict
from protocols.messages import version_log as wire
from protocols.messages.version_log import LogEntry, LogHead, LogPage
from protocols.p2p import seen_heads

log = logging.getLogger("commonweight.log")

#: After more new entries than this, the replica starts again at the newest head.
MAX_GAP = 131_072
#: Of one kind at once.
_MAX_NOTES = 8
#: Read before the known entries for the version of work.
_MAX_OLDER_PAGES = 8
NEXT_STEP = (
    "commonweight-agent ledger audit show; commonweight-agent ledger audit acknowledge, to continue"
)


class LogReplica:
    """The entries and heads that this agent has accepted, and the proofs against them.

    `fetch(start)` requests a page of the log from the coordinator. `on_fork(text)` is called once
    for each new proof, `on_note(text)` for what the owner should know.
    """

    def __init__(
        self,
        home: Path,
        enrollment: Enrollment,
        ca_pem: bytes,
        fetch: Callable[[int], bytes],
        *,
        on_fork: Callable[[str], None],
        on_note: Callable[[str], None],
    ) -> None:
        self._home, self._ca_pem = home, ca_pem
        self._fleet, self._public = enrollment.fleet, enrollment.coordinator_public
        self._fetch, self._on_fork, self._on_note = fetch, on_fork, on_note
        self.store = _open_store(home, enrollment.fleet)
        #: A proof could not be stored: no work before a restart.
        self._is_unsaved = False
        #: The newest proof if it is small enough for gossip, else empty.
        self.proof = b""
        #: When the owner acknowledged the last proof (Unix s): older heads prove nothing new.
        self.ignored_before = fork_proofs.acknowledged_at(home)
        self._note_key(enrollment)

    def _note_key(self, enrollment: Enrollment) -> None:
        """Keep the card of the coordinator's last key: known heads may be signed with it."""
        if self.store.meta("public") not in (b"", self._public):
            self.store.set_meta("old card", self.store.meta("card"))
        self.store.set_meta("public", self._public)
        self.store.set_meta("card", enrollment.card)

    @property
    def is_forked(self) -> bool:
        """True while a proof is not acknowledged."""
        return self._is_unsaved or bool(fork_proofs.not_acknowledged(self._home))

    def forget_fork(self) -> bool:
        """Start again at the newest head if there was a proof, which the owner has acknowledged."""
        if not self.store.meta("forked"):
            return False
        self.store.forget()
        self.store.set_meta("fleet", self._fleet.encode())
        self.proof = b""
        self.ignored_before = fork_proofs.acknowledged_at(self._home)
        log.warning("the owner has acknowledged the proof; the log is read again")
        return True

    def read_older(self, found: Callable[[], bool]) -> bool:
        """Read entries from before those that are known here, until `found()`. Then true.

        Raises BadMessage, Unreachable.
        """
        for _ in range(_MAX_OLDER_PAGES):
            first = self.store.first_size()
            start = max(0, first - wire.MAX_PAGE_ENTRIES)
            if first == 0:
                break
            page = wire.decode_page(self._fetch(start))
            entries = page.entries[: first - start]
            hashes = wire.chain_all(page.before, page.start, entries)
            if page.start != start or hashes[-1:] != [self.store.hash_at(first)]:
                raise BadMessage("older entries of the log do not lead to the known ones")
            decoded = [wire.decode_entry(entry) for entry in entries]
            with self.store.transaction():
                self.store.start(start, page.before)
                older = list(zip(entries, decoded, strict=True))
                self.store.append(start, older, hashes, at_end=False)
            if found():
                return True
        return False

    def follow(self, signed: bytes, page: LogPage) -> LogHead:
        """Accept a head that continues the log.

        Raises LogConflict, FormerLeader, BadMessage, Unreachable.
        """
        with self.store.transaction():
            return self._follow(signed, page)

    def _follow(self, signed: bytes, page: LogPage) -> LogHead:
        head = self.verified(signed)
        self.check_epoch(head, signed)
        known = self.store.newest()
        self._check_term(head, signed, known)
        if known is None:
            self._begin(head, signed, page)
        elif head.epoch > self.epoch:
            self._restored(head, signed, page, known)
        elif head.epoch < self.epoch:
            raise LogConflict("a log that was replaced by a backup", "commonweight-agent logs")
        elif head.size <= known.size:
            self.compare(head, signed, known)
        elif head.size > known.size + MAX_GAP:
            self._on_note(
                f"the coordinator's log has grown by {head.size - known.size} entries since this "
                "agent saw it; the agent starts again at its newest head"
            )
            self.store.cut(0)
            self._begin(head, signed, page)
        else:
            entries, before = self._entries_between(known.size, head, page)
            if before != known.hash:
                self._forked(known.head, signed, before, entries)
            self._extend(known.size, known.hash, entries, head, signed)
        if self.store.hash_at(head.size) is not None:
            self.store.add_head(head, signed)
        return head

    def verified(self, signed: bytes) -> LogHead:
        head = wire.SIGNED_HEAD.unpack(signed, partial(identity.verify, self._public))
        if head.fleet != self._fleet:
            raise BadMessage(f"a head of fleet {head.fleet}")
        return head

    def _check_term(self, head: LogHead, signed: bytes, known: Known | None) -> None:
        """Raise FormerLeader if this agent or a peer has seen a head of a later leader.

        Raises LogConflict if the log of the former leader is another one.
        """
        self.note_term(head)
        if head.term and head.term < self._term:
            if known and head.epoch == self.epoch and head.size <= known.size:
                self.compare(head, signed, known)
            raise FormerLeader(
                f"another coordinator leads the fleet now, in term {self._term}; this one has term "
                f"{head.term}",
                "nothing to do: the agent continues with the new one",
            )

    def note_term(self, head: LogHead) -> None:
        """Remember the newest leader."""
        if head.term > self._term:
            self.store.set_meta("term", str(head.term).encode())

    @property
    def _term(self) -> int:
        return int(self.store.meta("term") or 0)

    @property
    def epoch(self) -> int:
        return int(self.store.number("epoch"))

    def _begin(self, head: LogHead, signed: bytes, page: LogPage) -> None:
        """The first head: its last entries are believed."""
        entries, before = self._entries_between(page.start, head, page)
        self.store.set_meta("epoch", str(head.epoch).encode())
        self.store.start(page.start, before)
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
        last = self.store.last_versions({one.run for one in decoded if one.run})
        if (found := wire.first_repeated(decoded, last)) is not None:
            again = decoded[found]
            earlier = self.store.last_entry_of(again.run, again.number)
            if earlier:
                past = self.store.entries(earlier - 1, start)
                before = self.store.hash_at(earlier - 1) or wire.START
            else:
                past = []
            self._forked(b"", signed, before, [*past, *entries])
        for one in [one for one in decoded if one.kind == "back"][-_MAX_NOTES:]:
            self._on_note(
                f"run {one.run} continues from version {one.number} ({one.digest[:12]}): the "
                "coordinator took back what came after it"
            )
        hashes = wire.chain_all(before, start, entries)
        self.store.append(start, list(zip(entries, decoded, strict=True)), hashes)

    def _restored(self, head: LogHead, signed: bytes, page: LogPage, known: Known) -> None:
        """Take over a log that continues from a backup. Raises LogConflict, BadMessage."""
        newer = [one for one in page.restores if one.epoch > self.epoch]
        if not newer or newer[-1].epoch != head.epoch:
            raise BadMessage("the signed head has a new epoch, and its log has no restore")
        kept = min(newer[0].size - 1, known.size)
        anchor = self.store.head_until(kept)
        start = anchor.size if anchor else kept
        expected = anchor.hash if anchor else self.store.hash_at(kept)
        if expected is None:
            text = "the coordinator was restored from a backup that is too old to compare"
            self.store.cut(0)
            self._begin(head, signed, page)
            self._on_note(f"{text}; the agent starts again at the newest head of its log")
            return
        entries, before = self._entries_between(start, head, page)
        if before != expected:
            self._forked(anchor.head if anchor else b"", signed, before, entries)
        restore = wire.decode_entry(entries[newer[0].size - 1 - start])
        if restore.kind != "restore" or restore.number != newer[0].epoch:
            raise BadMessage("the log has no restore where the coordinator says")
        lost = self.store.cut(start)
        self.store.set_meta("epoch", str(head.epoch).encode())
        self._extend(start, before, entries, head, signed)
        text = _describe_lost([one for one in lost[kept - start :] if one.kind == "version"])
        self._on_note(f"the coordinator was restored from a backup{text}")

    def compare(self, head: LogHead, signed: bytes, known: Known) -> bool:
        """Compare a head that has no more entries than ours. Raises LogConflict.

        False if it is too old to compare.
        """
        expected = self.store.hash_at(head.size)
        if expected is not None and expected != head.hash:
            entries = self.store.entries(head.size, known.size)
            self._forked(signed, known.head, expected, entries)
        other = self.store.head_of_ledger(head.ledger)
        if other and self._has_other_ledger(other, head):
            self._forked(signed, other, wire.START, [])
        return expected is not None

    def _has_other_ledger(self, other: bytes, head: LogHead) -> bool:
        """Whether an accepted head contradicts this one about the ledger."""
        ours = wire.SIGNED_HEAD.decode(other[64:])
        same = (ours.epoch, ours.ledger) == (head.epoch, head.ledger)
        return same and ours.ledger_hash != head.ledger_hash

    def check_epoch(self, head: LogHead, signed: bytes) -> None:
        """Remember the head's epoch. Raise LogConflict if it is shown long after a newer one."""
        if newer := self.store.newer_epoch(head.epoch, head.at - MAX_CLOCK_SKEW_S):
            self._forked(signed, newer, wire.START, [])
        self.store.note_epoch(head, signed)

    def _forked(self, first: bytes, second: bytes, before: bytes, entries: list[bytes]) -> None:
        """Keep the proof and raise LogConflict; BadMessage if the proof would show nothing."""
        joined = enrollment_file.read_enrollment(self._home)
        cards = (joined.card, self.store.meta("old card"))
        proof = ForkProof(
            fleet=self._fleet,
            transitions=joined.transitions,
            cards=tuple(dict.fromkeys(filter(None, cards))),
            first=first,
            second=second,
            before=before,
            entries=tuple(entries[: fork_proof.MAX_PROOF_ENTRIES]),
        )
        text = fork_proof.check(self._ca_pem, proof)
        self.keep(proof, text)
        raise LogConflict(text, NEXT_STEP)

    def keep(self, proof: ForkProof, text: str) -> None:
        is_new = not self.is_forked
        try:
            path = fork_proofs.save(self._home, proof)
        except OSError as err:
            self._is_unsaved = True
            log.error("the proof cannot be stored: %s", err)
            path = fork_proofs.path_of(self._home, proof)
        self.store.set_meta("forked", b"1")
        encoded = fork_proof.encode(proof)
        self.proof = encoded if len(encoded) <= seen_heads.MAX_GOSSIP_PROOF_BYTES else b""
        if is_new:
            self._on_fork(f"{text}; proof: {path}; {NEXT_STEP}")


def _open_store(home: Path, fleet: str) -> LogStore:
    try:
        return LogStore(home, fleet)
    except HomeError as err:
        log.warning("%s; it is moved to log.db.damaged, and the log is read again", err.message)
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
