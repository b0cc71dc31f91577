"""Helps a coordinator that lost its disk: lists this peer's versions and sends them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, RecordDict

from agent.clientapp.app import CLAIM
from agent.clientapp.interfaces import PeerIdentity
from agent.transport.version_proofs import ProvenVersion, list_verified
from protocols.errors import Refused
from protocols.messages.work import SIGNED_CLAIM, UpdateClaim, Work
from protocols.p2p.gossip import version_number

PROOF = "cw.proof"


class Recall:
    """Answers "holdings" and "recall". `send(digest, path)` uploads."""

    def __init__(self, me: PeerIdentity, folder: Path, send: Callable[[str, Path], None]) -> None:
        self._me, self._folder, self._send = me, folder, send

    def answer(self, work: Work) -> RecordDict:
        """Returns the content of the reply. Raises Refused if the version is not here."""
        mine = list_verified(self._folder, self._me.coordinator_public)
        if work.kind == "holdings":
            return self._tell([kept for kept in mine if kept.work.run == work.run], work)
        for kept in mine:
            if kept.work.base == work.base:
                self._send(work.base, kept.path)
                return RecordDict({CLAIM: self._claim(work, work.base, kept.path.stat().st_size)})
        raise Refused(f"version {work.base[:12]} is no longer here")

    def _tell(self, mine: list[ProvenVersion], work: Work) -> RecordDict:
        content = RecordDict({CLAIM: self._claim(work, "", 0)})
        if mine:
            newest = max(mine, key=lambda kept: version_number(kept.work))
            content[PROOF] = ConfigRecord({"work": newest.payload, "signature": newest.signature})
        return content

    def _claim(self, work: Work, digest: str, nbytes: int) -> ConfigRecord:
        claim = UpdateClaim(
            run=work.run,
            round=work.round,
            kind=work.kind,
            peer=self._me.peer,
            base=work.base,
            digest=digest,
            nbytes=nbytes,
            num_examples=0,
            nonce=secrets.token_hex(12),
        )
        payload, signature = SIGNED_CLAIM.seal(claim, self._me.sign)
        return ConfigRecord({"claim": payload, "signature": signature})
