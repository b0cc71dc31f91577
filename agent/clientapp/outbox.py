"""The agent's last finished reply, kept on disk until its round is over.

A repeated request after a lost connection costs nothing: the reply is sent again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import msgspec
from msgspec import Struct

from agent.clientapp.error_feedback import ErrorFeedback
from agent.clientapp.interfaces import PeerIdentity
from agent.home.run_state import RunStateFolder, RunStatePaths
from agent.tasks.work import Done
from protocols.codecs import registry
from protocols.errors import BadMessage
from protocols.local.atomic_files import fsync_files, write_private
from protocols.local.background_unlink import unlink
from protocols.local.disk_space import check_room
from protocols.messages.work import SIGNED_CLAIM, Work
from protocols.model import personalization
from protocols.model.weights import file_digest

#: The name of the file of an update.
UPDATE = "update.safetensors"
#: The folder of a peer's own parts of models, and how their files end.
PERSONAL, KEPT = "personal", ".kept"


class Finished(Struct, frozen=True, kw_only=True):
    """A finished reply in the outbox: a signed claim, and perhaps a description.

    `privacy`: what its update costs if it leaves (`Done.privacy`). Empty for replies of older
    versions of this program, which had charged it before they wrote the reply.
    """

    key: str
    claim: bytes
    signature: bytes
    description: bytes = b""
    privacy: str = ""

    @property
    def digest(self) -> str:
        """The digest of the update; empty without one."""
        return "" if self.description else _digest_in(self.claim)


@lru_cache(4)  # asked several times for each reply
def _digest_in(claim: bytes) -> str:
    return SIGNED_CLAIM.decode(claim).digest


class Outbox:
    """The reply in `folder`, the file of its update, and state that lasts between updates.

    Unless `is_durable`, a power cut may lose or damage the last update, and a restart loses replies
    that can be made again.
    """

    def __init__(self, folder: Path, me: PeerIdentity, *, is_durable: bool = True) -> None:
        self.folder, self._me, self._is_durable = folder, me, is_durable
        self._has_folder = False
        if is_durable:
            self._make_folder()
        self.update = folder / UPDATE
        self.trained = folder / "trained.safetensors"
        self.error_feedback = ErrorFeedback(folder / "leftovers")
        self.personal = RunStateFolder(folder / PERSONAL, KEPT)
        #: This peer's own weights after a round, from which the next one begins (`training_ahead`).
        self.running = RunStateFolder(folder / "running", ".weights")
        self.answer = folder / "finished.json"
        #: The digest of the verified update. A file from before a restart is verified first.
        self._verified = ""
        #: The key of the reply in `answer`; empty for none, None if that file must be read.
        self._key: str | None = None
        self._syncing: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def _make_folder(self) -> None:
        if not self._has_folder:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._has_folder = True

    def check_room(self, nbytes: int) -> None:
        """Raises DiskFull or Refused if there is no room for this number of bytes."""
        self._make_folder()
        check_room(self.folder, nbytes)

    def clear(self) -> None:
        """Deletes the reply before its update is overwritten."""
        self._make_folder()
        self._key = None
        self.answer.unlink(missing_ok=True)
        self._key = ""
        # Some file systems write a file at once when it replaces another.
        unlink(self.update)

    def finished(self, work: Work, columns: Sequence[str] = ()) -> Finished | None:
        """Returns the reply to this work, done with these columns, if it is in the outbox."""
        key = _key(work, columns)
        if self._key is not None and self._key != key:
            return None
        last = self._last()
        return last if last is not None and last.key == key else None

    def _last(self) -> Finished | None:
        """Returns the reply in the outbox, or None."""
        try:
            last = msgspec.json.decode(self.answer.read_bytes(), type=Finished)
            claim = SIGNED_CLAIM.decode(last.claim)
            if claim.fleet != self._me.fleet:
                return None  # of an older version of this program, whose claims are refused
            if not claim.digest or last.description:
                return last
            # If the bytes are damaged, training makes them again.
            if self.update.stat().st_size != claim.nbytes:
                return None
            if claim.digest != self._verified and file_digest(self.update) != claim.digest:
                return None  # power failed before its fsync
            self._verified = claim.digest
            return last
        except (OSError, msgspec.DecodeError, BadMessage):
            return None

    def keep(
        self,
        work: Work,
        done: Done,
        description: bytes = b"",
        *,
        synced: bool = True,
        columns: Sequence[str] = (),
    ) -> Finished:
        """Signs the result and stores it in the outbox. The update still needs an fsync.

        Without `synced` a power cut may lose the reply, which can be made again.
        """
        claim, signature = self._me.sign_claim(
            work,
            digest=done.digest,
            nbytes=done.nbytes,
            codec=work.codec if work.kind == "train" else registry.UNCODED,
            num_examples=done.num_examples,
            num_held_out=done.num_held_out,
            metrics=done.metrics,
            tallies=done.tallies,
        )
        finished = Finished(
            key=_key(work, columns),
            claim=claim,
            signature=signature,
            description=description,
            privacy=done.privacy,
        )
        self._key = None
        if self._is_durable or (synced and not description):
            write_private(self.answer, msgspec.json.encode(finished), synced=synced)
            self._key = finished.key
        self.commit(done.digest)
        self._verified = done.digest
        return finished

    def start_sync(self, then: Callable[[], None]) -> None:
        """Fsyncs update and reply in a thread while they upload, then calls `then`.

        Seconds a round without it: 1.35 at 40 MB, 16.2 at 400 MB. With it: 1.10 and 1.35, 6.7 and
        13.8 (two agents on a loaded machine, in turns).
        """
        if not self._is_durable:
            then()
            return

        def sync() -> None:
            fsync_files(self.update, self.answer)
            then()

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "sync")
        self._syncing = self._thread.submit(sync)

    def wait_for_sync(self) -> None:
        """Waits for the last fsync. Raises its OSError."""
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def personal_paths(self, work: Work) -> RunStatePaths | None:
        """Returns the files of the model's personal part, if the run has one."""
        if personalization.SETTINGS.isdisjoint(work.settings):
            return None
        return self.personal.paths(work.run)

    def commit(self, digest: str) -> None:
        """Makes state of the update with this digest permanent; empty for none."""
        self.error_feedback.commit(digest)
        self.personal.commit(digest)
        self.running.commit(digest)

    @property
    def has_state(self) -> bool:
        """True if an update may have left state on this peer."""
        folders = self.error_feedback, self.personal, self.running
        return not all(folder.is_empty for folder in folders)

    def commit_last(self, promised: str = "") -> None:
        """Discards state of an update that was never sent. `promised`: the digest of one that is
        not in the outbox, and counts."""
        last = None if promised else self._last()
        self.commit(SIGNED_CLAIM.decode(last.claim).digest if last else promised)


def _key(work: Work, columns: Sequence[str]) -> str:
    """Equal for work whose reply is the same."""
    turn = f" {work.turn}" if work.turn else ""
    how = settings_key(work, columns)
    return f"{work.run} {work.round} {work.kind} {work.base}{turn} {how}"


def settings_key(work: Work, columns: Sequence[str]) -> str:
    """Equal for work with the same settings. The owner's consent is to a task, its settings and
    columns, so they are part of it: what is forbidden since answers no other work."""
    asked = work.task, work.codec, work.seed, sorted(work.settings.items()), sorted(columns)
    return hashlib.sha256(msgspec.json.encode(asked)).hexdigest()[:32]
