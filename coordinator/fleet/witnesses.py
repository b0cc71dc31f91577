"""Stores the statements of peers about our log of versions, and passes them on to other peers.

A peer that has seen a head that our ledger does not have was shown another log under our key: the
home was copied back by hand, or another coordinator uses the same keys.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from functools import partial

from coordinator.fleet.registry import Registry
from coordinator.storage.ledger import Ledger
from coordinator.storage.seen_heads import SeenHeads
from coordinator.storage.version_log import VersionLog
from protocols.enrollment import identity
from protocols.errors import BadMessage
from protocols.messages.version_log import SIGNED_HEAD, LogHead, LogNews
from protocols.messages.work import SIGNED_CHARGED
from protocols.p2p import seen_heads

log = logging.getLogger("commonweight.hub")

#: How many statements of other peers an agent gets at once.
MAX_PASSED_ON = 8


class Witnesses:
    """`public` is our Ed25519 key. `report(text, peer)` is called once for each peer that has seen
    another log."""

    def __init__(
        self,
        store: SeenHeads,
        version_log: VersionLog,
        ledger: Ledger,
        registry: Registry,
        public: bytes,
    ) -> None:
        self._store, self._log, self._ledger, self._registry = store, version_log, ledger, registry
        self._public = public
        self.report: Callable[[str, str], None] = lambda text, peer: None
        self._newest: dict[str, bytes] = {}
        #: Peers that were reported: for another log, and for an invalid statement.
        self._contradicted: set[str] = set()
        self._unusable: set[str] = set()

    def exchange(self, peer: str, data: bytes) -> LogNews:
        """Take a peer's statement (empty: none yet), and return the news for it."""
        if data and self._newest.get(peer) != data:
            try:
                self._take(peer, data)
            except BadMessage as err:
                if peer not in self._unusable:
                    self._unusable.add(peer)
                    log.warning(
                        "the statement of %s about our log cannot be used: %s", peer, err.message
                    )
        others = [seen for other, seen in self._newest.items() if other != peer]
        tail = self._log.head()
        return LogNews(
            head=tail.head,
            page=tail.page,
            seen=tuple(random.sample(others, min(MAX_PASSED_ON, len(others)))),
        )

    def exchange_charged(self, peer: str, data: bytes) -> bytes:
        """Take a peer's statement about its owner's charges. Returns its own earlier statement with
        more of them, else nothing: its home was restored then."""
        known = self._registry.peers.get(peer)
        if known is None:
            return b""
        try:
            head = SIGNED_CHARGED.unpack(data, partial(identity.verify, known.sign_public))
        except BadMessage as err:
            log.warning(
                "the statement of %s about its charges cannot be used: %s", peer, err.message
            )
            return b""
        if head.peer != peer:
            return b""
        most = self._store.add_charged(peer, head.count, data)
        return most.data if most.ledger > head.count else b""

    def forget(self, peer: str) -> None:
        """Delete the statements of a removed peer."""
        self._newest.pop(peer, None)

    def _take(self, peer: str, data: bytes) -> None:
        known = self._registry.peers.get(peer)
        if known is None:
            raise BadMessage("it is no peer")
        # After a rotation of our key, peers cannot use the older head.
        head = SIGNED_HEAD.unpack(
            seen_heads.read(data, peer, known.sign_public).head,
            partial(identity.verify, self._public),
        )
        self._newest[peer] = data
        if contradiction := self._contradiction(head):
            if peer not in self._contradicted:
                self._contradicted.add(peer)
                self.report(f"{known.name} {contradiction}", peer)
            return
        self._store.add(peer, head, data)

    def _contradiction(self, head: LogHead) -> str:
        """How our ledger contradicts a head that we have signed; empty if it does not."""
        entry = self._ledger.entry(head.ledger)
        if head.ledger == 0 or (entry is not None and entry.hash == head.ledger_hash):
            return ""
        if head.epoch < self._log.epoch:
            return ""  # of before a restore: the audit says what was lost
        return (
            f"has seen entry {head.ledger} of a ledger that is not this one, signed with our key "
            f"at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(head.at))}. Was the home "
            "copied back without commonweight admin restore, or does a second coordinator use it?"
        )
