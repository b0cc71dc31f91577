"""Uploads on disk, until their round is committed. Each is named by its peer and its digest.

An upload that was cut off stays as a `.part` file, and its peer can resume it.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Set
from pathlib import Path
from types import TracebackType

from protocols.errors import BadWeights
from protocols.failpoints import failpoint
from protocols.local import atomic_files
from protocols.local.background_unlink import unlink
from protocols.model.weights_file import WeightsFile

DIGEST = re.compile(r"[0-9a-f]{64}")
_PART = ".part"


class Spool:
    """The uploads in a folder. A peer has one partial upload at most."""

    def __init__(self, folder: Path, suffix: str) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.folder, self._suffix = folder, suffix
        #: The request that writes a `.part` file now. A newer request takes the file over.
        self.writers: dict[Path, PartialUpload] = {}
        #: By peer: its files. Listing the folder for each upload would get slower with more peers.
        self._files: defaultdict[str, set[Path]] = defaultdict(set)
        for path in folder.iterdir():
            self._files[path.name.rpartition("-")[0]].add(path)

    def path(self, node: str, digest: str) -> Path:
        """The file of this peer's whole upload, whether or not it exists."""
        return self.folder / f"{node}-{digest}{self._suffix}"

    def open(self, node: str, digest: str) -> WeightsFile:
        """An upload, open for reading. Raises BadWeights."""
        if not DIGEST.fullmatch(digest):  # a peer chose this text
            raise BadWeights("the update is not named by a digest")
        try:
            return WeightsFile(self.path(node, digest))
        except FileNotFoundError as err:
            raise BadWeights("the update's bytes were never uploaded") from err

    def complete(self, node: str) -> set[Path]:
        """The files of this peer's whole uploads."""
        return {path for path in self._files[node] if path.suffix != _PART}

    def begin(self, node: str, digest: str) -> PartialUpload:
        """Start or resume an upload. The peer's other partial upload is deleted."""
        part = PartialUpload(self, node, digest)
        for other in self._files[node] - self.complete(node) - {part.path}:
            self.writers.pop(other, None)
            other.unlink(missing_ok=True)
            self._files[node].discard(other)
        self._files[node].add(part.path)
        return part

    def finish(self, node: str, part: Path, done: Path) -> None:
        """Give a whole, synced upload its final name."""
        os.replace(part, done)
        self._files[node].discard(part)
        self._files[node].add(done)

    def move(self, node: str, digest: str, target: Path) -> None:
        """Move a whole upload out of the spool."""
        path = self.path(node, digest)
        path.replace(target)
        self._files[node].discard(path)

    def drop(self, node: str, digest: str) -> None:
        """Delete one upload."""
        unlink(self.path(node, digest))
        self._files[node].discard(self.path(node, digest))

    def keep_only(self, node: str, digests: Set[str]) -> None:
        """Delete this peer's whole uploads except these."""
        for path in self.complete(node) - {self.path(node, digest) for digest in digests}:
            unlink(path)
            self._files[node].discard(path)

    def clear(self, keep_of: Collection[str] = ()) -> None:
        """Delete all uploads that no request writes now, except those of the peers `keep_of`."""
        for node, paths in self._files.items():
            if node in keep_of:
                continue
            for path in paths - self.writers.keys():
                unlink(path)
                paths.discard(path)
        failpoint("updates.dropped")


class PartialUpload:
    """The `.part` file of an upload. In its `with` block, one request may write it."""

    def __init__(self, spool: Spool, node: str, digest: str) -> None:
        self._spool, self._node = spool, node
        self._done = spool.path(node, digest)
        self.path = self._done.with_suffix(_PART)

    def __enter__(self) -> PartialUpload:
        self._spool.writers[self.path] = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.is_current():
            del self._spool.writers[self.path]

    @property
    def nbytes(self) -> int:
        """Bytes that arrived in earlier requests."""
        return self.path.stat().st_size if self.path.exists() else 0

    def is_current(self) -> bool:
        """False once a newer request has taken the file over: then it must not be touched."""
        return self._spool.writers.get(self.path) is self

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the whole, synced file its final name. `sync` makes that durable."""
        failpoint("upload.synced")
        self._spool.finish(self._node, self.path, self._done)

    def sync(self) -> None:
        """Make the final name durable. Blocks."""
        atomic_files.fsync_folder(self._spool.folder)
