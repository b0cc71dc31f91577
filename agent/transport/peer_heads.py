"""The heads of the log that other peers have seen, compared with the replica of this agent."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import NamedTuple

from agent.home.credentials import Credentials
from agent.transport.log_replica import LogReplica
from protocols.enrollment import fork_proof
from protocols.enrollment.ca_chain import CaTrust
from protocols.errors import BadMessage, DiskFull, HomeError, LogConflict
from protocols.messages.version_log import LogHead
from protocols.p2p import seen_heads
from protocols.p2p.seen_heads import SeenHead, VerifiedSeen

log = logging.getLogger("commonweight.log")

#: The coordinator shows each agent the log's growth within seconds. If a peer has seen an entry for
#: this long and this agent has not, the coordinator hides it.
MAX_BEHIND_S = 300.0
#: Statements that wait, and peers whose last one is remembered.
_MAX_WAITING, _MAX_PEERS = 256, 4096


class _Ahead(NamedTuple):
    """A peer has seen this head, which ours had not reached `since` a time (monotonic s)."""

    seen: SeenHead
    head: LogHead
    since: float


class PeerHeads:
    """Statements and proofs of other peers. `FollowedLog` holds its lock around each call but
    `offer` and `has_waiting`, which never block.

    `cas`: the CAs that may certify a peer.
    """

    def __init__(
        self, replica: LogReplica, credentials: Credentials, cas: CaTrust, fleet: str
    ) -> None:
        self._replica, self._credentials = replica, credentials
        self._cas, self._fleet = cas, fleet
        self._waiting: deque[bytes] = deque(maxlen=_MAX_WAITING)
        #: By peer: its last statement, and the time when it was made.
        self._statements: dict[str, tuple[bytes, float]] = {}
        #: By peer: a head that ours has not reached, to compare when it has.
        self._ahead: dict[str, _Ahead] = {}

    def offer(self, *statements: bytes) -> None:
        """Take statements or proofs of peers, to look at them in the next `process`."""
        self._waiting.extend(filter(None, statements))

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    @property
    def num_statements(self) -> int:
        """Peers whose last statement is known."""
        return len(self._statements)

    def forget_ahead(self) -> None:
        """Forget the heads that the replica has not reached."""
        self._ahead.clear()

    def process(self) -> None:
        """Compare the heads that have arrived. Blocking; logs what is wrong."""
        while self._waiting:
            data = self._waiting.popleft()
            try:
                if data.startswith(b"{"):
                    self._take_proof(data)
                else:
                    self._take(data)
            except LogConflict:
                continue  # `on_fork` reports it
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
        head = self._replica.verified(peer.seen.head)
        if head.at <= self._replica.ignored_before:
            return
        self._statements.pop(name, None)
        self._statements[name] = (data, at)
        while len(self._statements) > _MAX_PEERS:
            del self._statements[next(iter(self._statements))]
        self._compare_seen(peer, head)

    def _compare_seen(self, peer: VerifiedSeen, head: LogHead) -> None:
        signed = peer.seen.head
        self._replica.note_term(head)
        self._replica.check_epoch(head, signed)
        known = self._replica.store.newest()
        if known is None or head.epoch != self._replica.epoch or head.size > known.size:
            # The first one stays: a log that always grows faster than ours would never be reached.
            if len(self._ahead) < _MAX_PEERS:
                ahead = _Ahead(peer.seen, head, time.monotonic())
                self._ahead.setdefault(peer.seen.peer, ahead)
            return
        if self._replica.compare(head, signed, known):
            self._replica.store.confirm(peer.seen.peer, head.size, peer.seen.at)

    def compare_waiting(self) -> None:
        """Compare the heads of peers that ours has reached. Raises LogConflict."""
        known = self._replica.store.newest()
        if known is None:
            return
        for peer, (seen, head, _) in list(self._ahead.items()):
            if head.epoch < self._replica.epoch:  # it was ahead before a restore
                del self._ahead[peer]
            elif head.epoch == self._replica.epoch and head.size <= known.size:
                del self._ahead[peer]
                if self._replica.compare(head, seen.head, known):
                    self._replica.store.confirm(peer, head.size, seen.at)

    def _take_proof(self, data: bytes) -> None:
        """Take over another peer's proof, if it is one and not of before the owner's consent."""
        proof = fork_proof.decode(data)
        text = fork_proof.check(self._credentials.ca_pem, proof)
        newest = max(head.at for head in fork_proof.heads(self._credentials.ca_pem, proof))
        if newest > self._replica.ignored_before:
            self._replica.keep(proof, text)

    def check_not_behind(self) -> None:
        """Raise LogConflict if another peer has long seen what this agent is not shown."""
        known = self._replica.store.newest()
        for peer, (_, head, since) in self._ahead.items():
            if time.monotonic() - since > MAX_BEHIND_S:
                raise LogConflict(
                    f"the peer {peer} has seen {head.size} entries of the coordinator's log"
                    + (" after a restore" if head.epoch > self._replica.epoch else "")
                    + f", and this machine is shown {known.size if known else 0}",
                    "ask the operator why; commonweight-agent ledger audit show",
                )
