"""Sends the coordinator the number of entries in the owner's ledger of privacy, and gets it back.

A home that was restored from a backup lacks the charges made since then. The coordinator keeps the
highest number that this machine has signed, and returns it to a ledger with fewer entries. That
ledger then charges no answer with noise until its owner has confirmed (`PrivacyLedger.learn`).
Only this machine's own signature counts, so the coordinator cannot invent a number; it could
withhold one.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from agent.home.privacy_ledger import PrivacyLedger
from protocols.enrollment import identity
from protocols.enrollment.identity import SigningKey
from protocols.errors import CommonweightError
from protocols.messages.work import SIGNED_CHARGED, ChargedHead

log = logging.getLogger("commonweight.privacy")


class ChargedHeads:
    """The number of entries in the ledger `file` of this peer. Call from any thread.

    `on_note(text)` is called for what the owner should know.
    """

    def __init__(
        self, file: Path, peer: str, key: SigningKey, on_note: Callable[[str], None] = log.error
    ) -> None:
        self._file, self._peer, self._key, self._on_note = file, peer, key, on_note
        self._lock = threading.Lock()
        self._ledger: PrivacyLedger | None = None
        #: The number that the coordinator has been told in this session; -1 for none.
        self._told = -1

    def reset(self) -> None:
        """A new session: the coordinator may have been restored as well."""
        self._told = -1

    def statement(self) -> bytes:
        """Our signed statement for the next request; empty if there is nothing new."""
        with self._lock:
            try:
                has_file = self._ledger is not None or os.path.exists(self._file)
                count = self._open().head() if has_file else 0
            except CommonweightError as err:  # then nothing can be charged either
                log.warning("%s", err)
                return b""
            if count == self._told:
                return b""
            self._told = count
        return SIGNED_CHARGED.pack(ChargedHead(self._peer, count), self._key.sign)

    def take(self, data: bytes) -> None:
        """Take a statement that the coordinator has of this machine. Logs what is wrong."""
        try:
            public = identity.public_bytes(self._key)
            head = SIGNED_CHARGED.unpack(data, partial(identity.verify, public))
            if head.peer != self._peer:
                return
            with self._lock:
                loss = self._open().learn(head.count)
        except CommonweightError as err:
            log.warning("the coordinator's statement about this machine's charges: %s", err)
            return
        if loss:
            self._on_note(loss)

    def _open(self) -> PrivacyLedger:
        if self._ledger is None:
            self._ledger = PrivacyLedger(self._file)
        return self._ledger
