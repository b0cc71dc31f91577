"""Versions on disk, each in a file named by its digest, and the patches that lead to them."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from protocols.codecs import patches
from protocols.failpoints import failpoint
from protocols.local import atomic_files
from protocols.local.background_unlink import unlink
from protocols.messages.work import INLINE_MAX_BYTES
from protocols.model import weights
from protocols.model.weights import Array, Part, Schema, Weights
from protocols.model.weights_file import WeightsFile, WeightsWriter

#: Unfinished files of a process that was killed are deleted at a start after this time.
_UNFINISHED_S = 3600.0


class Versions:
    """The versions in a folder. One that jobs use can be pinned: it stays until they let go."""

    suffix = ".safetensors"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)
        self._delete_unfinished()
        #: Versions that jobs use, by how many, and those of them that are not wanted else.
        self._pins: Counter[str] = Counter()
        self._unwanted: set[str] = set()
        #: Versions of a run that its ledger does not name yet.
        self.unrecorded: set[str] = set()
        self._naming = threading.Lock()

    def version_path(self, digest: str) -> Path:
        """Where the version with this digest lies, or would."""
        return self.folder / f"{digest}{self.suffix}"

    def has(self, digest: str) -> bool:
        return self.version_path(digest).exists()

    def patch_path(self, digest: str) -> Path:
        """Where the patch to this version from its parent lies, or would."""
        return self.folder / f"{digest}.patch"

    def make_patch(self, parent: str, digest: str) -> int:
        """Make the patch to a version, if a small one does; its bytes, else 0."""
        try:
            with (
                WeightsFile(self.version_path(parent)) as old,
                WeightsFile(self.version_path(digest)) as new,
            ):
                return patches.make(old, new, self.patch_path(digest))
        except OSError:  # a full disk: the version itself is safe, and is sent whole
            return 0

    def nbytes(self, digest: str) -> int:
        """What a version and the patch to it take on disk."""
        paths = (self.version_path(digest), self.patch_path(digest))
        return sum(path.stat().st_size for path in paths if path.exists())

    def is_pinned(self, digest: str) -> bool:
        """True while a job uses this version."""
        return self._pins[digest] > 0

    def pin(self, digests: Iterable[str]) -> None:
        """Keep these versions, whoever drops them, until they are unpinned as often."""
        self._pins.update(digests)

    def unpin(self, digests: Iterable[str]) -> None:
        """Drop now what was dropped meanwhile."""
        self._pins.subtract(digests)
        for digest in [digest for digest in self._unwanted if self._pins[digest] <= 0]:
            self._unwanted.discard(digest)
            self.drop(digest)

    def drop(self, digest: str) -> None:
        """Forget a version, unless a run has just made it."""
        if self._pins[digest] > 0:
            self._unwanted.add(digest)
            return
        with self._naming:
            if digest not in self.unrecorded:
                unlink(self.version_path(digest))
                self.patch_path(digest).unlink(missing_ok=True)

    def mark_recorded(self, digest: str) -> None:
        """The ledger names a version: from now on it can be dropped."""
        self.unrecorded.discard(digest)

    def verify_digest(self, digest: str) -> bool:
        """True if a version's bytes are there and are its own. Damaged ones are put aside."""
        path = self.version_path(digest)
        if not path.exists():
            return False
        if weights.file_digest(path) == digest:
            return True
        path.replace(path.with_suffix(".damaged"))
        return False

    def save(self, model: Weights) -> str:
        """Keep a small model as a version, durably; its digest."""
        parts = weights.split_into_pieces(model.schema)
        digest = self.write(model.schema, ({p: model.read(p) for p in piece} for piece in parts))
        self.mark_recorded(digest)
        return digest

    def write(self, schema: Schema, pieces: Iterable[dict[Part, Array]]) -> str:
        """Keep a version, durably; its digest. `pieces` come in file order.

        Nothing drops it before `recorded`.
        """
        # Commands write here beside the coordinator, so every writer has a file of its own.
        temporary = self.folder / f".new-{secrets.token_hex(8)}"
        with WeightsWriter(temporary, schema) as writer:
            for piece in pieces:
                writer.write(piece)
        failpoint("version.written")
        with self._naming:
            self.unrecorded.add(writer.digest)
            temporary.replace(self.version_path(writer.digest))
        failpoint("version.renamed")
        atomic_files.fsync_folder(self.folder)
        return writer.digest

    def _delete_unfinished(self) -> None:
        """Delete temporary files that nobody has written to for an hour."""
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # its writer has just finished
                if path.name.startswith(".") and (
                    path.stat().st_mtime < time.time() - _UNFINISHED_S
                ):
                    path.unlink()

    def inline_bytes(self, digest: str) -> bytes:
        """A version that is so small that it goes with the work; empty for any other."""
        path = self.version_path(digest)
        if not path.exists() or path.stat().st_size > INLINE_MAX_BYTES:
            return b""
        return path.read_bytes()
