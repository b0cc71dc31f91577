"""Uploads on disk, until their round is committed. Each is named by its peer and its digest.

The uploads of a run are in a folder of the run's own and are deleted with it when the run ends, or
at the next start. An upload that was cut off stays as a `.part` file, and its peer can resume it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from pathlib import Path
from types import TracebackType

from protocols.errors import BadWeights
from protocols.local import atomic_files
from protocols.local.background_unlink import unlink
from protocols.local.disk_space import file_bytes
from protocols.local.failpoints import failpoint
from protocols.local.safe_paths import path_in
from protocols.model.weights_file import WeightsFile

DIGEST = re.compile(r"[0-9a-f]{64}")
_PART = ".part"


class Spool:
    """The uploads in a folder. A peer has one partial upload at most.

    `run`: the run that they are for; empty for answers of jobs, which lie in `root` itself.
    """

    def __init__(self, root: Path, suffix: str) -> None:
        root.mkdir(mode=0o700, exist_ok=True)
        self._root, self._suffix = root, suffix
        self._use("")

    def _use(self, run: str) -> None:
        self.run, self.folder = run, self._folder_of(run)
        #: The request that writes a `.part` file now. A newer request takes the file over.
        self.writers: dict[Path, PartialUpload] = {}
        #: By peer: its files, oldest first. Listing the folder for each upload would get slower
        #: with more peers.
        self._files: defaultdict[str, dict[Path, None]] = defaultdict(dict)
        for path in _files_by_age(self.folder):
            self._files[_node_of(path)][path] = None

    def begin_run(self, run: str) -> None:
        """Take the uploads of this run. Those from before a restart are kept."""
        self._use(run)

    def _folder_of(self, run: str) -> Path:
        return path_in(self._root, run) if run else self._root

    def _make_folder(self, run: str) -> None:
        self._folder_of(run).mkdir(mode=0o700, exist_ok=True)
        atomic_files.fsync_folder(self._root)

    def end_run(self) -> None:
        """Delete the uploads of the run, also those in progress."""
        ended = self.run
        self.clear()
        self._use("")
        self.delete_run(ended)

    def delete_run(self, run: str) -> None:
        """Delete the uploads of a run that is not active."""
        if run:
            shutil.rmtree(self._folder_of(run), ignore_errors=True)

    def keep_runs(self, needed: Mapping[str, Collection[tuple[str, str]]]) -> None:
        """At the start: delete the uploads of all other runs, for example after a crash.

        `needed`: by run, the peers and digests of the uploads that the ledger names. They lie in
        `root` itself if an older version wrote them, and are moved to the folder of their run.
        """
        for run, uploads in needed.items():
            for node, digest in uploads:
                if (path := self.path(node, digest)).exists():
                    self._make_folder(run)
                    path.replace(self._folder_of(run) / path.name)
        for path in self._root.iterdir():
            if path.is_dir() and path.name not in needed:
                shutil.rmtree(path, ignore_errors=True)
        self.clear()
        self._use("")

    def path(self, node: str, digest: str) -> Path:
        """The file of this peer's whole upload, whether or not it exists."""
        return path_in(self.folder, f"{node}-{digest}", self._suffix)

    def open(self, node: str, digest: str) -> WeightsFile:
        """An upload, open for reading. Raises BadWeights."""
        if not DIGEST.fullmatch(digest):  # a peer chose this text
            raise BadWeights("the update is not named by a digest")
        try:
            return WeightsFile(self.path(node, digest))
        except FileNotFoundError as err:
            raise BadWeights("the update's bytes were never uploaded") from err

    def is_receiving(self, node: str) -> bool:
        """True while a request uploads a file of this peer."""
        return any(path in self.writers for path in self._files[node])

    def peers(self) -> list[str]:
        """The peers with an upload, whole or not."""
        return [node for node, files in self._files.items() if files]

    def uncounted(self, node: str, counted: Set[str]) -> list[Path]:
        """The files of this peer's whole uploads, oldest first, except those that count."""
        kept = {self.path(node, digest) for digest in counted}
        whole = (path for path in tuple(self._files[node]) if path.suffix != _PART)
        return [path for path in whole if path not in kept]

    def delete(self, paths: Iterable[Path]) -> None:
        """Delete these uploads."""
        for path in paths:
            unlink(path)
            self._files[_node_of(path)].pop(path, None)

    def begin(self, node: str, digest: str) -> PartialUpload:
        """Start or resume an upload. The peer's other partial upload is deleted. Raises OSError."""
        if not self.folder.exists():
            self._make_folder(self.run)
        part = PartialUpload(self, node, digest)
        for other in self._files[node].keys() - {*self.uncounted(node, frozenset()), part.path}:
            self.writers.pop(other, None)
            self.delete([other])
        self._files[node][part.path] = None
        return part

    def finish(self, node: str, part: Path, done: Path) -> None:
        """Give a whole, synced upload its final name."""
        os.replace(part, done)
        self._files[node].pop(part, None)
        self._files[node][done] = None

    def write(self, node: str, digest: str, data: bytes) -> None:
        """Store a small file durably, as if this peer had uploaded it. Raises OSError."""
        if not self.folder.exists():
            self._make_folder(self.run)
        path = self.path(node, digest)
        failpoint("spool.writing")
        atomic_files.write_private(path, data)
        self._files[node][path] = None
        failpoint("spool.written")

    def read(self, node: str, digest: str) -> bytes:
        """The bytes of a small file. Raises OSError."""
        return self.path(node, digest).read_bytes()

    def move(self, node: str, digest: str, move: Callable[[Path], object]) -> None:
        """Move a whole upload out of the spool: `move(path)` does it."""
        path = self.path(node, digest)
        move(path)
        self._files[node].pop(path, None)

    def drop(self, node: str, digest: str) -> None:
        """Delete one upload."""
        self.delete([self.path(node, digest)])

    def keep_only(self, node: str, digests: Set[str]) -> None:
        """Delete this peer's whole uploads except these."""
        self.delete(self.uncounted(node, digests))

    def forget(self, node: str, counted: Set[str]) -> None:
        """Delete this peer's uploads, also those in progress, except those that count."""
        kept = {self.path(node, digest) for digest in counted}
        gone = self._files[node].keys() - kept
        for path in gone:
            self.writers.pop(path, None)
        self.delete(gone)

    def clear(self, keep_of: Collection[str] = ()) -> None:
        """Delete all uploads that no request writes now, except those of the peers `keep_of`."""
        for node, paths in list(self._files.items()):
            if node not in keep_of:
                self.delete(paths.keys() - self.writers.keys())


def _files_by_age(folder: Path) -> list[Path]:
    """The files in a folder that may not exist, oldest first.

    Commands open the folder beside the coordinator, which may delete a file at any time.
    """
    ages = dict[Path, float]()
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    ages[path] = status.st_mtime
    return sorted(ages, key=ages.__getitem__)


def _node_of(path: Path) -> str:
    return path.name.rpartition("-")[0]


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
        return file_bytes(self.path)

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
        atomic_files.fsync_folder(self.path.parent)
