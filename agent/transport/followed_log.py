"""Follows the coordinator's log of versions, and compares it with what other peers have seen.

Work counts only if its version is in the log that the coordinator signed for this agent
(`log_replica`). Heads of other peers arrive later and by any path: the coordinator passes them on,
and peers exchange them directly. Two heads that contradict each other are a proof; the agent then
takes no work until its owner acknowledges that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from agent.home import fleet_trust
from agent.home.credentials import Credentials
from agent.home.enrollment_file import Enrollment
from agent.transport.log_replica import NEXT_STEP, LogReplica
from agent.transport.peer_heads import PeerHeads
from protocols.errors import (
    CommonweightError,
    LogConflict,
    Unwitnessed,
)
from protocols.messages import version_log as wire
from protocols.messages.version_log import LogHead, LogNews, LogPage
from protocols.messages.work import Work
from protocols.p2p import seen_heads
from protocols.p2p.gossip import version_number
from protocols.p2p.seen_heads import SeenHead

log = logging.getLogger("commonweight.log")

#: The interval of this agent's statements to the coordinator: in a small and in a large fleet.
TELL_EVERY_S, TELL_EVERY_IN_LARGE_FLEET_S, LARGE_FLEET = 2.0, 15.0, 16
#: Versions older than this must have been seen by the owner's witnesses.
WITNESS_LAG_S = 60.0


class Witnesses(NamedTuple):
    """Of the peers in `witnesses`, `min_witnesses` must have shown what they see."""

    needed: int = 0
    peers: tuple[str, ...] = ()


class FollowedLog:
    """This agent's view of the log. Call from threads; only marked methods never block.

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
        self._credentials, self._certificate = credentials, certificate
        self.on_fork: Callable[[str], None] = lambda text: None
        self.on_note: Callable[[str], None] = log.warning
        self.witnesses: Callable[[], Witnesses] = Witnesses
        self._lock = threading.RLock()
        cas = fleet_trust.trusted_cas(enrollment)
        self._replica = LogReplica(
            home,
            enrollment,
            credentials.ca_pem,
            fetch,
            on_fork=lambda text: self.on_fork(text),
            on_note=lambda text: self.on_note(text),
        )
        self._store = self._replica.store
        self._peers = PeerHeads(self._replica, credentials, cas, enrollment.fleet)
        self._told_at, self._warned = -1e9, False
        #: Ours, for gossip.
        self._seen = b""
        self.refresh()

    def close(self) -> None:
        with self._lock:
            self._store.close()

    # --- the owner ---

    @property
    def is_forked(self) -> bool:
        """True while a proof is not acknowledged."""
        return self._replica.is_forked

    def refresh(self) -> bool:
        """Start again if the owner has acknowledged the proofs. True while one is open."""
        if self.is_forked:
            return True
        with self._lock:
            if self._replica.forget_fork():
                self._peers.forget_ahead()
                self._seen = b""
        return False

    # --- the coordinator's log ---

    def check_work(self, work: Work, head: bytes, page: bytes) -> None:
        """Raise LogConflict or Unwitnessed unless the log that was shown so far has this version.

        Raises FormerLeader, BadMessage, Unreachable.
        """
        with self._lock:
            self.process()
            if self.refresh():
                raise LogConflict(
                    "the coordinator showed two versions, and this machine's owner has the proof",
                    NEXT_STEP,
                )
            if not head:
                self._without_log()
                return
            signed = self._follow(head, wire.decode_page(page))
            self._peers.check_not_behind()
            if work.kind in ("train", "evaluate"):
                self._check_version(work, signed)
                self.check_witnesses()

    def _without_log(self) -> None:
        """Work of an older coordinator, which keeps no log. Raises LogConflict, Unwitnessed."""
        if self._store.newest() is not None or self._peers.num_statements:
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
                "this coordinator is older and keeps no log of versions, so this agent cannot "
                "notice that other peers are shown other versions"
            )

    def _check_version(self, work: Work, head: LogHead) -> None:
        number = version_number(work)

        def is_there() -> bool:
            return self._store.has_version(work.run, number, work.base, head.size)

        if not is_there() and not self._replica.read_older(is_there):
            raise LogConflict(
                f"version {number} of run {work.run} ({work.base[:12]}) is not in the log of "
                "versions that the coordinator signed",
                "ask the operator what runs at the coordinator's address; other peers may have "
                "got another version",
            )

    def news(self, news: LogNews) -> None:
        """Take the newest head and the statements of other peers. Logs what is wrong."""
        with self._lock:
            try:
                if not self.refresh():
                    self._follow(news.head, wire.decode_page(news.page))
            except LogConflict:
                pass  # `on_fork` reports it
            except CommonweightError as err:
                log.info("the coordinator's log of versions: %s", err.message)
            self._peers.offer(*news.seen)
            self._peers.process()

    def _follow(self, signed: bytes, page: LogPage) -> LogHead:
        """Accept a head that continues the log. Raises as `LogReplica.follow`."""
        head = self._replica.follow(signed, page)
        newest = self._store.newest()
        if newest is not None and newest.head == signed:
            self._seen = b""
        self._peers.compare_waiting()
        return head

    # --- other peers ---

    def offer(self, statement: bytes, proof: bytes = b"") -> None:
        """Take a peer's statement or proof, to look at it in the next `process`. Never blocks."""
        self._peers.offer(statement, proof)

    @property
    def has_waiting(self) -> bool:
        return self._peers.has_waiting

    def process(self) -> None:
        """Compare the heads that have arrived. Blocking; logs what is wrong."""
        with self._lock:
            self._peers.process()

    def statement(self) -> bytes | None:
        """The statement for the coordinator: signed, and empty before the first head.

        None: nothing is due.
        """
        now = time.monotonic()
        is_large = self._peers.num_statements > LARGE_FLEET
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

    def to_publish(self) -> bytes:
        """The MQTT message for peers: a small proof, or our statement. Empty before the first."""
        return self._replica.proof or self.seen()

    def last_seen(self) -> tuple[bytes, bytes]:
        """Our last statement and a small proof, if any, for gossip. Never blocks."""
        return self._seen, self._replica.proof

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
