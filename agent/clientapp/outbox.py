"""The agent's last finished answer, safe on disk until its round is surely over.

The same question, asked again after a lost link, costs nothing: the answer is sent once more.
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
    """A finished answer in the outbox; `description` goes with the claim of one."""

    key: str
    claim: bytes
    signature: bytes
    description: bytes = b""


class Outbox:
    """The answer in `folder`, its update's file, and what belongs to updates from run to run."""

    def __init__(self, folder: Path, peer: str, sign: envelope.Sign) -> None:
        self.folder, self._peer, self._sign = folder, peer, sign
        self.update = folder / "update.safetensors"
        self.trained = folder / "trained.safetensors"
        self.leftovers = ErrorFeedback(folder / "leftovers")
        self.personal = RunStateFolder(folder / "personal", ".kept")
        self.answer = folder / "finished.json"
        #: The update that is known to be whole; what a life before has left is looked at.
        self._made = ""

    def clear(self) -> None:
        """The update is about to be overwritten: its answer goes first."""
        self.answer.unlink(missing_ok=True)
        # Some file systems write out at once what takes another file's place.
        unlink(self.update)

    def finished(self, work: Work) -> Finished | None:
        """The answer to this work, if it is in the outbox already."""
        last = self._last()
        return last if last is not None and last.key == _key(work) else None

    def _last(self) -> Finished | None:
        """The answer that is in the outbox."""
        try:
            last = msgspec.json.decode(self.answer.read_bytes(), type=Finished)
            claim = SIGNED_CLAIM.decode(last.claim)
            if not claim.digest or last.description:
                return last
            # Whatever became of the bytes, another training makes them anew.
            if self.update.stat().st_size != claim.nbytes:
                return None
            if claim.digest != self._made and file_digest(self.update) != claim.digest:
                return None  # the power failed before its sync
            self._made = claim.digest
            return last
        except (OSError, msgspec.DecodeError, BadMessage):
            return None

    def keep(
        self, work: Work, outcome: Done, description: bytes = b"", *, synced: bool = True
    ) -> Finished:
        """The outcome as a signed claim, safe in the outbox; its update has still to be synced.

        Not `synced`: a power cut may cost the answer, which can be given again, until `answer` is.
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
        """Where this peer's own part of the run's model lies, if the run has such a part."""
        if personalization.SETTINGS.isdisjoint(work.settings):
            return None
        return self.personal.paths(work.run)

    def settle(self, digest: str) -> None:
        """The update with this digest (empty: none) is the one that is sent."""
        self.leftovers.settle(digest)
        self.personal.commit(digest)

    def settle_last(self) -> None:
        """What belongs to an update that was never sent is of no use."""
        last = self._last()
        self.settle(SIGNED_CLAIM.decode(last.claim).digest if last else "")


def _key(work: Work) -> str:
    turn = f" {work.turn}" if work.turn else ""
    return f"{work.run} {work.round} {work.kind} {work.base}{turn}"
