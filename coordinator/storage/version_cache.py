"""Versions of a store in a folder, for a replica that waits."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from coordinator.storage.object_store import ObjectStore
from protocols.local.safe_paths import path_in

#: The least used of more versions is deleted.
MAX_VERSIONS = 8
#: Versions that are fetched at once, one of them for each peer.
_MAX_FETCHES = 4


class VersionCache:
    """Fetches a version from the store when it is asked for, once for all who wait for it.

    For one event loop. The folder is the cache's own: it is empty at the start.
    """

    def __init__(self, folder: Path, store: ObjectStore) -> None:
        self._folder, self._store = folder, store
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        #: With the peer that was the first to ask for it.
        self._fetches: dict[str, tuple[str, asyncio.Future[bool]]] = {}

    async def fetch(self, digest: str, peer: str) -> Path | None:
        """The file of a version, for a peer; None if the store has none.

        Raises StoreUnreachable, OSError, and BlockingIOError while too many others are fetched.
        """
        path = path_in(self._folder, digest, ".safetensors")
        if not path.exists():
            if digest not in self._fetches:
                is_busy = any(peer == asked_first for asked_first, _ in self._fetches.values())
                if is_busy or len(self._fetches) >= _MAX_FETCHES:
                    raise BlockingIOError("too many versions are fetched at once")
                fetch = asyncio.ensure_future(asyncio.to_thread(self._store.get, digest, path))
                fetch.add_done_callback(lambda _: self._fetches.pop(digest))
                self._fetches[digest] = (peer, fetch)
            if not await asyncio.shield(self._fetches[digest][1]):
                return None
            self._drop_old()
        os.utime(path)
        return path

    def _drop_old(self) -> None:
        """A version that is being sent stays open until its end."""
        files = sorted(self._folder.glob("[!.]*"), key=lambda path: path.stat().st_mtime)
        for path in files[:-MAX_VERSIONS]:
            path.unlink(missing_ok=True)

    async def drop_deleted(self) -> None:
        """Delete the versions that the store does not have any more. Raises StoreUnreachable."""
        there = await asyncio.to_thread(self._store.digests)
        for path in self._folder.glob("[!.]*"):
            if path.stem not in there:
                path.unlink(missing_ok=True)
