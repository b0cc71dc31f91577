"""The agent's last finished reply, kept on disk until its round is over.

A repeated request after a lost connection costs nothing: the reply is sent again.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import msgspec
from msgspec import Struct

from agent.clientapp.error_feedback import ErrorFeedback
from agent.home.run_state import RunStateFolder, RunStatePaths
from agent.tasks.work import Done
from protocols.codecs import registry
from protocols.errors import BadMessage
from protocols.local.atomic_files import replacing
from protocols.local.background_unlink import unlink
from protocols.messages import envelope
from protocols.messages.work import SIGNED_CLAIM, UpdateClaim, Work
from protocols.model import personalization
from protocols.model.weights import file_digest


class Finished(Struct, frozen=True, kw_only=True):
    """A finished reply in the outbox: a signed claim, and perhaps a description."""

    key: str
    claim: bytes
    signature: bytes
    description: bytes = b""


class Outbox:
    """The reply in `folder`, the file of its update, and state that lasts between updates."""

    def __init__(self, folder: Path, peer: str, sign: envelope.Sign) -> None:
        self.folder, self._peer, self._sign = folder, peer, sign
        self.update = folder / "update.safetensors"
        self.trained = folder / "trained.safetensors"
        self.leftovers = ErrorFeedback(folder / "leftovers")
        self.personal = RunStateFolder(folder / "personal", ".kept")
        self.answer = folder / "finished.json"
        #: The digest of the verified update. A file from before a restart is verified first.
        self._made = ""

    def clear(self) -> None:
        """Deletes the reply before its update is overwritten."""
        self.answer.unlink(missing_ok=True)
        # Some file systems write a file at once when it replaces another.
        unlink(self.update)

    def finished(self, work: Work) -> Finished | None:
        """Returns the reply to this work if it is in the outbox."""
        last = self._last()
        return last if last is not None and last.key == _key(work) else None

    def _last(self) -> Finished | None:
        """Returns the reply in the outbox, or None."""
        try:
            last = msgspec.json.decode(self.answer.read_bytes(), type=Finished)
            claim = SIGNED_CLAIM.decode(last.claim)
            if not claim.digest or last.description:
                return last
            # If the bytes are damaged, training makes them again.
            if self.update.stat().st_size != claim.nbytes:
                return None
            if claim.digest != self._made and file_digest(self.update) != claim.digest:
                return None  # power failed before its fsync
            self._made = claim.digest
            return last
        except (OSError, msgspec.DecodeError, BadMessage):
            return None

    def keep(
        self, work: Work, outcome: Done, description: bytes = b"", *, synced: bool = True
    ) -> Finished:
        """Signs the outcome and stores it in the outbox. The update still needs an fsync.

        Without `synced` a power cut may lose the reply, which can be made again.
        """
        claim = UpdateClaim(
            run=work.run,
            round=work.round,
            kind=work.kind,
            turn=work.turn,
            peer=self._peer,
            base=work.base,
            digest=outcome.digest,
            nbytes=outcome.nbytes,
            codec=work.codec if work.kind == "train" else registry.UNCODED,
            num_examples=outcome.num_examples,
            metrics=outcome.metrics,
            tallies=outcome.tallies,
            nonce=secrets.token_hex(12),
        )
        payload, signature = SIGNED_CLAIM.seal(claim, self._sign)
        finished = Finished(
            key=_key(work), claim=payload, signature=signature, description=description
        )
        with replacing(self.answer, synced=synced) as file:
            file.write(msgspec.json.encode(finished))
        self.settle(claim.digest)
        self._made = claim.digest
        return finished

    def own(self, work: Work) -> RunStatePaths | None:
        """Returns the files of the model's personal part, if the run has one."""
        if personalization.SETTINGS.isdisjoint(work.settings):
            return None
        return self.personal.paths(work.run)

    def settle(self, digest: str) -> None:
        """Makes state of the update with this digest permanent; empty for none."""
        self.leftovers.settle(digest)
        self.personal.commit(digest)

    def settle_last(self) -> None:
        """Discards state of an update that was never sent."""
        last = self._last()
        self.settle(SIGNED_CLAIM.decode(last.claim).digest if last else "")


def _key(work: Work) -> str:
    turn = f" {work.turn}" if work.turn else ""
    return f"{work.run} {work.round} {work.kind} {work.base}{turn}"
