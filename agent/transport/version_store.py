"""The versions that an agent keeps: fetched whole, or rebuilt from their parent by a patch."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.p2p import swarm
from agent.transport.p2p.sharing import Sharing
from protocols.codecs import patches
from protocols.errors import BadMessage, BadWeights, CommonweightError, Unreachable
from protocols.local.atomic_files import fsync_folder
from protocols.local.background_unlink import freeing_in_thread
from protocols.local.disk_space import is_disk_full
from protocols.messages.work import Work
from protocols.model.weights import file_digest
from protocols.model.weights_file import WeightsFile

log = logging.getLogger("commonweight.agent")

MAX_VERSIONS = 2
_TEMPORARY_SUFFIXES = frozenset({".part", ".pieces", ".patch", ".made", ".spread"})


class VersionStore:
    """A folder of versions by digest. `link` gives the session of the moment; blocking.

    With `sharing`, large versions come piece by piece, from other peers too, and go to them;
    `received(n)` is told of what came from peers.
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
        #: Those that this process has made or looked at: what a crash left may be anything.
        self._verified: set[str] = set()

    def fetch(self, digest: str, nbytes: int) -> Path:
        """A version's file, from the folder or the coordinator."""
        path = self._path(digest)
        if digest not in self._verified and path.exists() and file_digest(path) != digest:
            log.warning("version %s is damaged on this disk: fetching it again", digest[:12])
            path.unlink()
        if not path.exists():
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
            held = swarm.fetch(
                digest,
                nbytes,
                part,
                shelf=sharing.pieces,
                ask=lambda faulty: link.plan(digest, sharing.plan_request(faulty)),
                stream=link.stream,
                sign=sharing.sign,
                received=self._count_received,
            )
        except (BadMessage, OSError) as err:
            if is_disk_full(err):
                raise
            raise Unreachable(f"the version came only in part: {err}") from err
        if file_digest(part) != digest:
            part.unlink()
            raise BadWeights("the version's bytes are not those of its digest")
        if os.name == "nt":  # where a file that is being read cannot be renamed
            sharing.pieces.drop(digest)
        part.replace(path)
        fsync_folder(path.parent)
        self._register(digest)  # before it is told of: whoever is sent here shall find it
        link.announce_version(digest, held)

    def adopt(self, part: Path, digest: str) -> None:
        """A version has come otherwise, into this file: keep it under its name."""
        part.replace(self._path(digest))
        fsync_folder(self._folder)
        self._register(digest)
        self._drop_old()

    def _register(self, digest: str) -> None:
        self._verified.add(digest)
        if self._sharing is not None:
            self._sharing.pieces.put(digest, self._path(digest))

    def rebuild(self, work: Work) -> None:
        """Make the version that the work is on from its parent, if that is here.

        Whatever is wrong with the patch, the version can still be fetched whole.
        """
        path, parent = self._path(work.base), self._path(work.parent)
        if path.exists() or not parent.exists():
            return
        patch, made = path.with_suffix(".patch"), path.with_suffix(".made")
        try:
            self._link().download_patch(work.base, work.patch_bytes, patch)
            with WeightsFile(parent) as old, WeightsFile(patch) as change:
                if patches.apply(old, change, made) != work.base:
                    raise BadWeights("the patch leads to another version")
            made.replace(path)
            self._register(work.base)
            self._drop_old()
        except (CommonweightError, OSError) as err:
            log.warning("fetching the whole version, as its patch is of no use: %s", err)
        finally:
            for leftover in (patch, made):
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.safetensors"

    def shrink(self, nbytes: int, needed: Collection[str]) -> int:
        """Drop versions, oldest first, until so many bytes are free; the bytes that became free.

        Never those with a `needed` digest. What a cut-off download has left goes as well.
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
        return sorted(self._folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)

    def _drop_old(self) -> None:
        for old in self._by_age()[:-MAX_VERSIONS]:
            with freeing_in_thread(old):
                self._drop(old)

    def _drop(self, old: Path) -> None:
        if self._sharing is not None:
            self._sharing.pieces.drop(old.stem)  # its open file would keep the room
        old.unlink(missing_ok=True)
        self._verified.discard(old.stem)
