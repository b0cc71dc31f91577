"""Helps a coordinator that lost its disk: tells which version is here, and sends it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flwr.app import ConfigRecord, RecordDict

from agent.clientapp.app import CLAIM
from agent.clientapp.interfaces import PeerIdentity
from agent.transport.version_proofs import list_verified
from protocols.errors import Refused
from protocols.messages.work import SIGNED_CLAIM, UpdateClaim, Work
from protocols.p2p.gossip import version_number

PROOF = "cw.proof"


class Recall(NamedTuple):
    """Answers "holdings" and "recall". `send(digest, path)` uploads.

    `on_leaving(claim, task, told)` is called before an answer is sent. If it raises, nothing is.
    """

    me: PeerIdentity
    folder: Path
    send: Callable[[str, Path], None]
    on_leaving: Callable[[UpdateClaim, str, bytes], None]

    def answer(self, work: Work) -> RecordDict:
        """Returns the content of the reply. Raises Refused if the version is not here."""
        verified = list_verified(self.folder, self.me.coordinator_public, self.me.fleet)
        if work.kind == "holdings":
            versions = [version for version in verified if version.work.run == work.run]
            if not versions:
                return RecordDict({CLAIM: self._claim(work, "", 0)})
            newest = max(versions, key=lambda version: version_number(version.work))
            proof = ConfigRecord({"work": newest.payload, "signature": newest.signature})
            return RecordDict({CLAIM: self._claim(work, "", 0, newest.payload), PROOF: proof})
        for version in verified:
            if version.work.base == work.base:
                claim = self._claim(work, work.base, version.path.stat().st_size)
                self.send(work.base, version.path)
                return RecordDict({CLAIM: claim})
        raise Refused(f"version {work.base[:12]} is no longer here")

    def _claim(self, work: Work, digest: str, nbytes: int, told: bytes = b"") -> ConfigRecord:
        payload, signature = self.me.sign_claim(work, digest=digest, nbytes=nbytes, num_examples=0)
        self.on_leaving(SIGNED_CLAIM.decode(payload), work.task, told)
        return ConfigRecord({"claim": payload, "signature": signature})
