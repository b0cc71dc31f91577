"""Versions on disk, each in a file named by its digest, and the patches to them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from coordinator.storage.object_store import ObjectStore
from protocols.codecs import patches
from protocols.errors import BadWeights, StoreUnreachable
from protocols.local import atomic_files
from protocols.local.background_unlink import unlink
from protocols.local.disk_space import file_bytes
from protocols.local.failpoints import failpoint
from protocols.local.safe_paths import path_in
from protocols.messages.work import INLINE_MAX_BYTES
from protocols.model import weights
from protocols.model.weights import Array, Part, Schema, Weights
from protocols.model.weights_file import WeightsFile, WeightsWriter

#: Unfinished files of a process that was killed are deleted at a start after this time.
_UNFINISHED_S = 3600.0


def compare(folder: Path, suffix: str, mirror: ObjectStore | None) -> None:
    """Fetch what the folder lacks, and store what the mirror lacks. Raises StoreUnreachable."""
    if mirror is None:
        return
    names = [path.name for path in folder.glob(f"[!.]*{suffix}")]
    here, there = {name.removesuffix(suffix) for name in names}, mirror.digests()
    for digest in sorted(here - there):
        mirror.put(digest, path_in(folder, digest, suffix))
    for digest in sorted(there - here):
        mirror.get(digest, path_in(folder, digest, suffix))


class Versions:
    """The versions in a folder. Jobs can pin versions, so that they are not deleted before the job
    ends.

    `mirror` has the same ones. A version is there before `write`, `adopt` or `promote_upload`
    returns, so before the ledger names it. These raise StoreUnreachable; a retry continues.
    """

    suffix = ".safetensors"

    def __init__(self, folder: Path, mirror: ObjectStore | None = None) -> None:
        self.folder, self.mirror = folder, mirror
        folder.mkdir(mode=0o700, exist_ok=True)
        self._delete_unfinished()
        compare(folder, self.suffix, mirror)
        #: How many jobs use each version; pinned versions to delete once they are unpinned.
        self._pins: Counter[str] = Counter()
        self._dropped: set[str] = set()
        #: Versions that the ledger does not name yet.
        self.unrecorded: set[str] = set()
        self._naming = threading.Lock()

    def version_path(self, digest: str) -> Path:
        """The file of the version with this digest, whether or not it exists."""
        return path_in(self.folder, digest, self.suffix)

    def has(self, digest: str) -> bool:
        return bool(digest) and self.version_path(digest).exists()

    def patch_path(self, digest: str) -> Path:
        """The file of the patch from the parent to this version, whether or not it exists."""
        return path_in(self.folder, digest, ".patch")

    def make_patch(self, parent: str, digest: str) -> int:
        """Make the patch to a version; its bytes, or 0 if it would not be small."""
        try:
            with (
                WeightsFile(self.version_path(parent)) as old,
                WeightsFile(self.version_path(digest)) as new,
            ):
                return patches.make(old, new, self.patch_path(digest))
        except OSError:  # a full disk: the version is stored already and is sent whole
            return 0

    def nbytes(self, digest: str) -> int:
        """Bytes on disk of a version and of the patch to it."""
        return file_bytes(self.version_path(digest)) + file_bytes(self.patch_path(digest))

    def is_pinned(self, digest: str) -> bool:
        """True while a job uses this version."""
        return self._pins[digest] > 0

    def pin(self, digests: Iterable[str]) -> None:
        """Protect these versions from deletion until they are unpinned as often as pinned."""
        self._pins.update(digests)

    def unpin(self, digests: Iterable[str]) -> None:
        """Undo one `pin`. Versions that were dropped in the meantime are deleted now."""
        self._pins.subtract(digests)
        for digest in [digest for digest in self._dropped if self._pins[digest] <= 0]:
            self._dropped.discard(digest)
            self.drop(digest)

    def drop(self, digest: str) -> None:
        """Delete a version: at once, or once it is unpinned; never while it is unrecorded."""
        if self._pins[digest] > 0:
            self._dropped.add(digest)
            return
        with self._naming:
            if digest not in self.unrecorded:
                unlink(self.version_path(digest))
                self.patch_path(digest).unlink(missing_ok=True)
                if self.mirror is not None:
                    self.mirror.delete(digest)

    def mark_recorded(self, digest: str) -> None:
        """The ledger names this version now, so it can be dropped again."""
        self.unrecorded.discard(digest)

    def verify_digest(self, digest: str) -> bool:
        """True if a version exists and its bytes match its digest. Renames a damaged one."""
        path = self.version_path(digest)
        if not path.exists():
            return False
        if weights.file_digest(path) == digest:
            return True
        path.replace(path.with_suffix(".damaged"))
        return False

    def save(self, model: Weights) -> str:
        """Store a small model durably as a version; its digest."""
        parts = weights.split_into_pieces(model.schema)
        digest = self.write(model.schema, ({p: model.read(p) for p in piece} for piece in parts))
        self.mark_recorded(digest)
        return digest

    def adopt(self, source: Path, digest: str) -> None:
        """Make a file of another program a version, if its bytes are canonical and have this
        digest, and delete it. `drop` has no effect on the version until `mark_recorded`.

        It is copied, as the program may have it open. Raises BadWeights, OSError.
        """
        if not stat.S_ISREG(source.lstat().st_mode):
            raise BadWeights("it is not a plain file")
        temporary, is_there = self.folder / f".new-{secrets.token_hex(8)}", self.has(digest)
        try:
            checked = source if is_there else shutil.copyfile(source, temporary)
            with WeightsFile(checked):
                pass
            if weights.file_digest(checked) != digest:
                raise BadWeights("its bytes are not those of the digest")
            if self.mirror is not None:
                self.mirror.put(digest, checked)
            with checked.open("r+b") as file:
                os.fsync(file.fileno())
            with self._naming:
                self.unrecorded.add(digest)
                if not is_there:
                    temporary.replace(self.version_path(digest))
        finally:
            temporary.unlink(missing_ok=True)
        source.unlink(missing_ok=True)
        atomic_files.fsync_folder(self.folder)

    def write(self, schema: Schema, pieces: Iterable[dict[Part, Array]]) -> str:
        """Store a version durably; its digest. `pieces` come in file order.

        `drop` has no effect on it until `mark_recorded`.
        """
        # Commands write here too, beside the coordinator, so each writer has a file of its own.
        temporary = self.folder / f".new-{secrets.token_hex(8)}"
        with WeightsWriter(temporary, schema) as writer:
            for piece in pieces:
                writer.write(piece)
        failpoint("version.written")
        if self.mirror is not None:
            try:
                self.mirror.put(writer.digest, temporary)
            except StoreUnreachable:
                temporary.unlink()
                raise
        with self._naming:
            self.unrecorded.add(writer.digest)
            temporary.replace(self.version_path(writer.digest))
        failpoint("version.renamed")
        atomic_files.fsync_folder(self.folder)
        return writer.digest

    def _delete_unfinished(self) -> None:
        """Delete temporary files without a write in the last hour."""
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # its writer has just renamed it
                if path.name.startswith(".") and (
                    path.stat().st_mtime < time.time() - _UNFINISHED_S
                ):
                    path.unlink()

    def inline_bytes(self, digest: str) -> bytes:
        """The bytes of a version that is small enough to be sent inside a message; else empty."""
        path = self.version_path(digest)
        if not path.exists() or path.stat().st_size > INLINE_MAX_BYTES:
            return b""
        return path.read_bytes()
