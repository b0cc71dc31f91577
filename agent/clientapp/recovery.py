"""Helps a coordinator that lost its disk: lists this peer's versions and sends them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flwr.app import ConfigRecord, RecordDict

from agent.clientapp.app import CLAIM
from agent.clientapp.interfaces import PeerIdentity
from agent.transport.version_proofs import list_verified
from protocols.errors import Refused
from protocols.messages.work import Work
from protocols.p2p.gossip import version_number

PROOF = "cw.proof"


class Recall(NamedTuple):
    """Answers "holdings" and "recall". `send(digest, path)` uploads."""

    me: PeerIdentity
    folder: Path
    send: Callable[[str, Path], None]

    def answer(self, work: Work) -> RecordDict:
        """Returns the content of the reply. Raises Refused if the version is not here."""
        verified = list_verified(self.folder, self.me.coordinator_public)
        if work.kind == "holdings":
            versions = [version for version in verified if version.work.run == work.run]
            content = RecordDict({CLAIM: self._claim(work, "", 0)})
            if versions:
                newest = max(versions, key=lambda version: version_number(version.work))
                content[PROOF] = ConfigRecord(
                    {"work": newest.payload, "signature": newest.signature}
                )
            return content
        for version in verified:
            if version.work.base == work.base:
                self.send(work.base, version.path)
                nbytes = version.path.stat().st_size
                return RecordDict({CLAIM: self._claim(work, work.base, nbytes)})
        raise Refused(f"version {work.base[:12]} is no longer here")

    def _claim(self, work: Work, digest: str, nbytes: int) -> ConfigRecord:
        payload, signature = self.me.sign_claim(work, digest=digest, nbytes=nbytes, num_examples=0)
        return ConfigRecord({"claim": payload, "signature": signature})
