"""The versions that an agent keeps: fetched whole, or rebuilt from their parent by a patch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from agent.link import Link
from protocols import patches
from protocols.errors import BadWeights, CommonweightError
from protocols.messages import Work
from protocols.stored import Stored
from protocols.weights import file_digest

log = logging.getLogger("commonweight.agent")

KEPT = 2


class Versions:
    """A folder of versions by digest. `link` gives the session of the moment; blocking."""

    def __init__(self, folder: Path, link: Callable[[], Link]) -> None:
        self._folder, self._link = folder, link
        #: Those that this process has made or looked at: what a crash left may be anything.
        self._whole: set[str] = set()

    def fetch(self, digest: str, nbytes: int) -> Path:
        """A version's file, from the folder or the coordinator."""
        path = self._path(digest)
        if digest not in self._whole and path.exists() and file_digest(path) != digest:
            log.warning("version %s is damaged on this disk: fetching it again", digest[:12])
            path.unlink()
        if not path.exists():
            self._link().download(digest, nbytes, path)
            self._drop_old()
        self._whole.add(digest)
        return path

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
            with Stored(parent) as old, Stored(patch) as change:
                if patches.apply(old, change, made) != work.base:
                    raise BadWeights("the patch leads to another version")
            made.replace(path)
            self._whole.add(work.base)
            self._drop_old()
        except (CommonweightError, OSError) as err:
            log.warning("fetching the whole version, as its patch is of no use: %s", err)
        finally:
            for leftover in (patch, made):
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.safetensors"

    def _drop_old(self) -> None:
        versions = sorted(self._folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
        for old in versions[:-KEPT]:
            old.unlink()
            self._whole.discard(old.stem)
