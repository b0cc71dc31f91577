"""The versions in an agent's cache: downloaded whole, or patched from their parent."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.p2p.sharing import Sharing
from agent.transport.p2p.swarm import SwarmDownload
from protocols.codecs import patches
from protocols.errors import BadMessage, BadWeights, CommonweightError, Unreachable
from protocols.local.atomic_files import fsync_folder
from protocols.local.background_unlink import freeing_in_thread
from protocols.local.disk_space import check_room, is_disk_full
from protocols.local.safe_paths import path_in
from protocols.messages.work import Work
from protocols.model.weights import file_digest
from protocols.model.weights_file import WeightsFile

log = logging.getLogger("commonweight.agent")

MAX_VERSIONS = 2
_TEMPORARY_SUFFIXES = frozenset({".part", ".pieces", ".patch", ".made", ".spread"})


class VersionStore:
    """A folder of versions by digest. `link` returns the current session. Blocking.

    With `sharing`, large versions are exchanged with other peers piece by piece. `received(n)` is
    called for bytes from peers.
    """

    def __init__(
        self,
        folder: Path,
        link: Callable[[], CoordinatorClient],
        sharing: Sharing | None = None,
        received: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self._folder, self._link, self._sharing = folder, link, sharing
        self._count_received = received
        #: Digests that this process has verified. A crash may have left damaged files.
        self._verified: set[str] = set()

    def fetch(self, digest: str, nbytes: int) -> Path:
        """Returns a version's file, downloaded if it is not in the folder."""
        path = self._path(digest)
        is_here = path.exists()
        if is_here and digest not in self._verified and file_digest(path) != digest:
            log.warning("version %s is damaged on this disk: downloading it again", digest[:12])
            path.unlink()
            is_here = False
        if not is_here:
            check_room(self._folder, nbytes)
            if self._sharing is not None and self._sharing.is_large_enough(nbytes):
                self._fetch_shared(self._sharing, digest, nbytes, path)
            else:
                self._link().download(digest, nbytes, path)
            self._drop_old()
        self._register(digest)
        return path

    def _fetch_shared(self, sharing: Sharing, digest: str, nbytes: int, path: Path) -> None:
        link, part = self._link(), path.with_suffix(".pieces")
        try:
            download = SwarmDownload(digest, nbytes, link, sharing, self._count_received)
            report = download.run(part)
        except (BadMessage, OSError) as err:
            if is_disk_full(err):
                raise
            raise Unreachable(f"the version arrived incomplete: {err}") from err
        if file_digest(part) != digest:
            part.unlink()
            raise BadWeights("the version's bytes do not match its digest")
        if os.name == "nt":  # Windows cannot rename an open file
            sharing.pieces.drop(digest)
        part.replace(path)
        fsync_folder(path.parent)
        self._register(digest)  # first, so that peers that are sent here find it
        link.announce_version(digest, report)

    def adopt(self, part: Path, digest: str) -> None:
        """Moves a version that arrived in another way into the cache."""
        part.replace(self._path(digest))
        fsync_folder(self._folder)
        self._register(digest)
        self._drop_old()

    def _register(self, digest: str) -> None:
        self._verified.add(digest)
        if self._sharing is not None:
            self._sharing.pieces.put(digest, self._path(digest))

    def rebuild(self, work: Work) -> None:
        """Patches the base of the work from its parent, if the parent is here.

        If the patch fails, the version can still be downloaded whole.
        """
        path, parent = self._path(work.base), self._path(work.parent)
        if path.exists() or not parent.exists():
            return
        patch, rebuilt = path.with_suffix(".patch"), path.with_suffix(".made")
        try:
            self._link().download_patch(work.base, work.patch_bytes, patch)
            with WeightsFile(parent) as old, WeightsFile(patch) as change:
                if patches.apply(old, change, rebuilt) != work.base:
                    raise BadWeights("the patch makes a different version")
            rebuilt.replace(path)
            self._register(work.base)
            self._drop_old()
        except (CommonweightError, OSError) as err:
            log.warning("downloading the whole version, as its patch failed: %s", err)
        finally:
            for leftover in (patch, rebuilt):
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return path_in(self._folder, digest, ".safetensors")

    def shrink(self, nbytes: int, needed: Collection[str]) -> int:
        """Deletes versions, oldest first, until `nbytes` are free; returns the freed bytes.

        Keeps versions with a `needed` digest. Deletes files of interrupted downloads, too.
        """
        freed = 0
        for leftover in (p for p in self._folder.glob("*.*") if p.suffix in _TEMPORARY_SUFFIXES):
            if leftover.stem not in needed and freed < nbytes:
                freed += leftover.stat().st_size
                leftover.unlink(missing_ok=True)
        for old in self._by_age():
            if old.stem not in needed and freed < nbytes:
                freed += old.stat().st_size
                self._drop(old)
        return freed

    def _by_age(self) -> list[Path]:
        with os.scandir(self._folder) as files:
            versions = [file for file in files if file.name.endswith(".safetensors")]
            versions.sort(key=lambda file: file.stat().st_mtime)
        return [self._folder / version.name for version in versions]

    def _drop_old(self) -> None:
        for old in self._by_age()[:-MAX_VERSIONS]:
            with freeing_in_thread(old):
                self._drop(old)

    def _drop(self, old: Path) -> None:
        if self._sharing is not None:
            self._sharing.pieces.drop(old.stem)  # an open file would keep the space
        old.unlink(missing_ok=True)
        self._verified.discard(old.stem)
